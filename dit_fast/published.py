"""Reading files of the published training codes: which tensors they hold, under their plain names."""

import argparse
import collections
import datetime
import pathlib
import re
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.terminal import one_line

# What DDP, torch.compile, FSDP (old and new) and activation checkpointing put into names, in any order and place.
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\."
)
WEIGHTS = ("ema", "model")
# Under which names files hold them. What Lightning, DeepSpeed and the like hold alone is what there is.
NAMES = {
    "ema": ("ema", "ema_state_dict", "state_dict_ema", "model_ema"),
    "model": ("state_dict", "model_state_dict", "module", "model", "encoder"),  # I-JEPA: the last
}
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class PublishedState(NamedTuple):
    """A state_dict with plain names; what the file says about its model; whether its order is the author's.

    facts: the metadata of a `.safetensors` file (a format that keeps no order of tensors), or the training arguments.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    ordered: bool


def read_published(path: str | Path) -> dict[str, Any]:
    """What a `.pt` file holds: a bare state_dict, or a dictionary with `model`, `ema`, `opt`, `args`, `steps`.

    Unpickling admits tensors, plain values and classes that only hold such values (`argparse.Namespace`, paths, numpy
    scalars and arrays, dates), nothing else.
    Raises CheckpointError if the file is missing, empty or truncated, or holds other objects, naming the first of them.
    """
    path = _existing(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_harmless()):
            warnings.simplefilter("ignore")  # torch warns of what then becomes an error
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever the unpickler stumbles over
        raise CheckpointError(f"{path}: {one_line(_reason(error))}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state_dict")
    return dict(content)


def read_state(source: str | Path | Mapping[str, Any], weights: str = "ema") -> PublishedState:
    """The state_dict of a file (`.safetensors`, or anything else that torch.save writes) or of a dictionary.

    weights: which weights of a training checkpoint, "ema" or "model"; a bare state_dict has only one.
    Raises CheckpointError if the wanted weights are absent or two names collide once wrapper prefixes are gone.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights must be 'ema' or 'model', not '{weights}'")
    if not isinstance(source, (str, Path, Mapping)):
        raise CheckpointError(f"a {type(source).__name__} is no checkpoint; give a path or a state_dict")
    if isinstance(source, Mapping):
        content, where = source, "state_dict"
    elif _is_safetensors(path := _existing(source)):
        content, header = _read_safetensors(path)
        return PublishedState(_owned(_plain(content), weights, str(path)), dict(header), False)
    else:
        content, where = read_published(path), str(path)
    arguments = content.get("args")
    if isinstance(arguments, argparse.Namespace | types.SimpleNamespace):
        arguments = vars(arguments)
    facts = dict(arguments) if isinstance(arguments, Mapping) else {}
    return PublishedState(_owned(_plain(_pick(content, weights, where)), weights, where), facts, True)


def _pick(content: Mapping[Any, Any], weights: str, where: str) -> Mapping[Any, Any]:
    found = {
        kind: name
        for kind, names in NAMES.items()
        for name in reversed(names)
        if isinstance(content.get(name), Mapping) and any(isinstance(entry, Tensor) for entry in content[name].values())
    }
    name = found.get(weights)
    if name is None and found.get("model") not in (None, "model"):
        name = found["model"]
    if name is not None:
        return content[name]
    if found:
        raise CheckpointError(f"{where}: holds no '{weights}' weights; pass weights='{next(iter(found))}'")
    if not any(isinstance(value, Tensor) for value in content.values()):
        keys = one_line(", ".join(map(str, list(content)[:10])) or "none")
        looked = ", ".join(repr(name) for names in NAMES.values() for name in names)
        raise CheckpointError(
            f"{where}: holds tensors neither itself nor under {looked} (its first keys: {keys}); give its state_dict"
        )
    return content


