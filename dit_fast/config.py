"""Configuration: frozen dataclasses, dotted overrides, and the difference between two configurations.

A run is described by one `TrainConfig`. Recipes (`dit_fast.recipes`) are functions that return one; the command line
changes single fields by dotted path (`optimizer.lr=2e-4`). Unknown keys raise with the nearest valid name; the resolved
configuration is written into the run folder and compared when the run is resumed.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from dit_fast.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer. Latent size and channels, class count: 0 means "as the data set says"."""

    name: str = "SiT-XL/2"
    input_size: int = 0  # latent height = width
    in_channels: int = 0
    num_classes: int = 0
    skip_wiring: Literal["off", "input", "output"] = "input"
    qk_norm: bool = False
    label_dropout: float = 0.1
    residual_dtype: Literal["fp32", "autocast"] = "fp32"
    attention: Literal["auto", "sdpa", "flash", "math"] = "auto"
    checkpoint_blocks: bool = False


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Latent shards and how they are read."""

    path: str = ""  # folder (or http(s) address) that holds dataset.json
    reader: Literal["auto", "indexed", "stream"] = "auto"
    shuffle_group: int = 64  # shards shuffled together; 0 = all of them (exact shuffle)
    num_workers: int = 4
    check_crc: bool = True


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Path from data (t=0) to noise (t=1) and the distribution of t."""

    path: Literal["linear", "cosine"] = "linear"
    time: Literal["uniform", "lognormal", "logit_normal"] = "uniform"
    time_mean: float = 0.0  # logit_normal only
    time_std: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer by name; the exponential moving average of the weights is one of its states."""

    name: Literal["adamw", "torch_adamw", "torch_fused_adamw", "deepspeed_fused_adam", "apex_fused_adam"] = "adamw"
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0  # linear from 0 to lr, then constant
    grad_clip: float = 1.0  # global L2 norm; 0 = off
    ema_decay: float = 0.9999


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Who runs the step: batch sizes, precision, ZeRO stage."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "bf16"  # bf16 = autocast; weights and optimizer states stay fp32
    global_batch: int = 256
    micro_batch: int = 0  # samples per rank and backward pass; 0 = global_batch / ranks
    overlap_comm: bool = True
    reduce_bucket_size: int = 500_000_000
    allgather_bucket_size: int = 500_000_000
    communication_dtype: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Sample grids written while training (EMA weights, ODE)."""

    every: int = 10_000  # steps; 0 = never
    count: int = 16
    num_steps: int = 50
    sampler: Literal["euler", "heun", "sde"] = "euler"
    cfg_scale: float = 4.0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder, its length and what is kept."""

    dir: str = ""  # fixed by the configuration; starting the same command again resumes
    steps: int = 400_000
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 10_000
    keep_checkpoints: int = 3  # newest ones kept; 0 = all
    keep_every: int = 0  # steps that are multiples of this are kept for ever; 0 = none
    tensorboard: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run. `methods` holds one frozen Config per method, in order."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    methods: tuple[Any, ...] = ()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    run: RunConfig = field(default_factory=RunConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dictionary of a configuration; methods become `{name: {...}}` in order."""
    result: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            result[item.name] = to_dict(value)
        elif item.name == "methods":
            result[item.name] = {method.name: to_dict(method) for method in value}
        else:
            result[item.name] = list(value) if isinstance(value, tuple) else value
    return result


def from_dict(cls: type[T], values: Mapping[str, Any], methods: Mapping[str, type] | None = None, where: str = "") -> T:
    """Inverse of `to_dict`. `methods` maps method names to their Config classes.

    Raises ConfigError for unknown keys (with the nearest valid one) and for values of the wrong type.
    """
    hints, known = typing.get_type_hints(cls), [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{where}{key}"
        if key not in known:
            raise ConfigError(f"unknown configuration key '{path}'{_nearest(key, known)}")
        if key == "methods":
            arguments[key] = tuple(
                from_dict(_method_class(name, methods), entry, None, f"{path}.{name}.") for name, entry in value.items()
            )
        elif dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"'{path}' is a group of keys, not a value; set one of its fields")
            arguments[key] = from_dict(typing.cast(type, hints[key]), value, methods, f"{path}.")
        else:
            arguments[key] = _coerce(value, hints[key], path)
    return cls(**arguments)


