"""Options: frozen dataclasses whose fields state meaning and range, built from JSON and from `key=value`.

`setting` declares a field. Whatever the door (a recipe, a JSON file, the command line, the state of a checkpoint, an
object made in Python), values pass through `from_dict`, which converts and checks them; so an error names the key, what
was given and what is allowed, in one line.
"""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal, TypeVar

from dit_fast.errors import ConfigError

T = TypeVar("T")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,6})?", re.ASCII)
_INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def setting(default: Any, text: str, within: str = "", resumes: bool = False) -> Any:
    """A dataclass field. text: its meaning. within: the interval of a number, e.g. "[0, 1)"; of each item in a tuple.

    resumes: a run that is resumed may have another value (it says where and how the run is done, not what it computes).
    """
    return field(default=default, metadata={"text": text, "within": within, "resumes": resumes})


@dataclass(frozen=True)
class Key:
    """One configuration key: its dotted path and what `setting` says about it. type: as it is shown to a reader."""

    path: str
    type: str
    default: Any
    text: str
    within: str
    resumes: bool


def keys(cls: type, where: str = "") -> Iterator[Key]:
    """Every key of a configuration class in the order of declaration, without those of methods."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from keys(hints[item.name], f"{where}{item.name}.")
        elif item.name != "methods":
            more = {"text": "", "within": "", "resumes": False, **item.metadata}
            yield Key(f"{where}{item.name}", _type_name(hints[item.name]), item.default, **more)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dictionary of a configuration; methods become `{name: {...}}` in order."""
    result: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            result[item.name] = to_dict(value)
        elif item.name == "methods":
            names = _method_names(config)
            _refuse_repeated(names)
            result[item.name] = dict(zip(names, map(to_dict, value), strict=True))
        else:
            result[item.name] = list(value) if isinstance(value, tuple) else value
    return result