def _plain(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"entry {name!r} is named by {type(name).__name__}, not by text; this is no state_dict"
            )
        if not name.isprintable():
            raise CheckpointError(f"entry {name!r} is not named like a parameter; rename or remove it")
        plain = WRAPPERS.sub("", name)
        if not isinstance(value, Tensor):
            raise CheckpointError(f"entry '{name}' is {type(value).__name__}, not a tensor; remove it")
        if plain in result:
            raise CheckpointError(f"'{name}' and another entry are both named '{plain}' without wrapper prefixes")
        result[plain] = value
    return result


def _owned(state: dict[str, Tensor], weights: str, where: str) -> dict[str, Tensor]:
    """Trainers that are modules themselves (Lightning) put the attribute's name, model or ema, before every name."""
    owners = [owner for owner in WEIGHTS if any(name.startswith(f"{owner}.") for name in state)]
    if not owners:
        return state
    for name in state:
        if name.partition(".")[0] not in WEIGHTS:
            raise CheckpointError(
                f"{where}: holds '{name}' beside '{owners[0]}.*'; give the entries of the model alone"
            )
    if weights not in owners:
        raise CheckpointError(f"{where}: holds no '{weights}' weights; pass weights='{owners[0]}'")
    return {name.removeprefix(f"{weights}."): value for name, value in state.items() if name.startswith(f"{weights}.")}


def _existing(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        inside = sorted(item.name for suffix in ("pt", "safetensors") for item in path.glob(f"*.{suffix}"))
        raise CheckpointError(f"{path}: is a folder; give a file" + (f", e.g. {path / inside[0]}" if inside else ""))
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty; copy it again")
    if path.suffix == ".json":
        raise CheckpointError(
            f"{path}: an index of a checkpoint in several files; join them into one dictionary of tensors and give that"
        )
    return path


def _is_safetensors(path: Path) -> bool:
    """By the name, or by the first bytes (length of the header, then JSON) where the name is another."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors ({str(error).splitlines()[0]})") from error


def _harmless() -> list[Any]:
    """Classes and functions that only hold values. Files name some of them by the module of another version.

    Not range: a few bytes of `list(range(10**12))` would take all memory.
    """
    paths = [pathlib.PurePosixPath, pathlib.PureWindowsPath]
    named: list[Any] = [(paths[0], f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")]
    named += [(paths[1], f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")]
    named += [(path, f"{module}.{path.__name__}") for path in paths for module in ("pathlib", "pathlib._local")]
    made_by = {"scalar": np.float32(0).__reduce__()[0], "_reconstruct": np.zeros(0).__reduce__()[0]}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        named += [(function, f"{module}.{name}") for name, function in made_by.items()]
    numpy = [np.ndarray, np.dtype, *(getattr(np.dtypes, name) for name in np.dtypes.__all__)]
    values = [argparse.Namespace, types.SimpleNamespace, collections.defaultdict, frozenset, slice]
    dates = [datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone]
    return [*named, *numpy, *values, *dates, int, float, str, bool, list, dict, tuple]


def _reason(error: Exception) -> str:
    text = _ESCAPES.sub("", str(error))
    if match := re.search(r"GLOBAL (\S+)", text):
        return (
            f"holds '{match[1]}', which is neither a tensor nor a plain value and could run code; where that object is "
            "known, save state_dicts and plain values only (torch.save({'model': model.state_dict()}, FILE))"
        )
    if "TorchScript" in text:
        return (
            "is a TorchScript program, as OpenAI's CLIP files are, and not opened, since it could run code; if you "
            "trust it, save its weights (torch.save(torch.jit.load(FILE).state_dict(), OTHER))"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    told = [line for line in lines if not line.startswith(("Weights only load failed", "Check the documentation", "("))]
    if "protocol" in text or "Unsupported operand" in text:
        told = ["damaged, or written with another pickle protocol than torch.save's default; copy or save it again"]
    return f"not readable as a checkpoint of tensors ({(told or lines)[0][:300]})"
