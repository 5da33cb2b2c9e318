"""Training methods: what one reads, the modules it adds, and its named loss terms.

The trainer names no method. It binds the configured ones to the model and the data set, reads the fields and hands out
the blocks that they ask for, and adds `weight * value` of their terms to the objective's loss.
`docs/methods.md` shows how to write one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from dit_fast.data import DatasetInfo
from dit_fast.errors import ConfigError
from dit_fast.models.base import Backbone, Collector
from dit_fast.objectives import Context
from dit_fast.ops.draws import Key
from dit_fast.options import setting
from dit_fast.tree import Tree

# Modules of the model where a method trains an autoencoder with it: that, and the batch norm of its latents.
VAE, NORM, NORM_EPS = "vae", "bn", 1e-4
Load = Callable[[str, str], tuple[Backbone, str]]  # path of a run or step folder, weights -> frozen model, sha256


@dataclass(frozen=True)
class Term:
    """One summand of the loss: `weight * value`, both 0-d, plus further 0-d tensors to be logged under full names.

    A weight that is a tensor may carry a gradient of its own.
    """

    value: Tensor
    weight: Tensor | float = 1.0
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class Logged(Protocol):
    """What a run logged."""

    def names(self) -> list[str]:
        """Columns that hold numbers."""
        ...

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps int64 [n], values float64 [n])."""
        ...

    def final(self, name: str) -> float:
        """Mean over the last tenth of the run; nan where it was not logged."""
        ...


@dataclass(frozen=True)
class Panel:
    """A method's part of a report: paragraphs, and a figure of what it logged.

    curves: label -> column. weight: a column that is drawn below them; where it is above 0 both are shaded. limits:
    values that are marked as lines across the curves, with what they are.
    """

    title: str
    paragraphs: Sequence[str]
    curves: Mapping[str, str]
    weight: str | None = None
    limits: Mapping[float, str] = field(default_factory=dict)


def active(step: int, stop_step: int) -> bool:
    """Whether a method's terms count in this optimizer step, from 0: before stop_step, and always where that is 0."""
    return not stop_step or step < stop_step


def refuse_unread(config: Any, option: str, choice: str, *readers: str) -> None:
    """Raises ConfigError where an option is set that only these values of `choice` read, and that has another."""
    default = next(item.default for item in fields(config) if item.name == option)
    value, chosen, prefix = getattr(config, option), getattr(config, choice), f"methods.{config.name}"
    if value != default and chosen not in readers:
        default, value = (str(x).lower() if isinstance(x, bool) else x for x in (default, value))
        raise ConfigError(
            f"{prefix}.{option}={value} is not read with {prefix}.{choice}={chosen}, but with {' or '.join(readers)}; "
            f"set {prefix}.{option}={default}, or {prefix}.{choice}={readers[0]}"
        )


