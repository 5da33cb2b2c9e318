"""Paths from data (t = 0) to noise (t = 1): x_t = alpha(t) x + sigma(t) noise, with velocity v = dx_t/dt."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dit_fast.errors import UserError


class Coefficients(NamedTuple):
    """alpha, sigma and their derivatives with respect to t; floats or tensors, as t was."""

    alpha: float | Tensor
    sigma: float | Tensor
    d_alpha: float | Tensor
    d_sigma: float | Tensor


class Path:
    """The "linear" path (alpha = 1 - t, sigma = t) or the "cosine" path (alpha = cos(pi t/2), sigma = sin(pi t/2)).

    Source: SiT (arXiv 2401.08740), Sec. 2, with time running from data to noise as in REPA. Any other name raises
    UserError.
    """

    NAMES = ("linear", "cosine")

    def __init__(self, name: Literal["linear", "cosine"] | str):
        if name not in self.NAMES:
            raise UserError(f"unknown path '{name}'; valid: {', '.join(self.NAMES)}")
        self.name = name

    def __repr__(self) -> str:
        return f"Path({self.name!r})"

    def coefficients(self, t: float | Tensor) -> Coefficients:
        """alpha(t), sigma(t) and derivatives, for a float or a tensor of times in [0, 1]."""
        if self.name == "linear":
            return Coefficients(1 - t, t, -1.0, 1.0)
        angle = t * (math.pi / 2)
        if isinstance(angle, Tensor):
            cos, sin = torch.cos(angle), torch.sin(angle)
            return Coefficients(cos, sin, -math.pi / 2 * sin, math.pi / 2 * cos)
        return Coefficients(
            math.cos(angle), math.sin(angle), -math.pi / 2 * math.sin(angle), math.pi / 2 * math.cos(angle)
        )

    def interpolate(self, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, v), each [N, ...], for data and noise of that shape and times t [N]; in their common dtype."""
        if x.shape != noise.shape or t.shape != x.shape[:1]:
            shapes = f"{list(x.shape)}, {list(noise.shape)}, {list(t.shape)}"
            raise UserError(f"interpolate needs x and noise of one shape [N, ...] and t [N], not {shapes}")
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t.reshape(-1, *[1] * (x.dim() - 1)))
        return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def as_path(path: Path | str) -> Path:
    return path if isinstance(path, Path) else Path(path)
