"""Distributions of the training time t in (0, 1): one formula for draws from a generator and for keyed draws."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_fast.diffusion.guidance import is_number
from dit_fast.diffusion.paths import Path, as_path
from dit_fast.errors import UserError
from dit_fast.ops.draws import Key
from dit_fast.philox import Stream


@dataclass(frozen=True)
class TimeSampler:
    """t = transform(z) with z standard uniform or standard normal."""

    source: Literal["uniform", "normal"]
    transform: Callable[[Tensor], Tensor]

    def sample(
        self, count: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """float32 [count] on `device`, drawn on the generator's device (torch's own generator if None)."""
        draw = torch.rand if self.source == "uniform" else torch.randn
        origin = device if generator is None else generator.device
        return self.transform(draw(count, generator=generator, device=origin).to(device))

    def keyed(self, key: Key, stream: int = Stream.TIME) -> Tensor:
        """float32 [N], a function of (seed, position, stream) alone."""
        draw = key.uniform if self.source == "uniform" else key.normal
        return self.transform(draw(stream, ()))


def uniform() -> TimeSampler:
    """t uniform in [0, 1)."""
    return TimeSampler("uniform", lambda u: u)


def logit_normal(mean: float = 0.0, std: float = 1.0) -> TimeSampler:
    """t = sigmoid(mean + std z), z standard normal (Esser et al., arXiv 2403.03206, Sec. 3.1)."""
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise UserError(f"logit_normal needs a finite mean and a positive std, not mean={mean}, std={std}")
    return TimeSampler("normal", lambda z: torch.sigmoid(mean + std * z))


def lognormal(path: Path | str = "linear") -> TimeSampler:
    """The published "lognormal": s = exp(z), then t = s / (1 + s) (linear path) or (2/pi) atan(s) (cosine path)."""
    name = as_path(path).name
    if name == "linear":
        return logit_normal(0.0, 1.0)
    if name != "cosine":
        raise UserError(f"time sampler 'lognormal' is published for the paths linear and cosine, not for '{name}'")
    return TimeSampler("normal", lambda z: 2 / math.pi * torch.atan(torch.exp(z)))


def time_sampler(name: str, path: Path | str = "linear", mean: float = 0.0, std: float = 1.0) -> TimeSampler:
    """The sampler of a configuration: "uniform", "lognormal" (depends on the path) or "logit_normal" (mean, std)."""
    if name == "uniform":
        return uniform()
    if name == "lognormal":
        return lognormal(path)
    if name == "logit_normal":
        return logit_normal(mean, std)
    raise UserError(f"unknown time sampler '{name}'; valid: uniform, lognormal, logit_normal")


def check_shift(shift: float) -> None:
    """Raises UserError unless it is a finite number above 0."""
    if not is_number(shift) or not 0 < shift < math.inf:
        raise UserError(f"time_shift={shift!r} must be a finite number above 0; 1 = no shift")


BASE_DIMENSION = 4096  # where times stay: latents of 4 x 32 x 32


def dimension_shift(shape: Sequence[int]) -> float:
    """sqrt(C H W / 4096) for latents of this shape (C, H, W): so many numbers keep a signal in more noise.

    `shift_times` by it gives x_t of any dimension the signal that 4096 numbers have (RAE, arXiv 2510.11690; Esser et
    al., arXiv 2403.03206, Sec. 5.3.2).
    """
    return math.sqrt(math.prod(shape) / BASE_DIMENSION)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """shift t / (1 + (shift - 1) t) for t in [0, 1], above 1 towards the noise (Esser et al., arXiv 2403.03206).

    The inverse has 1 / shift. Raises UserError as `check_shift`.
    """
    check_shift(shift)
    return shift * t / (1 + (shift - 1) * t)
