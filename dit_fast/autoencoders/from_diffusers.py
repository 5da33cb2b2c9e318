"""The autoencoders of diffusers: from a local folder, or out of a run that has trained one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dit_fast.data.files import reason, weights_identity
from dit_fast.errors import CheckpointError, DataError


class DiffusersAutoencoder:
    """`AutoencoderKL` or `AutoencoderTiny` of diffusers, frozen and in eval mode; nothing is downloaded.

    Model-space latents of diffusers are (z - shift_factor) * scaling_factor; where its configuration has `latents_mean`
    and `latents_std`, one number per channel, (z - latents_mean) / latents_std * scaling_factor.

    module: of diffusers.
    """

    std = True

    def __init__(self, module: Any, identity: str):
        settings = module.config
        self.module = module.requires_grad_(False).eval()
        self.identity = identity
        self.scale, self.shift = _affine(settings)
        self.channels = int(settings.latent_channels)
        self.factor = 2 ** (len(settings.block_out_channels) - 1)
        self.config: Mapping[str, Any] = {key: value for key, value in settings.items() if not key.startswith("_")}
        self.stochastic = type(module).__name__ == "AutoencoderKL"

    @classmethod
    def load(cls, folder: str) -> "DiffusersAutoencoder":
        """Reads what `save` and diffusers' save_pretrained write. Raises DataError when it or diffusers is missing."""
        path = Path(folder)
        config = path / "config.json"
        if not config.is_file():
            raise DataError(f"{config}: missing; give the folder that save_pretrained wrote (often called vae)")
        diffusers = _diffusers("autoencoder diffusers:DIR")
        try:
            name = diffusers.ConfigMixin._dict_from_json_file(str(config)).get("_class_name")
        except Exception as error:
            raise DataError(f"{config}: cannot be read ({reason(error)}); restore it") from None
        kinds = {"AutoencoderKL": diffusers.AutoencoderKL, "AutoencoderTiny": diffusers.AutoencoderTiny}
        weights = sorted(path.glob("*.safetensors"))
        if name not in kinds or not weights:
            raise DataError(
                f"{path}: holds '{name}' with {len(weights)} safetensors files; need AutoencoderKL or AutoencoderTiny"
            )
        try:
            module, report = kinds[name].from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,  # left to its default, diffusers advises to install accelerate
                output_loading_info=True,
            )
            found = cls(module, weights_identity(f"diffusers-{name}", weights))
        except Exception as error:  # damaged weights and configurations raise many kinds
            raise DataError(f"{path}: cannot be loaded ({reason(error)})") from None
        lacking = report.get("missing_keys")
        if lacking:  # diffusers fills them with random numbers
            raise DataError(f"{path}: its weights lack {sorted(lacking)[0]} ({len(lacking)} such); fetch them again")
        return found

    @classmethod
    def trained(
        cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], mean: Tensor, std: Tensor, identity: str
    ) -> "DiffusersAutoencoder":
        """An AutoencoderKL as a run has made it. mean, std: [channels], of its latents; they become `latents_mean` and
        `latents_std` of its configuration, the scale and shift of model-space latents.

        Raises CheckpointError where weights and configuration do not fit each other.
        """
        diffusers = _diffusers("a run with an autoencoder of its own")
        numbers = {"latents_mean": mean.double().tolist(), "latents_std": std.double().tolist()}
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                module = diffusers.AutoencoderKL.from_config(
                    {**config, **numbers, "scaling_factor": 1.0, "shift_factor": None}
                )
            module.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        except Exception as error:
            raise CheckpointError(f"the run's own autoencoder cannot be made again ({reason(error)})") from None
        return cls(module, identity)

    def save(self, folder: str | Path) -> None:
        """Writes configuration and weights for diffusers' from_pretrained and for `diffusers:FOLDER`."""
        self.module.save_pretrained(str(folder))

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = self.module.encode(images)
        if self.stochastic:
            return encoded.latent_dist.mean, encoded.latent_dist.std
        return encoded.latents, torch.zeros_like(encoded.latents)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.module.decode(latents).sample

    def to(self, device: torch.device | str) -> Self:
        self.module.to(device)
        return self


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON would give it back."""
    return json.loads(json.dumps(dict(config)))


def _affine(settings: Any) -> tuple[float | Sequence[float], float | Sequence[float]]:
    """scale and shift: z * scale + shift are model-space latents."""
    scale = float(settings.scaling_factor)
    means, stds = getattr(settings, "latents_mean", None), getattr(settings, "latents_std", None)
    if means is None or stds is None:
        return scale, -float(getattr(settings, "shift_factor", None) or 0.0) * scale
    scales = tuple(scale / float(std) for std in stds)
    return scales, tuple(-float(mean) * each for mean, each in zip(means, scales, strict=True))


def _diffusers(what: str) -> Any:
    try:
        import diffusers
    except ImportError:
        raise DataError(f"{what} needs diffusers; run `pip install 'dit_fast[diffusers]'`") from None
    return diffusers