def apply_overrides(config: T, assignments: Sequence[str], methods: Mapping[str, type] | None = None) -> T:
    """A copy of `config` with `key=value` assignments applied, in order.

    Keys are dotted paths (`model.skip_wiring=output`). `methods=a,b` replaces the list of methods (those already there
    keep their settings); `methods.a.field=x` sets a field of one of them. Values are written as on a command line.

    Raises ConfigError naming the key, the nearest valid key, or the value and the type that was expected.
    """
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"'{assignment}' is not of the form key=value")
        config = _set(config, key.strip().split("."), text.strip(), methods, key.strip())
    return config


def _set(config: Any, parts: Sequence[str], text: str, methods: Mapping[str, type] | None, path: str) -> Any:
    name, rest = parts[0], parts[1:]
    known = [item.name for item in dataclasses.fields(config)]
    if name not in known:
        raise ConfigError(f"unknown configuration key '{path}'{_nearest(name, known, path)}")
    value = getattr(config, name)
    if name == "methods":
        return dataclasses.replace(config, methods=_set_methods(value, rest, text, methods, path))
    if dataclasses.is_dataclass(value):
        if not rest:
            fields = ", ".join(item.name for item in dataclasses.fields(value))
            raise ConfigError(f"'{path}' is a group of keys; set one of its fields: {fields}")
        return dataclasses.replace(config, **{name: _set(value, rest, text, methods, path)})
    if rest:
        raise ConfigError(f"'{path}' goes below '{name}', which is a single value")
    return dataclasses.replace(config, **{name: _coerce(text, typing.get_type_hints(type(config))[name], path)})


def _set_methods(
    current: tuple[Any, ...], rest: Sequence[str], text: str, methods: Mapping[str, type] | None, path: str
) -> tuple[Any, ...]:
    by_name = {method.name: method for method in current}
    if not rest:
        names = [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]
        return tuple(by_name[name] if name in by_name else _method_class(name, methods)() for name in names)
    if rest[0] not in by_name:
        listed = ", ".join(by_name) or "none"
        raise ConfigError(f"'{path}': method '{rest[0]}' is not in this run (methods: {listed}); add methods={rest[0]}")
    if len(rest) == 1:
        raise ConfigError(f"'{path}' is a group of keys; set one of its fields")
    changed = _set(by_name[rest[0]], rest[1:], text, None, path)
    return tuple(changed if method.name == rest[0] else method for method in current)


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `key: old -> new` for every leaf that differs between two `to_dict` results."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = list(dict.fromkeys([*before, *after]))
    missing = "(absent)"
    return [
        f"{key}: {before.get(key, missing)} -> {after.get(key, missing)}"
        for key in keys
        if before.get(key, missing) != after.get(key, missing)
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def _method_class(name: str, methods: Mapping[str, type] | None) -> type:
    if methods is None or name not in methods:
        known = list(methods or ())
        raise ConfigError(f"unknown method '{name}'{_nearest(name, known)}")
    return methods[name]


def _nearest(name: str, known: Sequence[str], path: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        prefix = path.rpartition(name)[0] if path else ""
        return f"; did you mean '{prefix}{close[0]}'?"
    return f"; valid here: {', '.join(known)}"


def _coerce(value: Any, hint: Any, path: str) -> Any:
    """A value of the annotated type from text (command line) or from JSON."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        for choice in arguments:
            if value == choice or str(value) == str(choice):
                return choice
        raise ConfigError(f"'{path}' must be one of {', '.join(map(str, arguments))}, not '{value}'")
    if origin in (typing.Union, types.UnionType):
        if value is None or str(value).lower() == "none":
            return None
        return _coerce(value, next(kind for kind in arguments if kind is not type(None)), path)
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else list(value)
        return tuple(_coerce(item, arguments[0], path) for item in items)
    try:
        return _scalar(value, hint)
    except ValueError:
        raise ConfigError(f"'{path}' must be of type {hint.__name__}, not '{value}'") from None


def _scalar(value: Any, kind: type) -> Any:
    if kind is bool:
        text = str(value).lower()
        if text not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError
        return text in ("true", "1", "yes")
    if kind is int:
        number = float(value) if isinstance(value, str) and not value.lstrip("+-").isdigit() else value
        if isinstance(number, bool) or int(number) != float(number):
            raise ValueError
        return int(number)
    if kind is float:
        return float(value)
    return str(value)
