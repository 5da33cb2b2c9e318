"""MANIFEST.json and state.json of a checkpoint: what stands in them, and reading them without believing them.

A manifest names the step, bytes and sha256 of each file, and has a digest of itself; the first ones written have none.
Version 1 is of checkpoints whose tensors lie whole in one file each.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_fast.errors import CheckpointError

FORMAT = "dit_fast checkpoint"
VERSION, READS = 2, (1, 2)
MANIFEST, STATE = "MANIFEST.json", "state.json"
GROUPS = {"model": True, "ema": True, "optim": False, "rest": False}  # of files: whether there must be one
LARGEST = 1 << 28  # bytes of a JSON file
_KEYS = {"format", "version", "step", "files"}
_FILE = re.compile(r"([a-z]+)(?:-\d{5}-of-(\d{5}))?\.safetensors", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS: dict[str, type | tuple[type, ...]] = {  # of state.json, where they are there
    "step": int,
    "samples_seen": int,
    "optimizer_step": int,
    "seed": int,
    "dataset_fingerprint": str,
    "field_fingerprints": dict,
    "dataset_root": str,
    "ema_decay": (int, float),
    "config": dict,
    "autoencoder": dict,
    "ranks": int,
    "micro_batch": int,
    "versions": dict,
    "saved_at": str,
    "skipped_steps": list,
    "left_out": list,
    "recent_values": dict,
}


class State(dict[str, Any]):
    """The content of state.json. Reading a field that is not there raises CheckpointError."""

    path: Path

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self.path}: has no field '{key}'")


def file_name(group: str, k: int, count: int) -> str:
    """Name of file k (from 0) of the `count` files of a group."""
    numbers = "" if count == 1 and group != "optim" else f"-{k + 1:05d}-of-{count:05d}"
    return f"{group}{numbers}.safetensors"


def write_manifest(step: int, files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """MANIFEST.json; files: name -> {"bytes", "sha256"}."""
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
    return json.dumps({**manifest, "digest": _digest(manifest)}, indent=1).encode()


def read_manifest(path: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """(step, name -> (bytes, sha256)) of a MANIFEST.json. Raises CheckpointError saying what is wrong with it."""
    manifest = read_json(path)
    if manifest.get("format") != FORMAT or manifest.get("version") not in READS:
        found = f"format {manifest.get('format')!r:.40} version {manifest.get('version')!r:.40}"
        raise CheckpointError(f"{path}: {found}; this dit_fast reads {FORMAT!r} version {READS[0]} and {READS[1]}")
    if manifest.keys() - {"digest"} != _KEYS:
        raise CheckpointError(f"{path}: damaged (has the keys {', '.join(sorted(manifest)):.200})")
    if "digest" in manifest and manifest["digest"] != _digest(manifest):
        raise CheckpointError(f"{path}: damaged (its digest is of other content)")
    step, files = manifest["step"], manifest["files"]
    if not _is_count(step):
        raise CheckpointError(f"{path}: damaged (step is {step!r:.40})")
    _check_names(path, files)
    for name, entry in files.items():
        sound = isinstance(entry, dict) and _is_count(entry.get("bytes")) and isinstance(entry.get("sha256"), str)
        if not (sound and _SHA256.fullmatch(entry["sha256"])):
            raise CheckpointError(f"{path}: damaged (entry of {name})")
    return step, {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}


def read_state(path: Path) -> State:
    """The content of a state.json. Raises CheckpointError naming a field whose type or value is wrong."""
    state = State(read_json(path))
    state.path = path
    for name, kind in _FIELDS.items():
        if name in state and not (_is_count(state[name]) if kind is int else isinstance(state[name], kind)):
            raise CheckpointError(f"{path}: damaged ({name} is {state[name]!r:.40})")
    step: int = state["step"]
    applied: int = state.get("optimizer_step", 0)
    skipped: list[Any] = state.get("skipped_steps", [])
    if applied > step:
        raise CheckpointError(f"{path}: damaged ({applied} updates in {step} steps)")
    sound = all(_is_count(number) and 0 < number <= step for number in skipped) and sorted({*skipped}) == skipped
    if not sound or len(skipped) > step - applied:
        raise CheckpointError(f"{path}: damaged (skipped_steps is {skipped!r:.40})")
    for window in state.get("left_out", []):
        if not is_window(window):
            raise CheckpointError(f"{path}: damaged (left_out has {window!r:.40})")
    for name, values in state.get("recent_values", {}).items():
        if not isinstance(values, list) or not all(isinstance(x, float) and math.isfinite(x) for x in values):
            raise CheckpointError(f"{path}: damaged (recent_values of {name!r:.40})")
    return state


def is_window(value: Any) -> bool:
    """Whether this is [start, stop] of positions, as JSON has it."""
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)) and value[0] < value[1]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where there is none."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device would not end
            raise CheckpointError(f"{path}: is not a regular file")
        if path.stat().st_size > LARGEST:
            raise CheckpointError(f"{path}: damaged (has {path.stat().st_size} bytes)")
        value = json.loads(path.read_text())
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing, so {path.parent} is not a complete checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value


def _digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of everything else in a manifest, as JSON with sorted keys and without spaces."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_names(path: Path, files: Any) -> None:
    """Exactly the files of a checkpoint: what a manifest names is opened, so a path has no place in it."""
    names = set(files) if isinstance(files, dict) else set()
    counts = {match[1]: int(match[2] or 1) for name in sorted(names) if (match := _FILE.fullmatch(name))}
    expected = {file_name(group, k, count) for group, count in counts.items() for k in range(count)}
    must = {group for group, needed in GROUPS.items() if needed}
    if names != {STATE, *expected} or not must <= counts.keys() <= GROUPS.keys():
        raise CheckpointError(f"{path}: damaged (the files it names are {', '.join(sorted(names)) or None!s:.200})")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
