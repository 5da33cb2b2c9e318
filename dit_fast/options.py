"""Options: frozen dataclasses whose fields state meaning and range, as nested dictionaries and `key=value`.

A configuration is a dataclass of groups, a group a flat dataclass of `setting`s. The class of a group may be chosen by
name (`chosen`). Here are names, paths and differences; values are checked by `dit_fast.runs`, when a group is built.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from dit_fast.errors import ConfigError, UserError

T = TypeVar("T")
Build = Callable[[type, Mapping[str, Any], str], Any]  # class of a group, its values, its path -> the group


def setting(default: Any, text: str, within: str = "", resumes: bool = False) -> Any:
    """A dataclass field. text: its meaning. within: the interval of a number, e.g. "[0, 1)".

    resumes: a run that is resumed may have another value (it says where and how the run is done, not what it computes).
    """
    return field(default=default, metadata={"text": text, "within": within, "resumes": resumes})


def chosen(registry: Mapping[str, Any], default: Any, kind: Callable[[str], str] = str) -> Any:
    """The field of a group whose class is the `Config` of the component `registry[kind(name)]`, by the group's name.

    A default that is a tuple makes it a list of such groups, each name at most once.
    """
    return field(default=default, metadata={"registry": registry, "kind": kind})


@dataclass(frozen=True)
class Key:
    """One configuration key: its dotted path and what `setting` says about it. type: as it is shown to a reader."""

    path: str
    type: str
    default: Any
    text: str = ""
    within: str = ""
    resumes: bool = False


def keys(group: type, path: str) -> Iterator[Key]:
    """The keys of a group's class in the order of declaration. path: of the group."""
    hints = typing.get_type_hints(group)
    for item in dataclasses.fields(group):
        yield Key(f"{path}.{item.name}", _type_name(hints[item.name]), item.default, **item.metadata)


def groups(cls: type) -> Iterator[tuple[str, type]]:
    """Path and class of every group that a configuration may have."""
    for item in dataclasses.fields(cls):
        registry = item.metadata.get("registry", {})
        if isinstance(item.default, tuple):
            yield from ((f"{item.name}.{name}", component.Config) for name, component in registry.items())
        else:
            classes = [component.Config for component in registry.values()] or [type(item.default)]
            yield from ((item.name, group) for group in classes)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dictionary of a configuration; a list of groups becomes `{name: {...}}`, in order."""
    result: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(item.default, tuple):
            if not isinstance(value, tuple) or not all(hasattr(each, "name") for each in value):
                raise ConfigError(f"'{item.name}' must be a tuple of configurations with a name, not {shown(value)}")
            names = _once([each.name for each in value], item.name)
            result[item.name] = dict(zip(names, map(_values, value), strict=True))
        else:
            named = {"name": getattr(value, "name", "")} if "registry" in item.metadata else {}
            result[item.name] = named | _values(value) if dataclasses.is_dataclass(value) else value
    return result


def _values(group: Any) -> dict[str, Any]:
    values = {item.name: getattr(group, item.name) for item in dataclasses.fields(group)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def build(group: type, values: Mapping[str, Any], path: str) -> Any:
    """A group with these values, which are of their defaults' types but not checked further. Raises ConfigError."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for item in dataclasses.fields(group):
        if item.default is not None and type(given.get(item.name, item.default)) is not type(item.default):
            raise ConfigError(
                f"'{path}.{item.name}' must be of type {type(item.default).__name__}, not {shown(values[item.name])}"
            )
    return group(**given)


def from_dict(cls: type[T], values: Any, build: Build = build) -> T:
    """Inverse of `to_dict`; what is left out has its default.

    Raises ConfigError for an unknown key or name, with the nearest valid one, and whatever `build` raises.
    """
    items = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    _refuse_unknown(_mapping(values, "the configuration"), items, "")
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        item, entries = items[key], _mapping(value, key)
        if isinstance(item.default, tuple):
            built = [_built(_config(item, name), each, f"{key}.{name}", build) for name, each in entries.items()]
            arguments[key] = tuple(built)
        else:
            chosen = "registry" in item.metadata
            group = _config(item, entries.get("name", item.default.name)) if chosen else type(item.default)
            arguments[key] = _built(group, entries, key, build)
    return cls(**arguments)


def _built(group: type, values: Any, path: str, build: Build) -> Any:
    names = [item.name for item in dataclasses.fields(group)]
    of_class = {"name"} - {*names} if hasattr(group, "name") else set()
    _refuse_unknown(_mapping(values, path), [*names, *of_class], f"{path}.")
    if of_class & values.keys() and values["name"] != group.name:  # type: ignore[attr-defined]
        raise ConfigError(f"'{path}.name' cannot be {shown(values['name'])}; give the group under that name instead")
    return build(group, {name: value for name, value in values.items() if name not in of_class}, path)


def _mapping(values: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"'{path}' must be a group of keys, not {shown(values)}")
    return values


def _refuse_unknown(names: Iterable[str], known: Iterable[str], prefix: str) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown configuration key {shown(prefix + name)}{nearest(name, known, prefix)}")


