"""Paths from data (t = 0) to noise (t = 1): x_t = alpha(t) x + sigma(t) noise, with velocity v = dx_t/dt."""

from typing import Literal, get_args

import torch
from torch import Tensor

from dit_fast.errors import UserError
from dit_fast.ops.flow_reference import Coefficients, path_coefficients

PathName = Literal["linear", "cosine", "vp"]
BETA = (0.1, 20.0)  # of the noise schedule of "vp" at its two ends


class Path:
    """A path by name:

    "linear": alpha = 1 - t, sigma = t. "cosine" (GVP): alpha = cos(pi t/2), sigma = sin(pi t/2). "vp" (variance
    preserving, beta from 0.1 to 20): alpha = exp(-19.9 t^2/4 - t/20), sigma = sqrt(1 - alpha^2), whose derivative is
    infinite at t = 0.

    Source: SiT (arXiv 2401.08740), Sec. 2 and App. B, with time running from data to noise as in REPA. Any other name
    raises UserError.
    """

    NAMES = get_args(PathName)

    def __init__(self, name: PathName | str):
        if name not in self.NAMES:
            raise UserError(f"unknown path '{name}'; valid: {', '.join(self.NAMES)}")
        self.name = name

    def __repr__(self) -> str:
        return f"Path({self.name!r})"

    def coefficients(self, t: float | Tensor) -> Coefficients:
        """alpha(t), sigma(t) and derivatives, for a float or a tensor of times in [0, 1]."""
        if self.name != "vp":
            return path_coefficients(self.name, t)
        if isinstance(t, Tensor):
            return _variance_preserving(t)
        return Coefficients(*map(float, _variance_preserving(torch.tensor(t, dtype=torch.float64))))

    def interpolate(self, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, v), each [N, ...], for data and noise of that shape and times t [N]; in their common dtype."""
        if x.shape != noise.shape or t.shape != x.shape[:1]:
            shapes = f"{list(x.shape)}, {list(noise.shape)}, {list(t.shape)}"
            raise UserError(f"interpolate needs x and noise of one shape [N, ...] and t [N], not {shapes}")
        wide = t.to(torch.promote_types(t.dtype, x.dtype))
        alpha, sigma, d_alpha, d_sigma = self.coefficients(along(wide, x))
        return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def along(values: Tensor, like: Tensor) -> Tensor:
    """[N] as [N, 1, ...], beside `like` [N, ...]."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def as_path(path: Path | str) -> Path:
    return path if isinstance(path, Path) else Path(path)


def _variance_preserving(t: Tensor) -> Coefficients:
    """alpha = exp(L): L = -(b - a) t^2/4 - a t/2 is minus half the integral of beta from 0 to t."""
    low, high = BETA
    log_alpha, rate = -(high - low) / 4 * t * t - low / 2 * t, -(high - low) / 2 * t - low / 2
    alpha, sigma = torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))
    return Coefficients(alpha, sigma, rate * alpha, -rate * alpha.square() / sigma)
