"""Flow matching in plain torch: paths, interpolant, velocity and its error, with keyed noise; the definition of truth.

On a path x_t = alpha(t) x + sigma(t) e from data (t = 0) to noise (t = 1) the velocity is v = alpha' x + sigma' e. The
noise e of a sample is the draw of its position from the counter-based generator, stream NOISE of dit_fast/philox.py.

Source: SiT (arXiv 2401.08740), Sec. 2.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dit_fast import philox
from dit_fast.ops._op import wide

PATHS = ("linear", "cosine")


class Coefficients(NamedTuple):
    """alpha, sigma and their derivatives with respect to t; floats or tensors, as t was."""

    alpha: float | Tensor
    sigma: float | Tensor
    d_alpha: float | Tensor
    d_sigma: float | Tensor


def path_coefficients(path: str, t: float | Tensor) -> Coefficients:
    """Of the "linear" path (1 - t, t) or the "cosine" path (cos(pi t/2), sin(pi t/2)), for times in [0, 1]."""
    if path == "linear":
        return Coefficients(1 - t, t, -1.0, 1.0)
    angle = t * (math.pi / 2)
    if isinstance(angle, Tensor):
        cos, sin = torch.cos(angle), torch.sin(angle)
        return Coefficients(cos, sin, -math.pi / 2 * sin, math.pi / 2 * cos)
    return Coefficients(math.cos(angle), math.sin(angle), -math.pi / 2 * math.sin(angle), math.pi / 2 * math.cos(angle))


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """t [N] as [N, 1, ...] beside `like` [N, ...], in its dtype."""
    return t.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def noised(latents: Tensor, t: Tensor, positions: Tensor, seed: int, path: str) -> Tensor:
    """x_t [N, ...] of latents [N, ...], in float32 or float64."""
    x = latents.to(wide(latents))
    c = path_coefficients(path, per_sample(t, x))
    return c.alpha * x + c.sigma * _noise(x, positions, seed)


def velocity(latents: Tensor, t: Tensor, positions: Tensor, seed: int, path: str) -> Tensor:
    """v [N, ...] of float32 or float64 latents [N, ...]."""
    c = path_coefficients(path, per_sample(t, latents))
    return c.d_alpha * latents + c.d_sigma * _noise(latents, positions, seed)


def error(prediction: Tensor, latents: Tensor, t: Tensor, positions: Tensor, seed: int, path: str) -> Tensor:
    """Mean of (prediction - v)^2 over all but the first dimension, [N] in float32 or float64."""
    dtype = wide(prediction, latents)
    target = velocity(latents.to(dtype), t, positions, seed, path)
    return (prediction.to(dtype) - target).square().flatten(1).mean(1)


def _noise(x: Tensor, positions: Tensor, seed: int) -> Tensor:
    return philox.normal(seed, positions, philox.Stream.NOISE, tuple(x.shape[1:])).to(x.dtype)
