"""Latents to model space and back, and from there to pixels, where nothing passes that is not finite."""

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dit_fast.errors import DataError

if TYPE_CHECKING:
    from dit_fast.autoencoders import Autoencoder

DECODED = 32  # images decoded at once: a VAE's activations take 0.1 to 1 GB for each


class Scaled(Protocol):
    """What says how latents are scaled: a data set's description, or an autoencoder with statistics of its own."""

    @property
    def scale(self) -> Any: ...

    @property
    def shift(self) -> Any: ...


def decode_images(
    latents: Tensor, info: Scaled, autoencoder: "Autoencoder", origin: str, first: int = 0, batch: int = DECODED
) -> np.ndarray:
    """uint8 [N, H, W, 3] from model-space latents [N, C, h, w], which are scaled as `info` says.

    They are decoded in batches of one size, so that no image depends on how many there are. origin: where they come
    from ("weights of step 100"), and first: the number of the first, for messages. Raises DataError naming the first
    image that holds NaN or Inf, as a latent or once decoded.
    """
    finite = latents.flatten(1).isfinite().all(1)
    if not finite.all():
        bad = first + int(finite.logical_not().nonzero()[0])
        raise DataError(
            f"image {bad} ({origin}): its latent holds NaN or Inf ({int((~finite).sum())} of {len(finite)} images); "
            "the weights have diverged, or a number of the sampler is too large"
        )
    rows = torch.cat([latents, latents[-1:].expand(-len(latents) % batch, -1, -1, -1)])
    images = [
        to_uint8(autoencoder.decode(from_model_space(part, info).float()).float().cpu().numpy(), origin, first + at)
        for at, part in zip(range(0, len(rows), batch), rows.split(batch), strict=True)
    ]
    return np.concatenate(images)[: len(latents)]


def to_uint8(images: np.ndarray, origin: str, first: int = 0) -> np.ndarray:
    """float [N, 3, H, W] in [-1, 1] -> uint8 [N, H, W, 3], rounded to the nearest level (values outside are cut).

    first: number of the first image. Raises DataError naming the first image that holds NaN or Inf.
    """
    bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
    if len(bad):
        raise DataError(
            f"image {first + int(bad[0])} ({origin}): its pixels hold NaN or Inf after decoding; the latents lie far "
            "outside what the autoencoder was made for, or its weights are damaged"
        )
    levels = np.clip(np.round((images.astype(np.float64) + 1) * 127.5), 0, 255).astype(np.uint8)
    return levels.transpose(0, 2, 3, 1)


def to_model_space(latents: Tensor, info: Scaled) -> Tensor:
    """The autoencoder's latents [N, C, h, w] as the model sees them: x * scale + shift."""
    scale, shift = _scaling(latents, info)
    return latents * scale + shift


def from_model_space(latents: Tensor, info: Scaled) -> Tensor:
    """Inverse of `to_model_space`: (x - shift) / scale."""
    scale, shift = _scaling(latents, info)
    return (latents - shift) / scale


def _scaling(latents: Tensor, info: Scaled) -> list[Tensor]:
    make = partial(torch.tensor, dtype=latents.dtype, device=latents.device)
    return [make(value).reshape(-1, 1, 1) for value in (info.scale, info.shift)]
