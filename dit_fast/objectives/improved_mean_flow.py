"""Improved mean flow (arXiv 2512.02012): mean flow whose derivative follows the network's own velocity.

As in mean flow v = u + (t - r) du/dt, but along what the network gives for v, not along the data's: then

    V = u(z, t, r) + (t - r) stop(du/dt),       du/dt along (v_label, 1, 0) in (z, t, r),

is a function of what the network sees, and |V - v|^2 an ordinary regression of the velocity. v_label is a second output
of the network (its velocity head, published code) or u(z, t, t), the mean over no time (its boundary, the paper's Alg.
1). Guidance is in the target, as conditions that the network is told, so that a sampler chooses them:

    v -> v + (1 - 1/w) (v_label - v_null),      w = omega where t_min <= t <= t_max, else 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dit_fast.diffusion import Path, logit_normal, sample
from dit_fast.diffusion.checks import check_order, readable
from dit_fast.diffusion.guidance import is_number
from dit_fast.diffusion.paths import along
from dit_fast.errors import ConfigError, UserError
from dit_fast.models import Backbone, Output, Taps, guidance_conditions, split
from dit_fast.objectives.base import Context, noise_for
from dit_fast.objectives.mean_flow import (
    MeanVelocity,
    Network,
    check_samples,
    normalised,
    squared_error,
    total_derivative,
    trained_null_label,
)
from dit_fast.ops.draws import Key
from dit_fast.options import check_choice, setting
from dit_fast.philox import Stream
from dit_fast.tree import Tree, each, leaves

Number = float | Tensor  # one for all samples, or [N]


class ImprovedMeanFlowLosses(NamedTuple):
    """u, v, dudt, velocity, target: like the data. velocity: v_label, along which du/dt is taken; v: of the head at (t,
    r), at the boundary the same as velocity. squared_error, squared_error_velocity: of V and v, [N], summed over C, H,
    W (there is no second one at the boundary). loss: [N], normalised, both together.
    """

    u: Tree
    v: Tree
    dudt: Tree
    velocity: Tree
    target: Tree
    squared_error: Tree
    squared_error_velocity: Tree | None
    loss: Tensor


def improved_mean_flow_losses(
    model: Network,
    x: Tree,
    y: Tensor,
    t: Tensor,
    r: Tensor,
    noise: Tree,
    velocity: Literal["head", "boundary"] = "head",
    omega: Number | None = None,
    t_min: Number = 0.0,
    t_max: Number = 1.0,
    dropped: Tensor | None = None,
    null_label: int | None = None,
    norm_p: float = 1.0,
    norm_eps: float = 0.01,
) -> ImprovedMeanFlowLosses:
    """Losses of a mean velocity on the linear path.

    model(z, times [N, 2] = (t, r), y) returns u like z, or (u, v) for velocity "head". y is then {"label", "omega",
    "t_min", "t_max"} with [N] each, at the boundary the labels alone; a `Backbone` gets what its configuration says.
    x, noise [N, C, H, W], or dictionaries of tensors [N, ...] of which "image" is one (then errors have an entry for
    each, and loss is the image's); y [N] int64; t, r [N] in [0, 1], r <= t.
    omega: scale of the guidance, above 0; None: no guidance, of which the model is told omega 1. t_min, t_max: the
    interval with guidance. dropped: bool [N], samples that learn with the null label and the data's velocity; as
    published, their du/dt follows the velocity of the label that they had. null_label: by default `model.null_label`.
    loss = error / stop(error + norm_eps)^norm_p, with the head's on top. No gradient flows through velocity, target
    and du/dt. Source: Alg. 1 and 2 of the paper, and its code. Raises UserError for shapes, labels, times and options
    that do not fit (values of tensors are looked at on a CPU alone).
    """
    check_choice("velocity", velocity, Literal["head", "boundary"])
    check_samples(model, x, y, t, r, dropped)
    head, guides = velocity == "head", omega is not None and not (is_number(omega) and omega == 1)
    scale = _each_sample("omega", 1.0 if omega is None else omega, t)
    low, high = _each_sample("t_min", t_min, t), _each_sample("t_max", t_max, t)
    check_order(("t_min", low), ("t_max", high))
    told = getattr(getattr(model, "config", None), "guidance_condition", head)
    for name, bound, end in (("t_min", t_min, 0), ("t_max", t_max, 1)):
        if omega is None and not told and not (is_number(bound) and bound == end):
            raise UserError(f"{name} is of guidance, omega is None and the model is told none; give omega=, or drop it")
    null = None if not guides and dropped is None else torch.full_like(y, trained_null_label(model, null_label))
    z, data = (each(lambda a, b, k=k: Path("linear").interpolate(a, b, t)[k], x, noise) for k in (0, 1))

    weight = torch.where((t >= low) & (t <= high), scale, 1.0)
    label, target = guided_target(model, data, z, t, y, null if guides else None, weight, head, told, dropped)
    y = y if dropped is None or null is None else torch.where(dropped.bool(), null, y)
    given = guidance_conditions(y, scale, low, high) if told else y
    u, v = outputs(model(z, torch.stack((t, r), 1), given), head)
    dudt = total_derivative(model, z, label, t, r, given)
    errors = squared_errors(u, v, dudt, target, t, r)
    loss = summed_losses(errors, norm_p, norm_eps)["image"]
    return ImprovedMeanFlowLosses(u, label if v is None else v, dudt, label, target, *errors, loss)


@torch.no_grad()
def guided_target(
    model: Network,
    data: Tree,
    z: Tree,
    t: Tensor,
    y: Tensor,
    null: Tensor | None,
    weight: Tensor,
    head: bool,
    told: bool,
    dropped: Tensor | None = None,
) -> tuple[Tree, Tree]:
    """(v_label, data + (1 - 1/weight) (v_label - v_null)), both like z, from one forward each.

    v_label is told weight [N] and v_null 1, over all times. null: null labels; None: no guidance, v_label alone. Where
    dropped, the target is the data's velocity.
    """
    times = torch.stack((t, t), 1)

    def predicted(labels: Tensor, omega: Tensor) -> Tree:
        u, v = outputs(model(z, times, guidance_conditions(labels, omega) if told else labels), head)
        return u if v is None else v

    label = predicted(y, weight)
    if null is None:
        return label, data
    share = 1 - 1 / weight
    if dropped is not None:
        share = share.masked_fill(dropped.bool(), 0)
    guided = lambda v, a, b: v + along(share, v).to(v.dtype) * (a - b)  # noqa: E731
    return label, each(guided, data, label, predicted(null, torch.ones_like(weight)))


def outputs(output: Output, head: bool) -> tuple[Tree, Tree | None]:
    """(u, v) of what a network returned; v is None unless it has a velocity head. Raises UserError without a second
    output where that is its head.
    """
    u, v = split(output)
    if head and v is None:
        raise UserError("velocity='head' needs a network that returns (u, v); use velocity='boundary' for u alone")
    return u, v if head else None


def squared_errors(u: Tree, v: Tree | None, dudt: Tree, target: Tree, t: Tensor, r: Tensor) -> tuple[Tree, Tree | None]:
    """Of V = u + (t - r) du/dt and of v, each summed over all but the first dimension, [N] in at least float32."""
    return squared_error(u, dudt, target, t, r), None if v is None else squared_error(v, dudt, target, t, t)


def summed_losses(errors: tuple[Tree, Tree | None], norm_p: float, norm_eps: float) -> dict[str, Tensor]:
    """The normalised errors of V and v together, [N] by leaf."""
    named = [leaves(error) for error in errors if error is not None]
    parts = {name: [normalised(error[name], norm_p, norm_eps) for error in named] for name in named[0]}
    return {name: torch.stack(values).sum(0) for name, values in parts.items()}


def interval_times(
    normals_t: Tensor, normals_r: Tensor, mean: float = -0.4, std: float = 1.0, data_proportion: float = 0.5
) -> tuple[Tensor, Tensor]:
    """t >= r, [N], from standard normals [N]: both through sigmoid(mean + std n), in order.

    As published, r = t for the first int(N data_proportion) samples, which have guidance at all times (t_min 0, t_max
    1). In a run that is drawn for each sample instead. Raises UserError for shapes and numbers out of range.
    """
    if normals_t.dim() != 1 or normals_r.shape != normals_t.shape:
        raise UserError(f"interval_times needs normals [N] twice, not {[*normals_t.shape]} and {[*normals_r.shape]}")
    if not is_number(data_proportion) or not 0 <= data_proportion <= 1:
        raise UserError(f"data_proportion={data_proportion!r} must lie in [0, 1]")
    first, second = map(logit_normal(mean, std).transform, (normals_t, normals_r))
    t = torch.maximum(first, second)
    agree = torch.arange(len(t), dtype=torch.int64, device=t.device) < int(len(t) * data_proportion)
    return t, torch.where(agree, t, torch.minimum(first, second))


def guidance_scale(uniform: Tensor, beta: float = 1.0, maximum: float = 7.0) -> Tensor:
    """omega in [1, 1 + maximum], like `uniform` in [0, 1): its density falls as omega^-beta.

    Raises UserError for a maximum that is not above 0 and a beta that is not finite.
    """
    if not is_number(maximum) or not 0 < maximum < math.inf or not is_number(beta) or not math.isfinite(beta):
        raise UserError(f"guidance_scale needs a finite beta and a maximum above 0, not beta={beta}, maximum={maximum}")
    span = math.log1p(maximum)
    if beta == 1:
        return torch.exp(uniform * span)
    return torch.exp(torch.log1p(uniform * math.expm1((1 - beta) * span)) / (1 - beta))


def improved_mean_flow_sample(
    model: Network,
    start: Tree,
    y: Tensor,
    num_steps: int = 1,
    omega: Number | None = None,
    t_min: Number = 0.0,
    t_max: Number = 1.0,
) -> Tree:
    """Latents float64, like start, from noise [N, C, H, W] and labels y [N]: z - (t - r) u in equal steps from 1 to 0.

    omega, t_min, t_max: guidance and its interval, which the model is told; numbers or [N]. omega None: labels alone,
    for a model that is told none. The same as `sample(sampler="mean_flow")` with y = {"label", "omega", "t_min",
    "t_max"}. Raises UserError as that does, and for an omega that is not above 0.
    """
    given: Tree = y
    if omega is not None:
        told, labels = {"omega": omega, "t_min": t_min, "t_max": t_max}, torch.zeros_like(y, dtype=torch.float64)
        given = guidance_conditions(y, **{name: _each_sample(name, value, labels) for name, value in told.items()})
    return sample(model, start, given, "mean_flow", num_steps)


def _each_sample(name: str, value: Number, t: Tensor) -> Tensor:
    """A number or [N] as [N], in at least the dtype of t [N]."""
    if not isinstance(value, Tensor) and is_number(value):
        if not math.isfinite(value) or (name == "omega" and value <= 0):
            raise UserError(f"{name}={value} must be a finite number" + ", above 0" * (name == "omega"))
        return torch.full_like(t, value)
    if not isinstance(value, Tensor) or value.shape not in (t.shape, ()):
        raise UserError(f"{name} must be a number or a tensor {list(t.shape)}, one for each sample")
    if readable(value) and not bool((value.isfinite() & ((value > 0) | (name != "omega"))).all()):
        raise UserError(f"{name} must hold finite numbers" + ", above 0" * (name == "omega"))
    return value.to(torch.promote_types(t.dtype, value.dtype)).expand(t.shape)


class ImprovedMeanFlow(MeanVelocity):
    """Normalised squared error of V, and of the velocity head where the model has one.

    A model with `guidance_condition` is told an omega and an interval that are drawn for each sample, another has those
    of the configuration in its target. Each sample's draws are functions of its position alone.
    """

    name = "improved_mean_flow"
    title = "improved mean flow"

    @dataclass(frozen=True, kw_only=True)
    class Config(MeanVelocity.Config):
        """What guidance is drawn, the two times, and how the errors are normalised."""

        name: ClassVar[str] = "improved_mean_flow"
        beta: float = setting(1.0, "The density of a drawn omega falls as omega^-beta (guidance_condition)", "[0, 100]")
        maximum: float = setting(7.0, "A drawn omega lies in 1 .. 1 + maximum (guidance_condition)", "(0, 1000]")
        omega: float = setting(1.0, "Guidance of the target of a model that is told none; 1 = none", "(0, 1000]")
        data_proportion: float = setting(0.5, "Share of samples with r = t, which learn the velocity", "[0, 1]")

    def __init__(self, config: Config, model: Backbone):
        """Raises ConfigError as above, for guidance without a trained null label, and for one that the model is told
        and that is also fixed.
        """
        super().__init__(config, model)
        self.head, self.told = getattr(model.config, "velocity_head", False), model.guidance_condition
        fixed = (config.omega, config.guidance_low, config.guidance_high) != (1.0, 0.0, 1.0)
        if self.told and fixed:
            raise ConfigError(
                "objective.omega, guidance_low and guidance_high are for a model that is told none; drop them, or "
                "set model.guidance_condition=false"
            )
        if not self.told and (config.beta, config.maximum) != (1.0, 7.0):
            raise ConfigError(
                f"objective.beta={config.beta} and maximum={config.maximum} are for a model that is told its guidance; "
                "set objective.beta=1 objective.maximum=7, or model.guidance_condition=true"
            )
        self.set_guided(self.told or config.omega != 1)
        if self.guided and model.null_label < 0:
            raise ConfigError(
                "objective=improved_mean_flow guides its target with a null label, and model.label_dropout=0 trains "
                "none; set a label dropout, or objective.omega=1 model.guidance_condition=false"
            )

    def run(
        self, model: Backbone, x: Tree, y: Tensor, key: Key, taps: Taps, batch: Mapping[str, Tensor], number: int
    ) -> Context:
        config = self.config
        t, r = self.draw_times(key)
        omega, t_min, t_max = self.draw_guidance(key, t, r)
        z, data = self.interpolate(x, noise_for(x, key), t)
        null = model.null(y) if self.guided else None
        weight, dropped = torch.where((t >= t_min) & (t <= t_max), omega, 1.0), None if null is None else y == null
        label, target = guided_target(model, data, z, t, y, null, weight, self.head, self.told, dropped)
        given: Tree = guidance_conditions(y, omega, t_min, t_max) if self.told else y
        times = torch.stack((t, r), 1)
        u, second = split(model(z, times, given, taps))
        dudt = total_derivative(model, z, label, t, r, given)
        errors = squared_errors(u, second if self.head else None, dudt, target, t, r)
        losses = summed_losses(errors, config.norm_p, config.norm_eps)
        names = ("squared_error", "squared_error_velocity")
        logs = {
            f"{self.name}/{name}": leaves(error)["image"].mean()
            for name, error in zip(names, errors, strict=True)
            if error is not None
        }
        return Context(self, model, x, given, key, times, z, u, losses, taps, batch, number, logs, second)

    def draw_guidance(self, key: Key, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """omega, t_min, t_max, [N] each, which a model is told; otherwise those of the configuration.

        t_min is uniform in [0, 0.5), t_max in [0.5, 1); samples with r = t have guidance at all times, as published.
        """
        config = self.config
        if not self.told:
            fixed = (config.omega, config.guidance_low, config.guidance_high)
            omega, low, high = (torch.full_like(t, value) for value in fixed)
            return omega, low, high
        omega = guidance_scale(key.uniform(Stream.OMEGA, ()), config.beta, config.maximum)
        low, high = key.uniform(Stream.GUIDED_FROM, ()) / 2, 0.5 + key.uniform(Stream.GUIDED_TO, ()) / 2
        return omega, torch.where(r == t, 0.0, low), torch.where(r == t, 1.0, high)
