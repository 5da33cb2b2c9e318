"""Training methods: the block outputs they read, the modules they add, and their named loss terms.

The trainer names no method. It asks the composition of the configured ones which blocks to hand out and which
shard fields to read, lets them add modules, and adds `weight * value` of their terms to the flow loss.
`docs/methods.md` shows how to write one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from dit_fast.errors import ConfigError
from dit_fast.models.base import Collector, Taps

T = TypeVar("T")


@dataclass(frozen=True)
class Term:
    """One summand of the loss: `weight * value`, both 0-d, plus further 0-d tensors to be logged under full names.

    A weight that is a tensor may carry a gradient of its own.
    """

    value: Tensor
    weight: Tensor | float = 1.0
    logs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFacts:
    """Model sizes, on which the choice of block outputs may depend; weights are not among them."""

    depth: int
    hidden_size: int
    num_tokens: int
    in_channels: int

    @classmethod
    def of(cls, model: Any) -> "ModelFacts":
        """Facts of a model that has attributes of these names (SiT)."""
        return cls(model.depth, model.hidden_size, model.num_tokens, model.in_channels)


class _OnDemand:
    """A dataclass field that holds its value, or a function without arguments that makes it when it is first read."""

    def __init__(self, name: str):
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        value = vars(instance)[self._name]
        if callable(value):
            value = vars(instance)[self._name] = value()
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self._name] = value


def _on_demand(*names: str) -> Callable[[type[T]], type[T]]:
    def install(cls: type[T]) -> type[T]:
        for name in names:
            setattr(cls, name, _OnDemand(name))
        return cls

    return install


@_on_demand("noise")
@dataclass(frozen=True)
class StepInputs:
    """One micro-batch before the model's forward, for a method that has a forward of its own.

    model: the bare model, with whatever methods attached. latents, noise [N, C, H, W]; t [N], drawn from the configured
    distribution; labels int64 [N]; drop bool [N], rows whose label becomes the null label. batch, step, seed: as in
    `StepContext`. noise may be given as a function that makes it when it is first read.
    """

    model: nn.Module
    latents: Tensor
    noise: Tensor
    t: Tensor
    labels: Tensor
    drop: Tensor
    batch: Mapping[str, Tensor]
    step: int
    seed: int


@_on_demand("noise", "target")
@dataclass
class StepContext:
    """One micro-batch after the model's forward.

    model: the bare model, with whatever methods attached. latents, noise, noised (x_t), target (v), prediction:
    [N, C, H, W]. t [N]; labels int64 [N], after label dropout. features: block index from 0 -> output [N, T, D], at
    least the blocks that this method asked for. batch: further shard fields by name, and "position" int64 [N], each
    sample's position in the run (the key of all its random numbers). step counts optimizer steps; seed is the run's.
    collectors: by method name, what `Method.collector` gave and the model's forward filled; a method must also work
    without its own, from `features`. noise and target may be given as functions that make them when they are first
    read: the fused flow-matching ops need neither.
    """

    model: nn.Module
    latents: Tensor
    noise: Tensor
    t: Tensor
    labels: Tensor
    noised: Tensor
    target: Tensor
    prediction: Tensor
    features: Mapping[int, Tensor]
    batch: Mapping[str, Tensor]
    step: int
    seed: int
    collectors: Mapping[str, Any] = field(default_factory=dict)


class Method(ABC):
    """A training method. Subclasses set `name` and `Config` (a frozen dataclass with defaults and the same `name`)."""

    name: ClassVar[str]
    Config: ClassVar[type]
    own_forward: ClassVar[bool] = False  # True: `forward` takes the place of flow matching
    functional: ClassVar[bool] = False  # True: differentiates the model forward or calls it with other parameters
    averaged: tuple[str, ...] = ()  # floating-point buffers of the model whose moving average the EMA file holds

    def __init__(self, config: Any):
        self.config = config

    def batch_fields(self) -> tuple[str, ...]:
        """Shard members it reads beside latents and labels."""
        return ()

    def taps(self, facts: ModelFacts) -> frozenset[int]:
        """Blocks, from 0, whose outputs `terms` reads. Raises ConfigError where the configuration does not fit."""
        return frozenset()

    def collector(self) -> Collector | None:
        """A new object for one forward that the outputs in `taps` pass through, or None (most methods need none)."""
        return None

    def attach(self, model: nn.Module, dataset_info: Any) -> None:  # noqa: B027 (most methods add nothing)
        """Adds its modules with `model.add_head(name, module)`; called once, before the optimizer is built."""

    def after_update(self, model: nn.Module, applied: Tensor) -> None:  # noqa: B027 (most methods move nothing)
        """Moves the method's state after a step, without gradients and on every rank alike; parameters are whole.

        applied: 0-d float32 on the device, 1 where the step changed the weights and 0 where it was skipped: a teacher
        moves by `lerp_(parameter, (1 - decay) * applied)`. Weights of the model are read only.
        """

    def tensors(self) -> Mapping[str, Tensor]:
        """Moving state outside of the model (a teacher's), live, the same on all ranks; saved and restored."""
        return {}

    def forward(self, inputs: StepInputs, taps: tuple[int, ...]) -> tuple[StepContext, Tensor]:
        """Runs the model its own way (`own_forward`): the context that all methods' terms read, and losses [N].

        The losses' mean is logged under the method's name. The trainer calls this under autocast; losses are float32.
        """
        raise ConfigError(f"method '{self.name}' says own_forward, but defines no forward")

    @abstractmethod
    def terms(self, context: StepContext) -> dict[str, Term]:
        """Loss terms by full name, "<method>/<term>". No host synchronisation, no Python branch on a tensor."""


class Methods(Sequence[Method]):
    """Several methods as one: unions of what they need, terms side by side. An empty one is plain flow matching."""

    def __init__(self, methods: Sequence[Method]):
        names = [method.name for method in methods]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"method '{name}' is listed twice; keep one")
        owners = [method for method in methods if method.own_forward]
        if len(owners) > 1:
            raise ConfigError(f"methods '{owners[0].name}' and '{owners[1].name}' both replace flow matching; keep one")
        self.owner = owners[0] if owners else None
        self._methods = tuple(methods)

    def __getitem__(self, index: Any) -> Any:
        return self._methods[index]

    def __len__(self) -> int:
        return len(self._methods)

    def __iter__(self) -> Iterator[Method]:
        return iter(self._methods)

    def batch_fields(self) -> tuple[str, ...]:
        """Each field once, in the order of the methods."""
        return tuple(dict.fromkeys(name for method in self for name in method.batch_fields()))

    def taps(self, facts: ModelFacts) -> tuple[int, ...]:
        """Ascending block indices. Raises ConfigError for one that the model does not have, naming the method."""
        for method in self:
            for block in method.taps(facts):
                if not 0 <= block < facts.depth:
                    raise ConfigError(
                        f"method '{method.name}' reads block {block}; this model has 0..{facts.depth - 1}"
                    )
        return tuple(sorted({block for method in self for block in method.taps(facts)}))

    def tapping(self, facts: ModelFacts) -> Taps:
        """New taps for one forward of a model with these facts, through the collectors of the methods that have any."""
        fresh = {method.name: (method.collector(), method.taps(facts)) for method in self}
        present = {name: (collector, blocks) for name, (collector, blocks) in fresh.items() if collector is not None}
        return Taps(self.taps(facts), present)

    def attach(self, model: nn.Module, dataset_info: Any) -> None:
        for method in self:
            method.attach(model, dataset_info)

    def terms(self, context: StepContext) -> dict[str, Term]:
        """All terms by full name. Raises ConfigError for a name outside its method's prefix."""
        collected: dict[str, Term] = {}
        for method in self:
            for name, term in method.terms(context).items():
                if not name.startswith(f"{method.name}/"):
                    raise ConfigError(f"method '{method.name}' names a term '{name}'; use '{method.name}/{name}'")
                collected[name] = term
        return collected