def from_dict(cls: type[T], values: Any, methods: Mapping[str, type] | None = None, where: str = "") -> T:
    """Inverse of `to_dict`. `methods` maps method names to their Config classes.

    Raises ConfigError for unknown keys (with the nearest valid one), for values of the wrong type or out of range, and
    for what the class itself refuses.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{_shown(where.rstrip('.') or 'the configuration')} must be a group of keys, not {_shown(values)}"
        )
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{where}{key}"
        if key not in fields:
            raise ConfigError(f"unknown configuration key {_shown(path)}{_nearest(key, list(fields), where)}")
        if key == "methods":
            if not isinstance(value, Mapping):
                raise ConfigError(f"'{path}' must be a group {{name: {{key: value}}}}, not {_shown(value)}")
            arguments[key] = tuple(
                from_dict(_method_class(name, methods), entry, None, f"{path}.{name}.") for name, entry in value.items()
            )
        elif dataclasses.is_dataclass(hints[key]):
            arguments[key] = from_dict(typing.cast(type, hints[key]), value, methods, f"{path}.")
        else:
            arguments[key] = _converted(value, hints[key], path, fields[key].metadata.get("within", ""))
    return cls(**arguments)


def checked(config: T) -> T:
    """An equal configuration that went through every check. Raises ConfigError as `from_dict` does."""
    return from_dict(type(config), to_dict(config), _method_classes(config))


def apply_overrides(config: T, assignments: Sequence[str], methods: Mapping[str, type] | None = None) -> T:
    """A copy of `config` with `key=value` assignments applied, the last one of a key winning.

    Keys are dotted paths (`model.skip_wiring=output`). `methods=a,b` replaces the list of methods (those already there
    keep their settings); `methods.a.field=x` sets a field of one of them. Values are written as on a command line.

    Raises ConfigError naming the key, the nearest valid key, or the value and what was expected.
    """
    known = {**(methods or {}), **_method_classes(config)}
    tree = to_dict(config)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        path = path.strip()
        if not separator or not path:
            raise ConfigError(f"{_shown(assignment)} is not of the form key=value")
        _assign(tree, type(config), path.split("."), text.strip(), known, path)
    return from_dict(type(config), tree, known)


def _assign(
    tree: dict[str, Any], cls: type, parts: Sequence[str], text: str, methods: Mapping[str, type], path: str
) -> None:
    name, rest = parts[0], parts[1:]
    hints = typing.get_type_hints(cls)
    known = [item.name for item in dataclasses.fields(cls)]
    if name not in known:
        prefix = path[: len(path) - len(".".join(parts))]
        raise ConfigError(f"unknown configuration key {_shown(path)}{_nearest(name, known, prefix)}")
    if name == "methods":
        _assign_method(tree, rest, text, methods, path)
    elif dataclasses.is_dataclass(hints[name]):
        _assign_below(tree[name], typing.cast(type, hints[name]), rest, text, methods, path)
    elif rest:
        raise ConfigError(f"{_shown(path)} goes below '{name}', which is a single value")
    else:
        tree[name] = text


def _assign_below(
    tree: dict[str, Any], cls: type, rest: Sequence[str], text: str, methods: Mapping[str, type], path: str
) -> None:
    if not rest:
        names = ", ".join(item.name for item in dataclasses.fields(cls))
        raise ConfigError(f"{_shown(path)} is a group of keys; set one of its fields: {names}")
    _assign(tree, cls, rest, text, methods, path)


def _assign_method(
    tree: dict[str, Any], rest: Sequence[str], text: str, methods: Mapping[str, type], path: str
) -> None:
    current = tree["methods"]
    if rest:
        if rest[0] not in current:
            listed = ", ".join(current) or "none"
            raise ConfigError(
                f"{_shown(path)}: no method {_shown(rest[0])} in this run (methods: {listed}); add it to methods="
            )
        _assign_below(current[rest[0]], methods[rest[0]], rest[1:], text, {}, path)
        return
    names = [] if text.lower() == "none" else [name.strip() for name in text.split(",")]
    for name in names:
        _method_class(name, methods)
    _refuse_repeated(names)
    tree["methods"] = {name: current.get(name, {}) for name in names}


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `key: old -> new` for every leaf that differs between two `to_dict` results."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    every = list(dict.fromkeys([*before, *after]))
    missing = "(absent)"
    return [
        f"{key}: {before.get(key, missing)} -> {after.get(key, missing)}"
        for key in every
        if before.get(key, missing) != after.get(key, missing)
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def _method_classes(config: Any) -> dict[str, type]:
    return dict(zip(_method_names(config), map(type, getattr(config, "methods", ())), strict=True))


def _method_names(config: Any) -> list[str]:
    methods = getattr(config, "methods", ())
    if not isinstance(methods, tuple) or not all(hasattr(method, "name") for method in methods):
        raise ConfigError(f"'methods' must be a tuple of method configurations, not {_shown(methods)}")
    return [method.name for method in methods]


def _method_class(name: str, methods: Mapping[str, type] | None) -> type:
    if methods is None or name not in methods:
        known = list(methods or ())
        raise ConfigError(f"unknown method {_shown(name)}{_nearest(name, known)} (methods=none for none)")
    return methods[name]


def _refuse_repeated(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"method '{name}' is listed twice; keep one")


def _nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{prefix}{close[0]}'?"
    return f"; valid here: {', '.join(known)}"


def _shown(value: Any) -> str:
    """A value as it was given, in quotes, in one short line whatever it holds."""
    try:
        text = repr(value if isinstance(value, str) else str(value))
    except ValueError:  # an integer too long to be written
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:76]}...'"


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if kind is type(None) else _type_name(kind) for kind in arguments)
    return f"list of {_type_name(arguments[0])}" if origin is tuple else hint.__name__


def _converted(value: Any, hint: Any, path: str, within: str) -> Any:
    """A value of the annotated type, from text (command line) or from JSON, inside its interval."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        for choice in arguments:
            if type(value) in (str, type(choice)) and str(value) == str(choice):
                return choice
        raise ConfigError(f"'{path}' must be one of {', '.join(map(str, arguments))}, not {_shown(value)}")
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return _converted(value, next(kind for kind in arguments if kind is not type(None)), path, within)
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"'{path}' must be of type {_type_name(hint)}, not {_shown(value)}")
        return tuple(_converted(item, arguments[0], path, within) for item in items)
    result = _scalar(value, hint)
    if result is None:
        raise ConfigError(f"'{path}' must be of type {hint.__name__}, not {_shown(value)}")
    if isinstance(result, float) and not math.isfinite(result):
        raise ConfigError(f"'{path}' must be a finite number, not {_shown(value)}")
    if within and not _inside(result, within):
        raise ConfigError(f"{path}={_shown(result)[1:-1]} must lie in {within}")
    return result


def _scalar(value: Any, kind: type) -> Any:
    """The value as bool, int, float or str, without rounding and without guessing; None where it is not one."""
    if kind is bool:
        return value if isinstance(value, bool) else _BOOLS.get(value.lower()) if isinstance(value, str) else None
    if kind is str:
        return value if isinstance(value, str) and "\0" not in value else None
    if isinstance(value, str):
        value = Decimal(value) if _NUMBER.fullmatch(value.strip()) else None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    try:
        if kind is float:
            return float(value) if float(value) or not value else None  # too small to be told from 0
        if isinstance(value, Decimal) and value and abs(value.adjusted()) > 40:  # 10^6 digits are no number of anything
            return None
        return int(value) if int(value) == value else None
    except (OverflowError, ValueError):  # inf, nan, or more than a float can hold
        return math.inf if kind is float else None


def _inside(value: float, within: str) -> bool:
    match = _INTERVAL.fullmatch(within)
    assert match, f"{within!r} is not an interval"
    low, high = (2 ** int(text[2:]) if text.startswith("2^") else float(text) for text in match.group(2, 3))
    above = value >= low if match[1] == "[" else value > low
    below = value <= high if match[4] == "]" else value < high
    return above and below
