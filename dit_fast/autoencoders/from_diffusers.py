"""The autoencoders of diffusers, from a local folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

from dit_fast.data.files import reason, weights_identity
from dit_fast.errors import DataError


class DiffusersAutoencoder:
    """`AutoencoderKL` or `AutoencoderTiny` of diffusers from a local folder; nothing is downloaded.

    Model-space latents of diffusers are (z - shift_factor) * scaling_factor, so here shift = -shift_factor *
    scaling_factor. Raises DataError when diffusers or the folder is missing.
    """

    std = True

    def __init__(self, folder: str):
        path = Path(folder)
        config = path / "config.json"
        if not config.is_file():
            raise DataError(f"{config}: missing; give the folder that save_pretrained wrote (often called vae)")
        try:
            import diffusers
        except ImportError:
            raise DataError(
                "autoencoder diffusers:DIR needs diffusers; run `pip install 'dit_fast[diffusers]'`"
            ) from None
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
            self._model, report = kinds[name].from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,  # left to its default, diffusers advises to install accelerate
                output_loading_info=True,
            )
            settings = self._model.config
            self.scale = float(settings.scaling_factor)
            self.shift = -float(getattr(settings, "shift_factor", None) or 0.0) * self.scale
            self.channels = int(settings.latent_channels)
            self.factor = 2 ** (len(settings.block_out_channels) - 1)
        except Exception as error:  # damaged weights and configurations raise many kinds
            raise DataError(f"{path}: cannot be loaded ({reason(error)})") from None
        lacking = report.get("missing_keys")
        if lacking:  # diffusers fills them with random numbers
            raise DataError(f"{path}: its weights lack {sorted(lacking)[0]} ({len(lacking)} such); fetch them again")
        self._model.requires_grad_(False).eval()
        self.config: Mapping[str, Any] = {key: value for key, value in settings.items() if not key.startswith("_")}
        self.identity = weights_identity(f"diffusers-{name}", weights)
        self._stochastic = name == "AutoencoderKL"

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = self._model.encode(images)
        if self._stochastic:
            return encoded.latent_dist.mean, encoded.latent_dist.std
        return encoded.latents, torch.zeros_like(encoded.latents)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self._model.decode(latents).sample

    def to(self, device: torch.device | str) -> Self:
        self._model.to(device)
        return self
