"""What every backbone offers: its facts as attributes, one signature of `forward`, and block outputs through `Taps`."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, cast, get_args, get_origin, get_type_hints, overload

import torch
from torch import Tensor, nn

from dit_fast.errors import ConfigError, UserError
from dit_fast.models.recompute import ActivationCheckpointing
from dit_fast.nn.attention import Heads
from dit_fast.ops import RowStatistics
from dit_fast.ops.autocast import autocast_dtype
from dit_fast.options import setting
from dit_fast.tree import Tree, image, label, leaves, relabelled

X = TypeVar("X", bound=Tree)
Output = Tree | tuple[Tree, Tree]  # of a model; of two outputs, the first is what samplers follow
Y = TypeVar("Y", bound=Tree)
HEAD = "final_layer"
GUIDANCE = ("omega", "t_min", "t_max")  # what a model may be told of its guidance, beside the label
PRESETS: dict[str, dict[str, int]] = {}  # sizes by model name; the file of each backbone adds its own


def split(output: X | tuple[X, X]) -> tuple[X, X | None]:
    """A model's output, and its second output where it has one."""
    return output if isinstance(output, tuple) and len(output) == 2 else (cast(X, output), None)


def guidance_conditions(
    labels: Tensor, omega: float | Tensor = 1.0, t_min: float | Tensor = 0.0, t_max: float | Tensor = 1.0
) -> dict[str, Tensor]:
    """Conditions {"label", "omega", "t_min", "t_max"}, [N] each, for a model that is told its guidance.

    omega: its scale, 1 = none. t_min, t_max: the interval of times with it. Numbers, or [N]; numbers become float64, or
    of the dtype of the first tensor among them.
    """
    values = (omega, t_min, t_max)
    dtype = next((value.dtype for value in values if isinstance(value, Tensor)), torch.float64)
    told = [torch.as_tensor(value, dtype=dtype, device=labels.device).expand(labels.shape) for value in values]
    return {"label": labels, **dict(zip(GUIDANCE, told, strict=True))}


class Collector(Protocol):
    """Takes the block outputs that its method asked for, in ascending order, during one forward of the model."""

    def tap(self, x: Tensor, stats: RowStatistics | None) -> Tensor:
        """Identity [N, T, D]; the returned tensor takes the place of x. stats: x's, where the model knows them."""
        ...


class Taps:
    """What one forward hands out: the outputs [N, T, D] of some blocks, on their way through collectors.

    blocks: indices from 0 to record. collectors: by name, with the blocks that each takes; those are recorded too.
    attention: blocks whose queries and keys are recorded. features: block -> output, in ascending order once the
    forward ran; heads: block -> queries and keys. Make a new object for each forward.
    """

    def __init__(
        self,
        blocks: Iterable[int] = (),
        collectors: Mapping[str, tuple[Collector, frozenset[int]]] | None = None,
        attention: Iterable[int] = (),
    ):
        self._through = tuple((collectors or {}).values())
        self.blocks = frozenset(blocks).union(*(wanted for _, wanted in self._through))
        self.collectors = {name: collector for name, (collector, _) in (collectors or {}).items()}
        self.attention = frozenset(attention)
        self.features: dict[int, Tensor] = {}
        self.heads: dict[int, Heads] = {}

    def __contains__(self, block: int) -> bool:
        return block in self.blocks

    def __call__(self, block: int, x: Tensor, stats: RowStatistics | None = None) -> Tensor:
        """x, the output of `block`, recorded after it passed the collectors that want it: what the next block reads."""
        for collector, wanted in self._through:
            if block in wanted:
                x = collector.tap(x, stats)
        self.features[block] = x
        return x


