"""Guidance with intervals, and the velocity of a model.

internal (arXiv 2512.24176), first:   v = v_aux + ig_scale (v - v_aux), for each label and the null label
classifier-free, on those:            v = v_null + scale (v_label - v_null)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from dit_fast.diffusion.conversions import T_EPS, Prediction, convert, field_range, finite_at
from dit_fast.diffusion.paths import Path, as_path
from dit_fast.errors import UserError
from dit_fast.models import Output, split
from dit_fast.tree import Tree, each, image, label, leaves, relabelled

Channels = Literal["all", "first_three"]
Bounds = Literal["inclusive", "exclusive"]
Decision = Literal["first", "each"]


@dataclass(frozen=True)
class Guidance:
    """Scale, interval of times, and the channels that are guided; the same of internal guidance.

    scale: any finite number. 1 is the label's velocity alone, with one model row per sample; 0 is the null label's;
    between them lies a mixture, above 1 an extrapolation, below 0 one away from the label.
    channels: "first_three" guides channels 0 to 2 and leaves the others at the label's velocity, as the released
    samplers of DiT, SiT and LightningDiT do.
    class_token_scale: of the class token, where one is sampled with the image (REG); None is the image's scale.
    bounds: "inclusive", low <= t <= high (REPA, to the last bit), or "exclusive", low < t < high, where high = 1 is no
    bound (JiT); compared as published, 1 - t in float32, so that a rounded time lies on its edge.
    decision: whether an evaluation is guided is decided by the "first" of its step, at the noisier end (REPA), or by
    "each" for itself (JiT).
    ig_scale: of internal guidance, from a model's second output to its first, on all channels and leaves: any finite
    number, where 1 is the first alone, 0 the second, and between them lies a mixture. It acts for ig_low <= t and
    t <= ig_high, both included; `decision` holds for it, too.
    Sources: Ho & Salimans (arXiv 2207.12598); Kynkäänniemi et al. (arXiv 2404.07724) for the interval.
    Raises UserError for a scale that is not finite, times outside [0, 1] or swapped, and unknown channels.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    channels: Channels = "all"
    class_token_scale: float | None = None
    bounds: Bounds = "inclusive"
    decision: Decision = "first"
    ig_scale: float = 1.0
    ig_low: float = 0.0
    ig_high: float = 1.0

    def __post_init__(self) -> None:
        for name, scale in (("cfg_scale", self.scale), ("class_token_cfg_scale", self.token_scale)):
            if not is_number(scale) or not math.isfinite(scale):
                raise UserError(f"{name}={scale!r} must be a finite number; 1 = no guidance, 0 = without the label")
        if not is_number(self.ig_scale) or not math.isfinite(self.ig_scale):
            raise UserError(f"ig_scale={self.ig_scale!r} must be a finite number; 1 = no internal guidance")
        for prefix, low, high in (("guidance", self.low, self.high), ("ig", self.ig_low, self.ig_high)):
            for name, value in ((f"{prefix}_low", low), (f"{prefix}_high", high)):
                if not is_number(value) or not 0 <= value <= 1:
                    raise UserError(f"{name}={value!r} must be a time in [0, 1] (0 is data, 1 is noise)")
            if low > high:
                raise UserError(f"{prefix}_low={low} lies above {prefix}_high={high}; swap them")
        for name, choice, kind in (
            ("cfg_channels", self.channels, Channels),
            ("guidance_bounds", self.bounds, Bounds),
            ("heun_guidance", self.decision, Decision),
        ):
            if choice not in get_args(kind):
                raise UserError(f"{name}='{choice}' must be one of {', '.join(get_args(kind))}")

    @property
    def token_scale(self) -> float:
        return self.scale if self.class_token_scale is None else self.class_token_scale

    @property
    def needs_null(self) -> bool:
        return self.scale != 1 or self.token_scale != 1

    def active(self, t: float, s: float) -> bool:
        """Whether an evaluation at time t of a step, whose other end is s, is guided."""
        time = self._time(t, s)
        if self.bounds == "inclusive":
            return self.needs_null and self.low <= time <= self.high
        now, low, high = torch.tensor(
            [1 - time, 1 - self.low, 1 - self.high], dtype=torch.float32, device="cpu"
        ).tolist()
        return self.needs_null and now < low and (self.high == 1 or high < now)

    def extrapolated(self, first: Tree, second: Tree | None, t: float, s: float) -> Tree:
        """What internal guidance makes of a model's outputs, float64, in an evaluation as for `active`."""
        if self.ig_scale == 1 or not self.ig_low <= self._time(t, s) <= self.ig_high:
            return each(Tensor.double, first)
        if second is None:
            raise UserError(f"ig_scale={self.ig_scale} needs a second output of the model, which returned one; use 1")
        return each(lambda a, b: b.double() + self.ig_scale * (a.double() - b.double()), first, second)

    def _time(self, t: float, s: float) -> float:
        return max(t, s) if self.decision == "first" else t

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