def _config(item: dataclasses.Field[Any], name: Any) -> type:
    """The class of a group that `item` chooses by this name."""
    registry, key = item.metadata["registry"], item.name
    if not isinstance(name, str):
        raise ConfigError(f"'{key}.name' must be of type str, not {shown(name)}")
    kind = item.metadata["kind"](name)
    if kind not in registry:
        none = f" ({key}=none for none)" if isinstance(item.default, tuple) else ""
        raise ConfigError(f"unknown {key.rstrip('s')} {shown(name)}{nearest(str(name), registry)}{none}")
    return registry[kind].Config


def _once(names: list[str], key: str) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{key.rstrip('s')} {shown(name)} is listed twice; keep one")
    return names


def assign(config: Any, assignments: Sequence[str]) -> dict[str, Any]:
    """`to_dict(config)` with `key=value` assignments put in, the last one of a key winning; their values are text.

    Keys are dotted paths (`model.skip_wiring=output`). `objective=NAME` chooses another class, with its defaults;
    `methods=a,b` replaces the list (those already there keep their settings), `methods.a.key=x` sets a key of one of
    them. Choices come first, in whatever order the assignments stand. Raises ConfigError naming the key.
    """
    tree = to_dict(config)
    choices = {item.name: item for item in dataclasses.fields(config) if "registry" in item.metadata}
    lists = {key for key, item in choices.items() if isinstance(item.default, tuple)}
    settings: list[tuple[str, str]] = []
    for assignment in assignments:
        path, separator, text = (part.strip() for part in assignment.partition("="))
        key = path.removesuffix(".name")
        if not separator or not path:
            raise ConfigError(f"{shown(assignment)} is not of the form key=value")
        if path in lists:
            names = [] if text.lower() == "none" else [name.strip() for name in text.split(",")]
            tree[path] = {name: tree[path].get(name, {}) for name in _once(names, path)}
        elif key in choices.keys() - lists:
            same = _config(choices[key], text) is _config(choices[key], tree[key]["name"])
            tree[key] = {**(tree[key] if same else {}), "name": text}
        else:
            settings.append((path, text))
    for path, text in settings:
        *parts, last = path.split(".")
        place = tree
        for depth, part in enumerate(parts):
            if depth and parts[0] in lists and part not in place:
                listed = ", ".join(map(shown, place)) or "none"
                raise ConfigError(f"{shown(path)}: {shown(part)} is not in this run; add it to {parts[0]}= ({listed})")
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{shown(path)} goes below '{part}', which is a single value")
        place[last] = text
    return tree


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `key: old -> new` for every leaf that differs between two nested dictionaries."""
    before, after = dict(leaves(old)), dict(leaves(new))
    lines = []
    for key in dict.fromkeys([*before, *after]):
        was, now = (json.dumps(side[key]) if key in side else "(absent)" for side in (before, after))
        if was != now:
            lines.append(f"{key}: {was} -> {now}")
    return lines


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value, of everything in a nested dictionary that is not a filled group."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{close[0]}'?" if close else f"; valid here: {', '.join(names)}"


def shown(value: Any) -> str:
    """A value as it was given, in quotes, in one short line whatever it holds."""
    try:
        text = repr(value if isinstance(value, str) else str(value))
    except ValueError:  # an integer too long to be written
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:76]}...'"


def check_choice(name: str, value: object, valid: Any) -> None:
    """Raises UserError unless value is one of a `Literal`."""
    if value not in typing.get_args(valid):
        raise UserError(f"unknown {name} '{value}'; valid: {', '.join(typing.get_args(valid))}")


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if kind is type(None) else _type_name(kind) for kind in arguments)
    return f"list of {_type_name(arguments[0])}" if origin is tuple else hint.__name__


HEAD = """# Configuration

Every key of a run, generated from the code by `python -m dit_fast.recipes`. Keys are set as `key=value` on the command
line (`optimizer.lr=2e-4`) or in a `.json` configuration, where each dot is a level. Defaults are those of the classes;
a recipe may differ (`dit-fast train RECIPE --print-config` shows its values). A square bracket includes the bound, a
round one does not. Keys marked *yes* may change when a run is resumed.

`objective=NAME` chooses another objective, with its defaults. `methods=a,b` sets the list of methods, `methods=none`
empties it (as `none` does every list); order is kept, and so are the settings of those that were in it. Sizes of the
model that are 0 are those of its name. Choices are made before single keys are set, in whatever order they stand
on the command line.
"""


def reference(config: type) -> str:
    """docs/configuration.md: every key of every group that a configuration may have, from the declarations."""
    return "\n".join([HEAD, *(_table(path, group) for path, group in groups(config))])


def _table(path: str, group: Any) -> str:
    rows, text = list(keys(group, path)), group.__doc__
    title, (component, _, nested) = path, group.__qualname__.partition(".")
    if nested and not path.endswith(f".{group.name}"):
        sizes = any(key.path == f"{path}.name" for key in rows)  # one class for several names
        title += f"={component}-..." if sizes else f"={group.name}"
    lines = [f"## {title}\n", f"{text}\n", "| Key | Values | Default | Resumed | Meaning |", "|---|---|---|---|---|"]
    for key in rows:
        default = str(key.default).lower() if isinstance(key.default, bool | None) else str(key.default) or "(empty)"
        resumed = "yes" if key.resumes else ""
        lines.append(f"| `{key.path}` | {f'{key.type} {key.within}'.strip()} | {default} | {resumed} | {key.text} |")
    return "\n".join(lines) + "\n"
