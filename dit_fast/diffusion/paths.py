"""Paths from data (t = 0) to noise (t = 1): x_t = alpha(t) x + sigma(t) noise, with velocity v = dx_t/dt."""

from typing import Literal

from torch import Tensor

from dit_fast.errors import UserError
from dit_fast.ops.flow_reference import PATHS, Coefficients, path_coefficients


class Path:
    """The "linear" path (alpha = 1 - t, sigma = t) or the "cosine" path (alpha = cos(pi t/2), sigma = sin(pi t/2)).

    Source: SiT (arXiv 2401.08740), Sec. 2, with time running from data to noise as in REPA. Any other name raises
    UserError.
    """

    NAMES = PATHS

    def __init__(self, name: Literal["linear", "cosine"] | str):
        if name not in self.NAMES:
            raise UserError(f"unknown path '{name}'; valid: {', '.join(self.NAMES)}")
        self.name = name

    def __repr__(self) -> str:
        return f"Path({self.name!r})"

    def coefficients(self, t: float | Tensor) -> Coefficients:
        """alpha(t), sigma(t) and derivatives, for a float or a tensor of times in [0, 1]."""
        return path_coefficients(self.name, t)

    def interpolate(self, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, v), each [N, ...], for data and noise of that shape and times t [N]; in their common dtype."""
        if x.shape != noise.shape or t.shape != x.shape[:1]:
            shapes = f"{list(x.shape)}, {list(noise.shape)}, {list(t.shape)}"
            raise UserError(f"interpolate needs x and noise of one shape [N, ...] and t [N], not {shapes}")
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t.reshape(-1, *[1] * (x.dim() - 1)))
        return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def as_path(path: Path | str) -> Path:
    return path if isinstance(path, Path) else Path(path)