class Guided(ABC):
    """A model's field for labels y [N] as a float64 function (x, t, s) of a float64 state, guided or not.

    y may be conditions by name, {"label": [N], ...}, of which guidance replaces the label alone.

    model(x, t, y) is called in the dtype of its parameters; a callable without parameters gets float64. Whether an
    evaluation is guided: `Guidance.active`. With guidance the batch is doubled, [labels; null]. The null label is
    null_label, or `model.null_label`; where that is negative or absent there is none, and guidance is refused
    (UserError).
    """

    unit: ClassVar[float] = 1.0  # the time of pure noise

    def __init__(self, model: Callable[..., Output], y: Tree, guidance: Guidance, null_label: int | None = None):
        check_internal(guidance.ig_scale, model)
        self.model, self.y, self.guidance = model, y, guidance
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.dtype = torch.float64 if parameter is None else parameter.dtype
        self.null_label: int = getattr(model, "null_label", -1) if null_label is None else null_label
        if guidance.needs_null and self.null_label < 0:
            raise UserError(
                f"cfg_scale={guidance.scale} needs a model with a trained null_label; this {type(model).__name__} has "
                "none (label dropout 0 trains none; for a plain function give null_label=); use cfg_scale=1"
            )

    def __call__(self, x: Tree, t: float, s: float) -> Tree:
        """The float64 field at time t of a step between t and s."""
        if not self.guidance.active(t / self.unit, s / self.unit):
            return self.evaluate(x, t, s, self.y)
        free = torch.full_like(label(self.y), self.null_label)
        y = each(lambda ours, theirs: torch.cat((ours, theirs)), self.y, relabelled(self.y, free))
        both = self.evaluate(each(lambda leaf: torch.cat((leaf, leaf)), x), t, s, y)
        guided, null = (each(lambda leaf, half=half: leaf.chunk(2)[half], both) for half in (0, 1))
        return self.combine(guided, null)

    @abstractmethod
    def evaluate(self, x: Tree, t: float, s: float, y: Tree) -> Tree:
        """The field of labels y, float64, unguided."""

    def combine(self, label: Tree, null: Tree) -> Tree:
        return self.guidance.combine(label, null)


class Velocity(Guided):
    """A model's velocity, shapes of x, at time t of a step between t and s.

    times: 1 gives the model t [N], in at least float32; 2 gives it [N, 2] = (t, s), and what it returns is a mean
    velocity, or an x from which that is made. prediction: what the model returns, on this path; made a velocity in
    float64 (`conversions.convert`; t_eps is for x). Raises UserError at a time at which the velocity would be infinite.
    """

    def __init__(
        self,
        model: Callable[..., Output],
        y: Tree,
        guidance: Guidance,
        times: int = 1,
        prediction: Prediction = "velocity",
        path: Path | str = "linear",
        t_eps: float = T_EPS,
        null_label: int | None = None,
    ):
        super().__init__(model, y, guidance, null_label)
        self.times, self.prediction, self.path, self.t_eps = times, prediction, as_path(path), t_eps
        if times == 2 and prediction not in ("velocity", "x"):
            raise UserError(f"prediction '{prediction}' is not of a mean velocity; valid: velocity, x")

    def evaluate(self, x: Tree, t: float, s: float, y: Tree) -> Tree:
        wide, labels = torch.promote_types(self.dtype, torch.float32), label(y)
        times = [torch.full(labels.shape, time, dtype=wide, device=labels.device) for time in (t, s)[: self.times]]
        output = self.model(
            each(lambda leaf: leaf.to(self.dtype), x),
            torch.stack(times, dim=1) if self.times == 2 else times[0],
            each(lambda leaf: leaf.to(wide) if leaf.is_floating_point() else leaf, y),
        )
        value, second = split(output)
        if shapes_of(value) != shapes_of(x) or (second is not None and shapes_of(second) != shapes_of(x)):
            raise UserError(
                f"the model returned {described(output)} for a state {described(x)}; it must be a {self.prediction} of "
                "that shape"
            )
        value = self.guidance.extrapolated(value, second, t, s)  # what makes a velocity of it is affine
        if self.prediction == "velocity":
            return value
        if not finite_at(t, self.path, self.prediction, "velocity", self.t_eps):
            noisy, clean = field_range(self.path, self.prediction)
            raise UserError(
                f"the velocity of a prediction '{self.prediction}' is infinite at t={t} on the {self.path.name} path; "
                f"stay within time_range=({noisy}, {clean})"
            )
        return each(lambda leaf, state: self._velocity(leaf, state, t), value, x)

    def _velocity(self, value: Tensor, x: Tensor, t: float) -> Tensor:
        return convert(value, x, t, self.path, self.prediction, "velocity", self.t_eps)


def check_internal(scale: float, model: object) -> None:
    """Raises UserError for internal guidance of a model without an auxiliary output; a plain function passes."""
    if scale != 1 and (getattr(model, "outputs", 2), getattr(model, "times", 1)) != (2, 1):
        raise UserError(
            f"ig_scale={scale} extrapolates from an auxiliary output, and this {type(model).__name__} has none; train "
            "it with methods=internal_guidance, or use ig_scale=1"
        )


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


def is_number(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:  # a whole number beyond all floats
        return False
    return True
