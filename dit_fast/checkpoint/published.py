"""Reading files of the published training codes: which tensors they hold, under their plain names."""

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_fast.errors import CheckpointError, ConfigError

WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")  # DDP, torch.compile


def read_published(path: str | Path) -> dict[str, Any]:
    """What a `.pt` file holds: a bare state_dict, or a dictionary with `model`, `ema`, `opt`, `args`, `steps`.

    Unpickling admits tensors and `argparse.Namespace` (which the published trainers store), nothing else.
    Raises CheckpointError if the file is missing, truncated or holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{path}: not readable as a checkpoint of tensors ({reason[:200]})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state_dict")
    return dict(content)


def read_state(
    source: str | Path | Mapping[str, Any], weights: str = "ema"
) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """(state_dict with plain names, header, whether its order is the author's) of a file or of a dictionary.

    weights: which weights of a training checkpoint, "ema" or "model"; a bare state_dict has only one. The header is
    the metadata of a `.safetensors` file, a format that does not keep the order of its tensors.
    Raises CheckpointError if the wanted weights are absent or two names collide once wrapper prefixes are gone.
    """
    if weights not in ("ema", "model"):
        raise ConfigError(f"weights must be 'ema' or 'model', not '{weights}'")
    if isinstance(source, Mapping):
        return _plain(_pick(source, weights, "state_dict")), {}, True
    if Path(source).suffix == ".safetensors":
        tensors, header = _read_safetensors(Path(source))
        return _plain(tensors), header, False
    return _plain(_pick(read_published(source), weights, str(source))), {}, True


def _pick(content: Mapping[str, Any], weights: str, where: str) -> Mapping[str, Any]:
    if any(isinstance(value, Tensor) for value in content.values()):
        return content
    choices = [key for key in ("ema", "model") if isinstance(content.get(key), Mapping)]
    if not choices:
        raise CheckpointError(
            f"{where}: holds neither tensors nor 'ema' nor 'model' (keys: {', '.join(map(str, content))})"
        )
    if weights not in choices:
        raise CheckpointError(f"{where}: holds no '{weights}' weights; pass weights='{choices[0]}'")
    return content[weights]


def _plain(state: Mapping[str, Any]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        plain = WRAPPERS.sub("", name)
        if not isinstance(value, Tensor):
            raise CheckpointError(f"entry '{name}' is a {type(value).__name__}, not a tensor")
        if plain in result:
            raise CheckpointError(f"'{name}' and another entry are both named '{plain}' without wrapper prefixes")
        result[plain] = value
    return result


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors ({str(error).splitlines()[0]})") from error