class Backbone(nn.Module, ABC):
    """A diffusion transformer; time runs from data (0) to noise (1).

    A subclass extends `Config`, sets the first attributes below and defines `compute` and `flops_per_sample`; its file
    adds sizes to `PRESETS`, under names that start with the class's, and one entry in `models.registry` makes it known.
    Its head is `final_layer`. Raises ConfigError for sizes that are not given (0) and values out of range.

    config: as built, with all sizes. shapes: leaves of what it denoises, without N. num_tokens, grid: patch tokens, and
    their rows and columns. class_token: width of a token that is denoised beside the image, 0 = none; the features then
    hold it before the patch tokens. times: 1, or 2 for a mean velocity between two times. null_label: the label that
    stands for none, -1 where none was trained. cfg_channels: what the released sampler of its weights guides.
    activation_checkpointing: what each block's backward computes again (`models.recompute`); may be set at any time.
    learns_variance: a model of DDPM: t is a whole step, and the image of the output has 2C channels, the noise and the
    variance's logits. outputs: 2 where `forward` returns a tuple, the output and a second one of the form of x.
    guidance_condition: whether it is told its guidance. guides_noise: whether the released sampler of its weights
    guides at t = 1 where an interval without its ends has that as its upper one. prediction: what its weights were
    trained to give, as far as that is known: one of `diffusion.conversions.Prediction`; None where it is not. path: the
    name of the `diffusion.Path` they were trained on, None likewise.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """What every backbone can be told; its own Config adds to this."""

        name: str
        input_size: int = setting(0, "Latent height; 0 = as the data set says", "[0, 4096]")
        input_width: int = setting(0, "Latent width where it is not the height; 0 = it is", "[0, 4096]")
        in_channels: int = setting(0, "Latent channels; 0 = as the data set says", "[0, 4096]")
        num_classes: int = setting(0, "Classes of the label table; 0 = as the data set says", "[0, 1e7]")
        label_dropout: float = setting(0.1, "Share of labels replaced by the null label", "[0, 1)")
        class_token: int = setting(0, "Width of a token that is denoised beside the image; 0 = none", "[0, 65536]")
        times: Literal[1, 2] = setting(1, "1: velocity at t; 2: mean velocity between two times (mean flow)")

    cfg_channels: Literal["all", "first_three"] = "all"
    activation_checkpointing: ActivationCheckpointing = "none"
    learns_variance: bool = False
    outputs: int = 1
    guidance_condition: bool = False
    guides_noise: bool = True
    prediction: str | None = None
    path: str | None = None

    blocks: nn.ModuleList
    projectors: nn.ModuleList  # once there is one
    depth: int
    hidden_size: int
    num_heads: int
    num_tokens: int
    grid: tuple[int, int]

    config: Config
    shapes: dict[str, tuple[int, ...]]

    def __init__(self, config: Config):
        super().__init__()
        check_sizes(config, 1, "num_classes", "input_size", "in_channels")
        check_sizes(config, 0, "input_width", "class_token")
        for name, hint in get_type_hints(type(config)).items():
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            if choices and getattr(config, name) not in choices:
                listed = ", ".join(map(str, choices))
                raise ConfigError(f"{name} must be one of {listed}, not '{getattr(config, name)}'")
        if not 0 <= config.label_dropout < 1:
            raise ConfigError(f"label_dropout must lie in [0, 1), not {config.label_dropout}")
        self.config, self.in_channels, self.num_classes = config, config.in_channels, config.num_classes
        self.class_token, self.times = config.class_token, config.times
        self.null_label = config.num_classes if config.label_dropout else -1
        self.shapes = {"image": (config.in_channels, config.input_size, config.input_width or config.input_size)}
        if config.class_token:
            self.shapes["class_token"] = (config.class_token,)

    @abstractmethod
    def compute(self, x: Tree, t: Tensor, y: Tree, taps: Taps, stop: int | None) -> Output | None:
        """`forward`, its inputs checked. The output of each block in `taps` is replaced by `taps(block, x, stats)`.

        Queries and keys of each block in `taps.attention` go into `taps.heads`.
        """

    @abstractmethod
    def flops_per_sample(self) -> int:
        """Forward FLOPs of one sample, multiply-add = 2; without modules added by methods."""

    @overload
    def forward(self, x: X, t: Tensor, y: Tree) -> X | tuple[X, X]: ...
    @overload
    def forward(self, x: X, t: Tensor, y: Tree, taps: Taps, stop: None = None) -> X | tuple[X, X]: ...
    @overload
    def forward(self, x: Tree, t: Tensor, y: Tree, taps: Taps, stop: int) -> None: ...
    @overload
    def forward(self, x: X, t: Tensor, y: Tree, taps: Iterable[int]) -> tuple[X | tuple[X, X], dict[int, Tensor]]: ...
    @overload
    def forward(
        self, x: Tree, t: Tensor, y: Tree, taps: Iterable[int], stop: int
    ) -> tuple[None, dict[int, Tensor]]: ...

    def forward(
        self, x: X, t: Tensor, y: Tree, taps: Taps | Iterable[int] = (), stop: int | None = None
    ) -> X | tuple[X, X] | tuple[X | tuple[X, X] | None, dict[int, Tensor]] | None:
        """Output, like x, at x and t for labels y [N] int64; nothing is drawn at random.

        A model with `guidance_condition` takes as y what `guidance_conditions` makes; labels alone then stand for no
        guidance, omega 1 at all times.

        x: [N, C, H, W]; with a class token {"image": [N, C, H, W], "class_token": [N, Z]}. t: [N] in [0, 1], or where
        `times` is 2 [N, 2] = (t, r): the output is the mean velocity from r to t. Where the model `learns_variance`,
        int64 [N] in 0 .. 999, and the output's image is [N, 2C, H, W]. Where `outputs` is 2, the output is a tuple,
        which `split` takes apart; the second is like x.
        taps: a `Taps`, filled on the way; or indices (from 0) of blocks, whose outputs [N, T, D] are then returned as
        (output, {block: feature}) if there are any. A feature is what the published code records: in "output" wiring,
        after the fusion. stop: the last block that runs; there is then no output, but None.
        Raises UserError for bad input.
        """
        asked = taps if isinstance(taps, Taps) else Taps(taps)
        self._check(x, t, y)
        last = self.depth - 1 if stop is None else stop
        if not 0 <= last < self.depth:
            raise UserError(f"stop={stop} is not a block of this model (0 .. {self.depth - 1})")
        for block in sorted(asked.blocks | asked.attention):
            if not 0 <= block <= last:
                where = f"a block of this model (0 .. {last})" if stop is None else f"run with stop={stop}"
                raise UserError(f"tap {block} is not {where}")
        # a string: torch 2.11 cannot trace a union
        output = cast("X | tuple[X, X] | None", self.compute(x, t, y, asked, stop))
        for block in asked.attention:
            if block not in asked.heads:
                raise UserError(f"{self.config.name} hands out no queries and keys of block {block}; use another model")
        return (output, asked.features) if asked is not taps and asked.blocks else output

    if TYPE_CHECKING:
        __call__ = forward

    def null(self, y: Y) -> Y:
        """The null label in the place of each label, further conditions as they are. Raises UserError where the model
        has none.
        """
        if self.null_label < 0:
            raise UserError("this model has no trained null label (label dropout 0): drop no labels")
        return cast(Y, relabelled(y, torch.full_like(label(y), self.null_label)))

    def block(self, depth: int, key: str) -> int:
        """Index of the block that a configuration counts from 1. Raises ConfigError naming its key."""
        if not 1 <= depth <= self.depth:
            raise ConfigError(f"{key}={depth} is not one of this model's blocks 1..{self.depth}")
        return depth - 1

    def add_head(self, name: str, module: nn.Module) -> None:
        """Registers a module of a training method where the published code has it: after the blocks, before the head.

        Raises ConfigError if the name is taken.
        """
        if hasattr(self, name):
            raise ConfigError(f"the model already has '{name}'; two methods cannot add a module of one name")
        self.add_module(name, module)
        names = list(self._modules)
        for later in names[names.index(HEAD) : -1]:
            self._modules[later] = self._modules.pop(later)

    def add_projector(self, module: nn.Module) -> None:
        """Appends an alignment head to `projectors`, which the first one makes: names go by the order of the methods.

        Raises ConfigError where `projectors` is a method's own module.
        """
        if not isinstance(getattr(self, "projectors", None), nn.ModuleList):
            self.add_head("projectors", nn.ModuleList())
        self.projectors.append(module)

    def trunk(self, last: int) -> "Backbone":
        """A teacher's network: a frozen copy in eval mode, on the same device, of what a forward with `stop=last` runs.

        Names of parameters stay. It can run with no later stop.
        """
        copied = copy.deepcopy(self, {id(module): nn.Identity() for module in self.beyond(last)})
        return copied.requires_grad_(False).eval()

    def beyond(self, last: int) -> list[nn.Module]:
        """The modules that a forward with `stop=last` does not run: later blocks, heads of methods, the head."""
        names = list(self._modules)
        heads = names[names.index("blocks") + 1 : names.index(HEAD) + 1]
        return [*list(self.blocks)[last + 1 :], *(getattr(self, name) for name in heads)]

    def _check(self, x: Tree, t: Tensor, y: Tree) -> None:
        named, count = leaves(x), len(image(x))
        if named.keys() != self.shapes.keys():
            raise UserError(f"x must hold {' and '.join(self.shapes)} for this model, not {' and '.join(named)}")
        weight = next(self.parameters())
        for leaf, shape in self.shapes.items():
            value, name = named[leaf], "x" if isinstance(x, Tensor) else f"x['{leaf}']"
            if tuple(value.shape) != (count, *shape):
                raise UserError(
                    f"{name} must be [N, {', '.join(map(str, shape))}] for this model, not {tuple(value.shape)}"
                )
            if value.dtype != weight.dtype and autocast_dtype(value) is None:
                raise UserError(
                    f"{name} is {value.dtype} but the model's weights are {weight.dtype}; convert one of them or use "
                    "autocast"
                )
        told = ("label", *GUIDANCE) if self.guidance_condition else ("label",)
        if not isinstance(y, Tensor) and tuple(y) != told and set(y) != set(told):
            raise UserError(f"y must hold {', '.join(told)} for this model, not {', '.join(y)}")
        conditions = {"y": y} if isinstance(y, Tensor) else {f"y['{name}']": value for name, value in y.items()}
        for name, vector, size in (
            ("t", t, (count, 2)[: self.times]),
            *((name, value, (count,)) for name, value in conditions.items()),
        ):
            if tuple(vector.shape) != size:
                meaning = "[N, 2] = (t, r)" if len(size) == 2 else "[N]"
                raise UserError(f"{name} must be {meaning}, here {size}, not {tuple(vector.shape)}")
        if label(y).is_floating_point():
            raise UserError(f"y must hold integer labels, not {label(y).dtype}")
        if self.learns_variance and t.is_floating_point():
            raise UserError(f"t must hold whole steps 0 .. 999 for this model, not {t.dtype}")


def check_sizes(config: Backbone.Config, least: int, *names: str) -> None:
    """Raises ConfigError for the first of these fields that is no whole number from `least` on."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be at least {least}, not {value!r}")
