"""Classifier-free guidance with an interval: v = v_null + scale (v_label - v_null) while low <= t <= high."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dit_fast.errors import UserError


@dataclass(frozen=True)
class Guidance:
    """Scale and closed interval of times. A scale of 1 or less is no guidance at all: one model row per sample.

    Sources: Ho & Salimans (arXiv 2207.12598); Kynkäänniemi et al. (arXiv 2404.07724) for the interval.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise UserError(f"guidance_low={self.low} lies above guidance_high={self.high}; swap them")

    def active(self, t: float) -> bool:
        return self.scale > 1 and self.low <= t <= self.high


class Velocity:
    """The model's velocity as a float64 function of a float64 state, guided or not.

    model(x, t, y) is called in the dtype of its parameters (t in at least float32); a callable without parameters gets
    float64. With guidance the batch is doubled, [labels; null], and the null label is `model.null_label`.
    """

    def __init__(self, model: Callable[[Tensor, Tensor, Tensor], Tensor], guidance: Guidance):
        self.model, self.guidance = model, guidance
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.dtype = torch.float64 if parameter is None else parameter.dtype
        self.null_label: int = getattr(model, "null_label", -1)
        if guidance.scale > 1 and self.null_label < 0:
            raise UserError(
                f"cfg_scale={guidance.scale} needs a model with a null_label; {type(model).__name__} has none"
            )

    def __call__(self, x: Tensor, t: float, y: Tensor, guided: bool) -> Tensor:
        """float64 velocity, shape of x [N, ...], at time t for labels y [N]."""
        if not guided:
            return self._evaluate(x, t, y)
        null = torch.full_like(y, self.null_label)
        label, unlabelled = self._evaluate(torch.cat((x, x)), t, torch.cat((y, null))).chunk(2)
        return unlabelled + self.guidance.scale * (label - unlabelled)

    def _evaluate(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        times = torch.full((len(x),), t, dtype=torch.promote_types(self.dtype, torch.float32), device=x.device)
        return self.model(x.to(self.dtype), times, y).double()
