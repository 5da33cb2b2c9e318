"""Objectives: one formulation of diffusion each, from what a training step draws to the field that samplers follow.

The trainer names no objective. It hands `run` the clean latents, the labels and the taps of the configured methods, and
gets a `Context`: the losses, and everything that a method may read.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from dit_fast.diffusion import Guidance, Path, Solver, velocity_error
from dit_fast.diffusion.conversions import T_EPS, Prediction, training_pair
from dit_fast.diffusion.guidance import Velocity
from dit_fast.diffusion.solvers import Field
from dit_fast.errors import ConfigError
from dit_fast.models import Backbone, Taps
from dit_fast.ops.draws import Key
from dit_fast.philox import Stream
from dit_fast.tree import Tree, leaves, like


def first(times: Tensor) -> Tensor:
    """t [N] of times [N] or [N, 2] = (t, r)."""
    return times if times.dim() == 1 else times[:, 0]


def noise_for(x: Tree, key: Key) -> Tree:
    """Standard normal float32, of the form of x. Raises UserError for a leaf without a stream."""
    return like(x, key.leaves(Stream.NOISE, {name: leaf.shape[1:] for name, leaf in leaves(x).items()}))


@dataclass(frozen=True)
class Context:
    """One micro-batch after the model's forward.

    model: the bare model, with the heads of all methods. x: clean latents, with what methods added to them; y: as the
    model got it, labels int64 [N] after label dropout, or conditions with such labels. key: of all random numbers of
    these samples. times: as the model got them, [N], or [N, 2] = (t, r) for a mean velocity; t: the time of noised
    (x_t), [N]. noised, prediction, noise, target: of the form of x. losses: [N] float32 by leaf; the image's is the
    base loss, another leaf's is a term of the method that added the leaf. taps: block outputs in `features` by index
    from 0 ([N, T, D]), and the methods' collectors by name. batch: the batch's fields by name. number: of the optimizer
    step, from 0. logs: further 0-d tensors of the objective by full name. second: the model's second output, of the
    form of x, where it has one.
    """

    objective: "Objective"
    model: Backbone
    x: Tree
    y: Tree
    key: Key
    times: Tensor
    noised: Tree
    prediction: Tree
    losses: Mapping[str, Tensor]
    taps: Taps
    batch: Mapping[str, Tensor]
    number: int
    logs: Mapping[str, Tensor] = field(default_factory=dict)
    second: Tree | None = None

    @property
    def t(self) -> Tensor:
        return first(self.times)

    @property
    def features(self) -> Mapping[int, Tensor]:
        return self.taps.features

    @cached_property
    def noise(self) -> Tree:
        """Drawn when it is first read: the fused ops make it in registers."""
        return noise_for(self.x, self.key)

    @cached_property
    def target(self) -> Tree:
        """What the prediction is compared with; computed when it is first read."""
        return self.objective.interpolate(self.x, self.noise, self.t)[1]

    def noised_at(self, t: Tensor) -> Tree:
        """x with the same noise at other times [N]."""
        return self.objective.interpolate(self.x, self.noise, t)[0]

    def earlier(self, shift: Tensor) -> tuple[Tree, Tensor]:
        """What a teacher at less noise is given, (noised, times): `Objective.earlier` by shift [N], the same noise."""
        times = self.objective.earlier(self.times, shift)
        return self.noised_at(first(times)), times


class Objective(ABC):
    """A formulation; here, of a model of one time in [0, 1].

    Subclasses set `name`, `Config` (a frozen dataclass with defaults) and `solvers`, and define `run`.

    solvers: by name, what can follow its `field` from noise to data. functional: whether it differentiates within a
    forward (jvp, a second derivative) or calls the model with other parameters. path: between data and noise.
    prediction: what the model gives for x_t. t_eps: least t by which a prediction of x is turned into a velocity.
    time_shift: `shift_times` of equal steps that samplers take unless they are told another; 1 = none.
    """

    name: ClassVar[str]
    title: ClassVar[str]  # as people write it
    Config: ClassVar[type]
    functional: ClassVar[bool] = False
    solvers: ClassVar[Mapping[str, Solver]]
    path: Path
    prediction: Prediction = "velocity"
    t_eps: float = T_EPS
    time_shift: float = 1.0

    @abstractmethod
    def __init__(self, config: Any, model: Backbone):
        """Raises ConfigError where the configuration does not fit the model."""

    @abstractmethod
    def run(
        self, model: Backbone, x: Tree, y: Tensor, key: Key, taps: Taps, batch: Mapping[str, Tensor], number: int
    ) -> Context:
        """Draws times and noise from the key, and runs the model on them, once with `taps`; arguments as in `Context`.

        The trainer calls this under autocast; the losses are float32.
        """

    def interpolate(self, x: Tree, noise: Tree, t: Tensor) -> tuple[Tree, Tree]:
        """What the model is given at times t [N], and what its prediction is compared with; both of the form of x."""
        drawn = leaves(noise)
        pairs = {
            name: training_pair(leaf, drawn[name], t, self.path, self.prediction) for name, leaf in leaves(x).items()
        }
        noised, target = (like(x, {name: pair[k] for name, pair in pairs.items()}) for k in (0, 1))
        return noised, target

    def errors(self, prediction: Tree, target: Tree, t: Tensor) -> dict[str, Tensor]:
        """Error [N] by leaf, in at least float32, of a prediction at times t [N], weighted as the base loss is."""
        known = leaves(target)
        return {name: velocity_error(leaf, known[name]) for name, leaf in leaves(prediction).items()}

    def earlier(self, times: Tensor, shift: Tensor) -> Tensor:
        """Times like `times` of less noise, by shift [N] in [0, 1] of the whole span: clamp(t - shift, 0, 1)."""
        return (times - shift).clamp(0, 1)

    def unit(self, times: Tensor) -> Tensor:
        """t [N] from 0 (data) to 1 (noise), in floating point, of times as the model is given them."""
        return first(times)

    def from_unit(self, t: Tensor) -> Tensor:
        """Times as the model is given them, of no length, for t [N] in [0, 1]: the inverse of `unit`."""
        return t

    def refuse_variance(self, model: Backbone) -> None:
        """Raises ConfigError for a model that predicts noise and a variance."""
        if model.learns_variance:
            raise ConfigError(
                f"objective={self.name} trains no variance, which {model.config.name} predicts beside the noise; set "
                f"objective=ddpm, or model={model.config.name.replace('DiT', 'SiT', 1)}"
            )

    def field(self, model: Backbone, y: Tree, guidance: Guidance) -> Field:
        """v(x, t, s): float64, what a solver follows from time t to time s, of labels y [N] (or conditions), guided."""
        return Velocity(model, y, guidance, model.times, self.prediction, self.path, self.t_eps)
