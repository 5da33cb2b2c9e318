"""A diffusers pipeline for models of dit_fast; `dit-fast export` puts a copy of this file into the folder it writes.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    pipe([207, 360], seed=0).images[0].save("dog.png")

Needs `pip install 'dit_fast[train,diffusers]'`. With `seed`, image k is the one that `dit-fast sample` draws as its
k-th of that seed and class.
"""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor


class DitFastTransformer(ModelMixin, ConfigMixin):
    """A backbone of dit_fast with its objective. run: the configuration of its training run."""

    @register_to_config
    def __init__(self, run: dict[str, Any]):
        super().__init__()
        from dit_fast.models import new_model
        from dit_fast.objectives import OBJECTIVES
        from dit_fast.runs import stored

        config = stored(run)
        self.model = new_model(config.model)
        self.objective = OBJECTIVES[config.objective.name](config.objective, self.model)

    def forward(self, x: Any, t: Tensor, y: Any) -> Any:
        """As the backbone: x [N, C, H, W] or the leaves that it denoises, t [N] from data (0) to noise (1)."""
        return self.model(x, t, y)


class DitFastPipeline(DiffusionPipeline):
    """Class labels to images.

    vae: of diffusers, or None where `autoencoder` says what decodes (`pca:FILE` and the like, FILE within the folder).
    scale, shift: of model-space latents. sampling: arguments of `dit_fast.diffusion.sample` that the run is drawn with
    unless a call says otherwise. told: what a model that is told its guidance is told. class_names: by label.
    """

    _optional_components: ClassVar = ["vae"]
    transformer: Any
    vae: Any
    config: Any

    def __init__(
        self,
        transformer: ModelMixin,
        vae: Any = None,
        autoencoder: str | None = None,
        scale: Any = 1.0,
        shift: Any = 0.0,
        sampling: dict[str, Any] | None = None,
        told: dict[str, float] | None = None,
        class_names: list[str] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(
            autoencoder=autoencoder, scale=scale, shift=shift, sampling=sampling, told=told, class_names=class_names
        )
        self.scale, self.shift = scale, shift
        self._decoder: Any = None

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        first: int = 0,
        output_type: str = "pil",
        return_dict: bool = True,
        **sampling: Any,
    ) -> Any:
        """Images of these classes.

        Randomness: `generator` (a new one where neither is given), or `seed` with `first`, the number of the first
        image: image k then is a function of seed, k and class. sampling: further arguments of `sample` (sampler,
        guidance_low, guidance_high, ...). output_type: "pil", "np" (float32 [N, H, W, 3] in [0, 1]), "pt" (the same as
        a tensor [N, 3, H, W]) or "latent" (model space). Raises UserError as `sample` does.
        """
        from dit_fast.autoencoders.pixels import decode_images
        from dit_fast.diffusion import initial_noise, sample
        from dit_fast.errors import UserError
        from dit_fast.models import guidance_conditions
        from dit_fast.tree import each, image

        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type '{output_type}' is unknown; valid: pil, np, pt, latent")
        if seed is not None and generator is not None:
            raise UserError("give generator or seed, not both")
        model, objective, device = self.transformer.model.eval(), self.transformer.objective, self._execution_device
        labels = torch.as_tensor(class_labels, dtype=torch.int64, device=device).reshape(-1)
        shapes = model.shapes if len(model.shapes) > 1 else model.shapes["image"]
        index = torch.arange(first, first + len(labels), dtype=torch.int64, device=device)
        arguments = {**(self.config.sampling or {}), **sampling}
        if seed is None:
            generator = generator or torch.Generator(device).manual_seed(torch.seed() % (1 << 63))
            noise: Any = each(torch.empty_like, initial_noise(0, index, shapes))
            noise = each(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device), noise)
            arguments |= {"generator": generator, "seed": None}
        else:
            noise = initial_noise(seed, index, shapes)
            arguments |= {"seed": seed, "index": index}
        if guidance_scale is not None:
            arguments["cfg_scale"] = guidance_scale
        if num_inference_steps is not None:
            arguments["num_steps"] = num_inference_steps
        told = self.config.told
        latents = sample(
            model,
            noise,
            guidance_conditions(labels, **told) if told else labels,
            path=objective.path,
            prediction=objective.prediction,
            field=objective.field,
            **arguments,
        )
        if output_type == "latent":
            return ImagePipelineOutput(images=image(latents)) if return_dict else (image(latents),)
        pictures = decode_images(image(latents), self, self._autoencoder().to(device), "the exported weights", first)
        self.maybe_free_model_hooks()
        levels = np.float32(pictures) / 255
        found: Any = {
            "np": lambda: levels,
            "pt": lambda: torch.from_numpy(levels).permute(0, 3, 1, 2),
            "pil": lambda: self.numpy_to_pil(levels),
        }[output_type]()
        return ImagePipelineOutput(images=found) if return_dict else (found,)

    def _autoencoder(self) -> Any:
        from dit_fast.autoencoders import load_autoencoder
        from dit_fast.autoencoders.from_diffusers import DiffusersAutoencoder

        if self.vae is not None:
            return DiffusersAutoencoder(self.vae, "vae of the pipeline")
        if self._decoder is None:
            kind, _, place = self.config.autoencoder.partition(":")
            self._decoder = load_autoencoder(f"{kind}:{Path(self.config._name_or_path, place)}")
        return self._decoder
