"""Mean flow (arXiv 2505.13447): the network learns the mean velocity u(z, t, r) between two times.

Along the path dz/dt = v, so (t - r) u = integral of v from r to t, and by differentiation in t

    u = v - (t - r) du/dt,        du/dt = v du/dz + du/dt|_z    (a directional derivative along (v, 1, 0) in (z, t, r)).

The right side, with gradients stopped, is the target. It is got by a pass in forward mode that keeps nothing for a
backward pass; u itself comes from an ordinary forward with fused attention, whose block outputs methods may read. One
pass for both, with gradients through the duals, takes 0.89 of the time and 3.3 times the memory on a CPU (S/2, batch 4:
benchmarks/results/cpu/mean_flow.json), because attention with a tangent keeps its N x H x T x T weights.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dit_fast.diffusion import SOLVERS, Path, logit_normal
from dit_fast.diffusion.checks import check_labels, check_order, check_t_eps, check_unit, path_of, predicted_by
from dit_fast.diffusion.conversions import T_EPS
from dit_fast.diffusion.guidance import described, shapes_of
from dit_fast.diffusion.paths import along
from dit_fast.errors import ConfigError, UserError
from dit_fast.models import Backbone, Output, Taps, split
from dit_fast.objectives.base import Context, Objective, noise_for
from dit_fast.ops.draws import Key
from dit_fast.options import check_choice, setting
from dit_fast.philox import Stream
from dit_fast.tree import Tree, each, image, leaves

Network = Callable[..., Output]  # (z, times [N, 2] = (t, r), y) -> u, or u and a second output


class MeanFlowLosses(NamedTuple):
    """u, dudt: like the data [N, C, H, W]. squared_error [N], summed over C, H, W. loss: 0-d, normalised."""

    u: Tree
    dudt: Tree
    squared_error: Tree
    loss: Tensor


def mean_flow_losses(
    model: Network,
    x: Tree,
    y: Tensor,
    t: Tensor,
    r: Tensor,
    noise: Tree,
    omega: float | None = None,
    kappa: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    dropped: Tensor | None = None,
    null_label: int | None = None,
    prediction: Literal["velocity", "x"] = "velocity",
    t_eps: float = T_EPS,
    norm_p: float = 1.0,
    norm_eps: float = 0.01,
) -> MeanFlowLosses:
    """Losses of a mean velocity on the linear path; model(z, times [N, 2], y) -> like z.

    x, noise [N, C, H, W], or dictionaries of tensors [N, ...] of which "image" is one (then squared_error has an entry
    for each, and loss is the image's); y [N] int64; t, r [N] in [0, 1], r <= t.
    omega, kappa: guidance within the target, v -> omega v + (1 - omega - kappa) v_null + kappa v_label, where the two
    are the network's at r = t and carry no gradient, while interval[0] <= t <= interval[1]; the scale that comes out is
    omega / (1 - kappa). omega None: none. dropped: bool [N], samples that learn with the null label and v. null_label:
    `model.null_label` where not given.
    prediction "x": the network gives clean data, from which u = (z - output) / max(t, t_eps).
    loss = mean of error / stop(error + norm_eps)^norm_p. Differentiable in the model's parameters once.
    Source: Alg. 1 and Eq. 21 of the paper. Raises UserError for shapes, labels, times and options that do not fit, also
    for a kappa or an interval without omega (values of tensors are looked at on a CPU alone).
    """
    check_choice("prediction", prediction, Literal["velocity", "x"])
    check_samples(model, x, y, t, r, dropped, prediction)
    _check_guidance(omega, kappa, interval)
    check_t_eps(t_eps, prediction == "x")
    z = each(lambda data, eps: Path("linear").interpolate(data, eps, t)[0], x, noise)
    if prediction == "x":
        velocity = each(lambda a, data: (a - data) / along(t.clamp(min=t_eps), a), z, x)
        network = _velocity_of_x(model, t_eps)
    else:
        velocity, network = each(torch.sub, noise, x), model
    if omega is not None and (omega, kappa) != (1, 0):
        null = torch.full_like(y, trained_null_label(model, null_label))
        velocity = guided_velocity(network, velocity, z, t, y, null, omega, kappa, interval, dropped)
    if dropped is not None:
        y = torch.where(dropped.bool(), trained_null_label(model, null_label), y)
    u, _ = split(network(z, torch.stack((t, r), 1), y))
    dudt = total_derivative(network, z, velocity, t, r, y)
    error = squared_error(u, dudt, velocity, t, r)
    return MeanFlowLosses(u, dudt, error, normalised(leaves(error)["image"], norm_p, norm_eps).mean())


@torch.no_grad()
def guided_velocity(
    network: Network,
    velocity: Tree,
    z: Tree,
    t: Tensor,
    y: Tensor,
    null: Tensor,
    omega: float,
    kappa: float,
    interval: tuple[float, float] = (0.0, 1.0),
    dropped: Tensor | None = None,
) -> Tree:
    """omega v + (1 - omega - kappa) u(z, t, t, null) + kappa u(z, t, t, y); v outside the interval or dropped."""
    times = torch.stack((t, t), 1)
    guided = each(lambda v, free: omega * v + (1 - omega - kappa) * free, velocity, split(network(z, times, null))[0])
    if kappa:
        guided = each(lambda v, label: v + kappa * label, guided, split(network(z, times, y))[0])
    active = (t >= interval[0]) & (t <= interval[1])
    if dropped is not None:
        active = active & ~dropped.bool()
    return each(lambda new, old: torch.where(along(active, old), new, old), guided, velocity)


@torch.no_grad()
def total_derivative(network: Network, z: Tree, velocity: Tree, t: Tensor, r: Tensor, y: Tree) -> Tree:
    """du/dt along (velocity, 1, 0) in (z, t, r): one pass in forward mode, without gradients. Raises UserError for a
    velocity that is not like z.
    """
    _check_like(velocity, z)

    def u(z: Tree, t: Tensor, r: Tensor) -> Tree:
        return split(network(z, torch.stack((t, r), 1), y))[0]

    tangents = (each(lambda v, a: v.to(a.dtype), velocity, z), torch.ones_like(t), torch.zeros_like(r))
    with torch.compiler.set_stance("force_eager"):  # the compiler knows no forward mode
        return torch.func.jvp(u, (z, t, r), tangents)[1]


def squared_error(u: Tree, dudt: Tree, velocity: Tree, t: Tensor, r: Tensor) -> Tree:
    """Sum over all but the first dimension of (u - (velocity - (t - r) du/dt))^2, [N] in at least float32. Raises
    UserError for two shapes.
    """
    _check_like(u, velocity)
    span = (t - r).clamp(0, 1)

    def of(u: Tensor, dudt: Tensor, velocity: Tensor) -> Tensor:
        wide = torch.promote_types(u.dtype, torch.float32)
        target = velocity.to(wide) - along(span, u).to(wide) * dudt.to(wide)
        return (u.to(wide) - target.detach()).square().flatten(1).sum(1)

    return each(of, u, dudt, velocity)


def _velocity_of_x(model: Network, t_eps: float) -> Network:
    def network(z: Tree, times: Tensor, y: Tree) -> Tree:
        output, _ = split(model(z, times, y))
        _check_like(output, z)
        return each(lambda a, data: (a - data) / along(times[:, 0].clamp(min=t_eps), a), z, output)

    return network


def _check_like(output: Tree, z: Tree) -> None:
    """Broadcast, another shape would give another loss without a word."""
    if shapes_of(output) != shapes_of(z):
        raise UserError(f"the model returned {described(output)}; it must be like {described(z)}")


def normalised(error: Tensor, norm_p: float, norm_eps: float) -> Tensor:
    """error / stop(error + norm_eps)^norm_p, [N]; with norm_p 1 it is near 1, only its gradient tells.

    Raises UserError for a norm_p that is not finite and a negative norm_eps.
    """
    if not math.isfinite(norm_p) or not 0 <= norm_eps < math.inf:
        raise UserError(f"norm_p={norm_p} must be finite, norm_eps={norm_eps} 0 or more")
    return error / (error.detach() + norm_eps) ** norm_p


def check_samples(
    model: object, x: Tree, y: Tensor, t: Tensor, r: Tensor, dropped: Tensor | None, prediction: str = "velocity"
) -> None:
    """Raises UserError unless labels y, times r <= t and, where it is given, dropped are [N] for x [N, ...]."""
    count = len(image(x))
    check_labels(model, y, count)
    for name, times in (("t", t), ("r", r)):
        check_unit(name, times, count)
    check_order(("r", r), ("t", t))
    path_of(model, "linear")
    predicted_by(model, prediction)
    if dropped is not None and dropped.shape != t.shape:
        raise UserError(f"dropped must be bool {list(t.shape)}, one for each sample, not {list(dropped.shape)}")


def _check_guidance(omega: float | None, kappa: float, interval: tuple[float, float]) -> None:
    for name, scale in (("omega", 1.0 if omega is None else omega), ("kappa", kappa)):
        if not math.isfinite(scale):
            raise UserError(f"{name}={scale} must be a finite number")
    if len(interval) != 2 or not interval[0] <= interval[1]:
        raise UserError(f"interval={interval} must be (smallest, largest) t with a guided target, in order")
    for name, value, off in (("kappa", kappa, 0), ("interval", tuple(interval), (0, 1))):
        if omega is None and value != off:
            raise UserError(f"{name}={value} is of a guided target, and omega is None; give omega=, or drop {name}=")


def trained_null_label(model: object, given: int | None) -> int:
    """The label given, or the model's. Raises UserError where it has none."""
    label = getattr(model, "null_label", -1) if given is None else given
    if label < 0:
        raise UserError(
            f"omega and dropped need a model with a trained null label; this {type(model).__name__} has none; give "
            "null_label=, or neither"
        )
    return label


class MeanVelocity(Objective):
    """Of a model of two times on the linear path, which samples in one step.

    As for flow matching, a `Context` has the velocity at t as its target.
    """

    solvers: ClassVar = {name: solver for name, solver in SOLVERS.items() if solver.follows == "mean_velocity"}
    functional = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Where the target is guided, the two times, and how the error is normalised."""

        guidance_low: float = setting(0.0, "Least t with a guided target", "[0, 1]")
        guidance_high: float = setting(1.0, "Largest t with a guided target (mean flow XL/2: 0.75)", "[0, 1]")
        time_mean: float = setting(-0.4, "Mean of both times before the sigmoid", "[-100, 100]")
        time_std: float = setting(1.0, "Their standard deviation before the sigmoid", "(0, 100]")
        norm_p: float = setting(1.0, "Power of an error by which it is divided; 0 = not at all", "[0, 10]")
        norm_eps: float = setting(0.01, "Added to the error before that", "(0, 1e6]")

        def __post_init__(self) -> None:
            if self.guidance_low > self.guidance_high:
                raise ConfigError("objective.guidance_low lies above objective.guidance_high; swap them")
            if not self.norm_p and self.norm_eps != 0.01:
                raise ConfigError(
                    f"objective.norm_eps={self.norm_eps} is of a normalised error, and objective.norm_p=0 has none; "
                    "set objective.norm_eps=0.01, or another norm_p"
                )

    def __init__(self, config: Any, model: Backbone):
        """Raises ConfigError for a model with one time or a learned variance."""
        self.refuse_variance(model)
        self.config, self.path = config, Path("linear")
        self.times = logit_normal(config.time_mean, config.time_std)
        if model.times != 2:
            raise ConfigError(f"objective={self.name} needs a model of two times; set model.times=2")

    def set_guided(self, guided: bool) -> None:
        """Raises ConfigError for bounds of a guidance that there is not."""
        self.guided, low, high = guided, self.config.guidance_low, self.config.guidance_high
        if not guided and (low, high) != (0.0, 1.0):
            raise ConfigError(
                f"objective.guidance_low={low} and guidance_high={high} are of a guided target, and this one is not; "
                "set objective.guidance_low=0 objective.guidance_high=1, or an omega"
            )

    def earlier(self, times: Tensor, shift: Tensor) -> Tensor:
        """t as in flow matching; r stays where it does not lie later."""
        t, r = times.unbind(1)
        t = super().earlier(t, shift)
        return torch.stack((t, torch.minimum(r, t)), 1)

    def from_unit(self, t: Tensor) -> Tensor:
        return torch.stack((t, t), 1)

    def draw_times(self, key: Key) -> tuple[Tensor, Tensor]:
        """t >= r, each [N]: two draws in order, the same one for `data_proportion` of the samples."""
        first, second = (self.times.keyed(key, s) for s in (Stream.TIME, Stream.SECOND_TIME))
        same = key.uniform(Stream.TIMES_AGREE, ()) < self.config.data_proportion
        t = torch.maximum(first, second)
        return t, torch.where(same, t, torch.minimum(first, second))


class MeanFlow(MeanVelocity):
    """Normalised squared error of the mean velocity between two times."""

    name = "mean_flow"
    title = "mean flow"

    @dataclass(frozen=True, kw_only=True)
    class Config(MeanVelocity.Config):
        """Guidance within the target, the two times, and how the error is normalised."""

        name: ClassVar[str] = "mean_flow"
        omega: float = setting(1.0, "Weight of the data's velocity in the guided target (XL/2: 0.2)", "[0, 1000]")
        kappa: float = setting(0.5, "Weight of the label's own velocity; the scale is omega / (1 - kappa)", "[0, 1)")
        data_proportion: float = setting(0.75, "Share of samples with r = t, which learn the velocity", "[0, 1]")

    def __init__(self, config: Config, model: Backbone):
        """Raises ConfigError as above, for guidance of a model without a trained null label, and for one that is told
        its guidance or has a second head that only improved mean flow trains.
        """
        super().__init__(config, model)
        self.set_guided((config.omega, config.kappa) != (1.0, 0.0))
        for option in ("velocity_head", "guidance_condition"):
            if getattr(model.config, option, False):
                raise ConfigError(
                    f"objective=mean_flow has no use for model.{option}; set model.{option}=false, or "
                    "objective=improved_mean_flow"
                )
        if self.guided and model.null_label < 0:
            raise ConfigError(
                "objective=mean_flow guides its target with a null label, and model.label_dropout=0 trains none; set "
                "objective.omega=1 objective.kappa=0, or a label dropout"
            )

    def run(
        self, model: Backbone, x: Tree, y: Tensor, key: Key, taps: Taps, batch: Mapping[str, Tensor], number: int
    ) -> Context:
        config = self.config
        t, r = self.draw_times(key)
        z, velocity = self.interpolate(x, noise_for(x, key), t)
        if self.guided:
            null, interval = model.null(y), (config.guidance_low, config.guidance_high)
            velocity = guided_velocity(model, velocity, z, t, y, null, config.omega, config.kappa, interval, y == null)
        times = torch.stack((t, r), 1)
        u, second = split(model(z, times, y, taps))
        errors = leaves(squared_error(u, total_derivative(model, z, velocity, t, r, y), velocity, t, r))
        losses = {name: normalised(error, config.norm_p, config.norm_eps) for name, error in errors.items()}
        logs = {"mean_flow/squared_error": errors["image"].mean()}
        return Context(self, model, x, y, key, times, z, u, losses, taps, batch, number, logs, second)