class Method(ABC):
    """A training method. Subclasses set `name` and extend `Config` (a frozen dataclass with the same `name`).

    title: its name as people write it. about: what it does, as a clause, for reports. fields: of the data set, which a
    batch then has beside latents and labels. adds: leaves that `state` gives beside the image. blocks: from 0, whose
    outputs pass the method's collector and are in the context's `features`. attention: blocks whose queries and keys
    are in the context's `taps.heads`. averaged: floating-point buffers of the model whose moving average the EMA file
    holds. teachers: networks beside the model that it runs, without gradients; they are compiled where the model is.
    functional: whether it differentiates within a forward (jvp, a second derivative) or calls the model with other
    parameters. digests: sha256 by name of what `prepare` read from outside and is frozen; they are kept in the
    checkpoints, and a resume with another file is refused, wherever it lies. autoencoder: where `state` gives latents
    of an autoencoder that is trained with the model, diffusers' configuration of it; it is the model's `VAE`, and the
    running statistics of `NORM` scale its latents.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What every method can be told; its own Config adds to this."""

        stop_step: int = setting(0, "Step from which the method is not computed; 0 = never", "[0, 1e9]")

    name: ClassVar[str]
    title: ClassVar[str] = ""
    about: ClassVar[str] = ""
    functional: ClassVar[bool] = False
    config: Any = Config()
    fields: tuple[str, ...] = ()
    adds: tuple[str, ...] = ()
    blocks: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    averaged: tuple[str, ...] = ()
    teachers: tuple[Backbone, ...] = ()
    digests: Mapping[str, str] = MappingProxyType({})
    autoencoder: Mapping[str, Any] | None = None

    def __init__(self, config: Any, model: Backbone, data: DatasetInfo):
        """Binds the method to a run: works out its blocks and adds its heads (`model.add_projector`, `model.add_head`).

        A head is trained, averaged and saved with the model. Raises ConfigError or DataError for everything that can be
        refused before the first step.
        """
        self.config = config

    def check_batch(self, micro_batch: int) -> None:  # noqa: B027 (most terms are means over samples)
        """Raises ConfigError where that many samples of a rank at a time are too few for its terms; before any step."""

    @classmethod
    def panel(cls, config: Mapping[str, Any], logged: Logged) -> Panel | None:
        """Its part of a report, from a run's folder: here the terms that it logged. config: its settings in the run."""
        own = [name for name in logged.names() if name.startswith(f"{cls.name}/")]
        if not own:
            return None
        ends = ", ".join(f"{name.partition('/')[2]} {logged.final(name):.4g}" for name in own)
        about = f"{cls.about[:1].upper()}{cls.about[1:]}."
        curves = {name.partition("/")[2].replace("_", " "): name for name in own}
        return Panel(cls.title, [about, f"Mean over the last tenth of the run: {ends}."], curves)

    @staticmethod
    def stages(config: Any, run: Any) -> list[Any]:
        """The runs that one command does in order, each an ordinary one: `run` (a `TrainConfig`), or changes of it.

        config: this method's in `run`. Their models are alike, and no two have the same run.dir.
        """
        return [run]

    def prepare(self, load: Load) -> None:  # noqa: B027 (most methods read no other run)
        """Called once after construction, before the first step: `load` reads the model of another run, frozen.

        It is in eval mode on the run's device, and has no heads of methods. Before the first of several stages it is
        called without weights too, with the run's own model for that of the other.
        """

    def collector(self) -> Collector | None:
        """A new object for one forward, which the outputs of `blocks` pass in ascending order; most methods need none.

        `context.taps.collectors` has it under the method's name.
        """
        return None

    def complete(self, batch: Mapping[str, Tensor], active: bool) -> Mapping[str, Tensor]:
        """Further fields of a batch that are computed rather than read, under names of the method's own.

        Called first of all in a step, without gradients. active: whether `terms` is called in this step.
        """
        return {}

    def state(self, x: Tree, batch: Mapping[str, Tensor], key: Key) -> Tree:
        """What is denoised, from the clean latents: a method may add those of `adds`, or replace the image."""
        return x

    @abstractmethod
    def terms(self, context: Context) -> dict[str, Term]:
        """Loss terms by full name, "<method>/<term>". No host synchronisation, no Python branch on a tensor.

        A method that added a leaf in `state` gives its `context.losses` as a term with a weight of its own.
        """

    def active(self, number: int) -> bool:
        """Whether its terms count in this optimizer step, from 0."""
        return active(number, self.config.stop_step)

    def kind(self, number: int) -> Hashable:
        """All that its part of an optimizer step, from 0, depends on through the number: equal for steps that differ by
        their data alone, of which one can be captured and replayed."""
        return self.active(number)

    def lasting_terms(self, context: Context) -> dict[str, Term]:
        """Those of `terms` that count from stop_step on too, without `features`: what the model needs to denoise what
        `state` gives. A method that has a `state` and none of these cannot be stopped.
        """
        return {}

    def release(self) -> None:
        """Called in each step from stop_step on: drops what `terms` alone needs."""
        self.teachers = ()

    def after_update(self, model: Backbone, applied: Tensor) -> None:  # noqa: B027 (most methods move nothing)
        """Moves the method's state after a step before stop_step, without gradients and on every rank alike.

        Parameters are whole. applied: 0-d float32 on the device, 1 where the step changed the weights and 0 where it
        was skipped: a teacher moves by `lerp_(parameter, (1 - decay) * applied)`. Weights of the model are read only.
        """

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of the optimizer for parameters of its own, as torch takes them; "clip": their largest norm."""
        return []

    def tensors(self) -> Mapping[str, Tensor]:
        """Moving state outside of the model (a teacher's), live, the same on all ranks; saved and restored."""
        return {}
