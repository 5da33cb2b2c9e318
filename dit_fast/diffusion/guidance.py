"""Classifier-free guidance with an interval: v = v_null + scale (v_label - v_null) while low <= t <= high."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dit_fast.errors import UserError
from dit_fast.tree import Tree, each, image, leaves

Channels = Literal["all", "first_three"]


@dataclass(frozen=True)
class Guidance:
    """Scale, closed interval of times, and the channels that are guided.

    scale: any finite number. 1 is the label's velocity alone, with one model row per sample; 0 is the null label's;
    between them lies a mixture, above 1 an extrapolation, below 0 one away from the label.
    channels: "first_three" guides channels 0 to 2 and leaves the others at the label's velocity, as the released
    samplers of DiT, SiT and LightningDiT do.
    class_token_scale: of the class token, where one is sampled with the image (REG); None is the image's scale.
    Sources: Ho & Salimans (arXiv 2207.12598); Kynkäänniemi et al. (arXiv 2404.07724) for the interval.
    Raises UserError for a scale that is not finite, times outside [0, 1] or swapped, and unknown channels.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    channels: Channels = "all"
    class_token_scale: float | None = None

    def __post_init__(self) -> None:
        for name, scale in (("cfg_scale", self.scale), ("class_token_cfg_scale", self.token_scale)):
            if not _is_number(scale) or not math.isfinite(scale):
                raise UserError(f"{name}={scale!r} must be a finite number; 1 = no guidance, 0 = without the label")
        for name, value in (("guidance_low", self.low), ("guidance_high", self.high)):
            if not _is_number(value) or not 0 <= value <= 1:
                raise UserError(f"{name}={value!r} must be a time in [0, 1] (0 is data, 1 is noise)")
        if self.low > self.high:
            raise UserError(f"guidance_low={self.low} lies above guidance_high={self.high}; swap them")
        if self.channels not in get_args(Channels):
            raise UserError(f"cfg_channels='{self.channels}' must be one of {', '.join(get_args(Channels))}")

    @property
    def token_scale(self) -> float:
        return self.scale if self.class_token_scale is None else self.class_token_scale

    @property
    def needs_null(self) -> bool:
        return self.scale != 1 or self.token_scale != 1

    def active(self, t: float) -> bool:
        return self.needs_null and self.low <= t <= self.high

    def combine(self, label: Tree, null: Tree) -> Tree:
        """The guided velocity from those of the label and of the null label."""
        if isinstance(label, Tensor):
            return self._guided("image", label, image(null))
        return {name: self._guided(name, leaf, leaves(null)[name]) for name, leaf in label.items()}

    def _guided(self, name: str, label: Tensor, null: Tensor) -> Tensor:
        guided = null + (self.token_scale if name == "class_token" else self.scale) * (label - null)
        if self.channels == "first_three" and name == "image":
            return torch.cat((guided[:, :3], label[:, 3:]), dim=1)
        return guided


class Velocity:
    """A model's velocity for labels y [N] as a float64 function v(x, t, s) of a float64 state, guided or not.

    model(x, t, y) is called in the dtype of its parameters (t in at least float32); a callable without parameters gets
    float64. times: 1 gives the model t [N]; 2 gives it [N, 2] = (t, s), and what it returns is the mean velocity.
    Whether a step between t and s is guided is decided by its noisier end, as published (REPA). With guidance the batch
    is doubled, [labels; null], and the null label is `model.null_label`; a model whose null_label is negative has none,
    and guidance is refused (UserError).
    """

    def __init__(self, model: Callable[..., Tree], y: Tensor, guidance: Guidance, times: int = 1):
        self.model, self.y, self.guidance, self.times = model, y, guidance, times
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.dtype = torch.float64 if parameter is None else parameter.dtype
        self.null_label: int = getattr(model, "null_label", -1)
        if guidance.needs_null and self.null_label < 0:
            raise UserError(
                f"cfg_scale={guidance.scale} needs a model with a trained null_label; this {type(model).__name__} has "
                "none (label dropout 0 trains none); use cfg_scale=1"
            )

    def __call__(self, x: Tree, t: float, s: float) -> Tree:
        """float64 velocity, shapes of x, at time t of a step between t and s."""
        if not self.guidance.active(max(t, s)):
            return self._evaluate(x, t, s, self.y)
        y = torch.cat((self.y, torch.full_like(self.y, self.null_label)))
        both = self._evaluate(each(lambda leaf: torch.cat((leaf, leaf)), x), t, s, y)
        label, null = (each(lambda leaf, half=half: leaf.chunk(2)[half], both) for half in (0, 1))
        return self.guidance.combine(label, null)

    def _evaluate(self, x: Tree, t: float, s: float, y: Tensor) -> Tree:
        wide = torch.promote_types(self.dtype, torch.float32)
        times = [torch.full(y.shape, time, dtype=wide, device=y.device) for time in (t, s)[: self.times]]
        value = self.model(
            each(lambda leaf: leaf.to(self.dtype), x), torch.stack(times, dim=1) if self.times == 2 else times[0], y
        )
        if shapes_of(value) != shapes_of(x):
            raise UserError(f"the model returned {described(value)} for a state {described(x)}; it must be a velocity")
        return each(lambda leaf: leaf.double(), value)


def described(value: object) -> str:
    """Dtype and shape of a tensor or of a tree's leaves, the type of anything else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, dict) and all(isinstance(leaf, Tensor) for leaf in value.values()):
        return "{" + ", ".join(f"{name}: {described(leaf)}" for name, leaf in value.items()) + "}"
    return f"a {type(value).__name__}"


def shapes_of(value: object) -> object:
    """The shape of a tensor, those of a tree's leaves by name, None of anything else."""
    if isinstance(value, dict):
        return {name: shapes_of(leaf) for name, leaf in value.items()}
    return list(value.shape) if isinstance(value, Tensor) else None


def _is_number(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:  # a whole number beyond all floats
        return False
    return True
