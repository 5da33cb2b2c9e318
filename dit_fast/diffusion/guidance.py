"""Classifier-free guidance with an interval: v = v_null + scale (v_label - v_null) while low <= t <= high."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dit_fast.errors import UserError

Channels = Literal["all", "first_three"]


@dataclass(frozen=True)
class Guidance:
    """Scale, closed interval of times, and the channels that are guided.

    scale: any finite number. 1 is the label's velocity alone, with one model row per sample; 0 is the null label's;
    between them lies a mixture, above 1 an extrapolation, below 0 one away from the label.
    channels: "first_three" guides channels 0 to 2 and leaves the others at the label's velocity, as the released
    samplers of DiT, SiT and LightningDiT do.
    Sources: Ho & Salimans (arXiv 2207.12598); Kynkäänniemi et al. (arXiv 2404.07724) for the interval.
    Raises UserError for a scale that is not finite, times outside [0, 1] or swapped, and unknown channels.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    channels: Channels = "all"

    def __post_init__(self) -> None:
        if not _is_number(self.scale) or not math.isfinite(self.scale):
            raise UserError(f"cfg_scale={self.scale!r} must be a finite number; 1 = no guidance, 0 = without the label")
        for name, value in (("guidance_low", self.low), ("guidance_high", self.high)):
            if not _is_number(value) or not 0 <= value <= 1:
                raise UserError(f"{name}={value!r} must be a time in [0, 1] (0 is data, 1 is noise)")
        if self.low > self.high:
            raise UserError(f"guidance_low={self.low} lies above guidance_high={self.high}; swap them")
        if self.channels not in get_args(Channels):
            raise UserError(f"cfg_channels='{self.channels}' must be one of {', '.join(get_args(Channels))}")

    @property
    def needs_null(self) -> bool:
        return self.scale != 1

    def active(self, t: float) -> bool:
        return self.needs_null and self.low <= t <= self.high

    def combine(self, label: Tensor, null: Tensor) -> Tensor:
        """The guided velocity [N, C, ...] from those of the label and of the null label."""
        guided = null + self.scale * (label - null)
        return torch.cat((guided[:, :3], label[:, 3:]), dim=1) if self.channels == "first_three" else guided


class Velocity:
    """The model's velocity as a float64 function of a float64 state, guided or not.

    model(x, t, y) is called in the dtype of its parameters (t in at least float32); a callable without parameters gets
    float64. With guidance the batch is doubled, [labels; null], and the null label is `model.null_label`; a model whose
    null_label is negative has none, and guidance is refused (UserError).
    """

    def __init__(self, model: Callable[[Tensor, Tensor, Tensor], Tensor], guidance: Guidance):
        self.model, self.guidance = model, guidance
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.dtype = torch.float64 if parameter is None else parameter.dtype
        self.null_label: int = getattr(model, "null_label", -1)
        if guidance.needs_null and self.null_label < 0:
            raise UserError(
                f"cfg_scale={guidance.scale} needs a model with a trained null_label; this {type(model).__name__} has "
                "none (label dropout 0 trains none); use cfg_scale=1"
            )

    def __call__(self, x: Tensor, t: float, y: Tensor, guided: bool) -> Tensor:
        """float64 velocity, shape of x [N, ...], at time t for labels y [N]."""
        if not guided:
            return self._evaluate(x, t, y)
        null = torch.full_like(y, self.null_label)
        return self.guidance.combine(*self._evaluate(torch.cat((x, x)), t, torch.cat((y, null))).chunk(2))

    def _evaluate(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        times = torch.full((len(x),), t, dtype=torch.promote_types(self.dtype, torch.float32), device=x.device)
        value = self.model(x.to(self.dtype), times, y)
        if not isinstance(value, Tensor) or value.shape != x.shape:
            raise UserError(f"the model returned {described(value)} for a state {list(x.shape)}; it must be a velocity")
        return value.double()


def described(value: object) -> str:
    """Dtype and shape of a tensor, the type of anything else."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _is_number(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:  # a whole number beyond all floats
        return False
    return True
