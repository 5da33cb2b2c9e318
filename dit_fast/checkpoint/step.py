"""One checkpoint of a training run: safetensors, JSON and a manifest, free of ZeRO stage and rank count.

`step_00001000/` holds model.safetensors and ema.safetensors (every entry of the model's state dict, float32 masters),
optim-00001-of-00001.safetensors ("exp_avg.NAME", "exp_avg_sq.NAME"), rest.safetensors ("METHOD.NAME", only where a
method has moving state of its own), state.json, and MANIFEST.json (bytes and sha256 of each file, a digest of itself),
which is written last. Of n ranks each writes files of its own, model-0000k-of-0000n.safetensors and so on. A file holds
a tensor whole, or a piece of it: a flat tensor of which "pieces" in the file's metadata says where it belongs, as JSON
{key: [first element, shape of the whole]}. The pieces in the files of a kind make up each tensor, without a gap.

The step in the folder's name, in the manifest and in state.json is the same. A folder without a manifest, or with the
suffix .partial, is not a checkpoint. Nothing here is a pickle. Whatever is wrong with one is a CheckpointError of one
line.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_fast.checkpoint.manifest import MANIFEST, STATE, State, read_manifest, read_state
from dit_fast.errors import CheckpointError

FOLDER = "checkpoints"  # inside the run folder
KINDS = {"model": "model", "ema": "ema", "exp_avg": "optim", "exp_avg_sq": "optim", "rest": "rest"}  # their files
PIECES = "pieces"  # in the metadata of a file
DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAME = re.compile(r"step_(\d{8}|[1-9]\d{8,})", re.ASCII)


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def key_of(kind: str, name: str) -> str:
    """What a tensor is called inside of its file."""
    return f"{kind}.{name}" if KINDS[kind] == "optim" else name


def extremes(tensor: Tensor) -> Tensor:
    """Least and largest value as float64 [2]: both are finite where the whole tensor is. One pass, where
    `torch.isfinite` takes several."""
    if not tensor.numel() or not tensor.is_floating_point():
        return torch.zeros(2, dtype=torch.float64, device=tensor.device)
    return torch.stack(torch.aminmax(tensor.detach())).double()


class Piece(NamedTuple):
    """Elements first : end of a flattened tensor: all of what lies under a key of an open file."""

    first: int
    end: int
    file: Any
    key: str


class Stored(NamedTuple):
    """A tensor of a checkpoint. pieces: in order."""

    dtype: str
    shape: list[int]
    pieces: list[Piece]


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose manifest and state were read. files: name -> (bytes, sha256). state: step, samples_seen,
    optimizer_step, skipped_steps, left_out, config, data set fingerprint, versions."""

    path: Path
    step: int
    files: dict[str, tuple[int, str]]
    state: State

    def verify(self, kinds: Collection[str] = tuple(KINDS)) -> None:
        """Raises CheckpointError naming a file that is missing, unreadable, or of another size or content.

        kinds: those that the caller reads beside the state; by default all.
        """
        for name in [STATE, *dict.fromkeys(file for kind in kinds for file in self.files_of(kind))]:
            path, (size, digest) = self.path / name, self.files[name]
            try:
                if not path.is_file():
                    raise CheckpointError(f"{path}: is missing")
                if path.stat().st_size != size:
                    raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, its manifest says {size}")
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        raise CheckpointError(f"{path}: content differs from its manifest (sha256)")
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
            if name != STATE:
                self._open(name)

    def files_of(self, kind: str) -> list[str]:
        """Names of the files that hold a kind of KINDS, sorted."""
        group = KINDS[kind]
        return sorted(file for file in self.files if file.startswith((f"{group}.", f"{group}-")))

    def digest(self, kind: str) -> str:
        """sha256 of the file that holds a kind; where there are several, of theirs in order, as text."""
        digests = [self.files[file][1] for file in self.files_of(kind)]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def source(self, kind: str) -> Callable[..., Tensor]:
        """A function from parameter name to CPU tensor, for a kind of KINDS.

        With two numbers behind the name it gives these elements, from one up to the other, of the flattened tensor, and
        reads no others.
        """
        where = self._where(kind)

        def tensor(name: str, first: int = 0, end: int | None = None) -> Tensor:
            if name not in where:
                raise CheckpointError(
                    f"{self.path}: holds no {kind} of parameter '{name}'; was it made by another model?"
                )
            _, shape, pieces = where[name]
            last = math.prod(shape) if end is None else end
            parts = [
                self._reading(partial(each.file.get_tensor, each.key)).reshape(-1)[
                    max(first - each.first, 0) : last - each.first
                ]
                for each in pieces
                if (each.first < last and first < each.end) or len(pieces) == 1
            ]
            flat = parts[0] if len(parts) == 1 else torch.cat(parts)
            return flat.reshape(shape) if end is None else flat

        return tensor

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind, sorted."""
        return sorted(self._where(kind))

    def require(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError where one of `tensors` (by name) is not there in the same shape and dtype."""
        where = self._where(kind)
        for name, wanted in tensors.items():
            if name not in where:
                reason = f"holds no {kind} of parameter '{name}'"
            else:
                have = where[name][:2]
                want = (DTYPES[wanted.dtype], list(wanted.shape))
                if have == want:
                    continue
                reason = f"{kind} of '{name}' is {have[0]} {have[1]}, the model's is {want[0]} {want[1]}"
            raise CheckpointError(f"{self.path}: {reason}; was it made by another model?")

    def require_finite(self) -> None:
        """Raises CheckpointError naming a tensor that holds NaN or Inf."""
        for kind in KINDS:
            source = self.source(kind)
            for name in self.names(kind):
                if not extremes(source(name)).isfinite().all():
                    raise CheckpointError(f"{self.path}: {kind} of '{name}' is not finite")

    def state_dict(self, kind: str = "ema") -> dict[str, Tensor]:
        """All weights ("model") or their moving averages ("ema") by name, float32 on the CPU."""
        source = self.source(kind)
        return {name: source(name) for name in self.names(kind)}

    def _where(self, kind: str) -> dict[str, Stored]:
        """The tensors of a kind by name. Raises CheckpointError for one whose pieces do not make it up."""
        prefix = key_of(kind, "")
        found: dict[str, list[tuple[str, list[int], Piece]]] = {}
        for file in self.files_of(kind):
            handle = self._open(file)
            parts = self._parts(file, handle)
            for key in handle.keys():  # noqa: SIM118
                if key.startswith(prefix):
                    here = handle.get_slice(key)
                    first, shape = parts.get(key, (0, here.get_shape()))
                    end = first + math.prod(here.get_shape())
                    entry = (here.get_dtype(), shape, Piece(first, end, handle, key))
                    found.setdefault(key.removeprefix(prefix), []).append(entry)
        where: dict[str, Stored] = {}
        for name, entries in found.items():
            entries.sort(key=lambda entry: entry[2].first)
            dtype, shape, _ = entries[0]
            pieces, end = [piece for *_, piece in entries], 0
            for other, whole, piece in entries:
                if (piece.first, other, whole) != (end, dtype, shape):
                    raise CheckpointError(f"{self.path}: damaged (the pieces of {kind} of '{name}' do not fit)")
                end = piece.end
            if end != math.prod(shape):
                raise CheckpointError(f"{self.path}: damaged ({kind} of '{name}' lacks a piece)")
            where[name] = Stored(dtype, shape, pieces)
        return where

    def _parts(self, file: str, handle: Any) -> dict[str, tuple[int, list[int]]]:
        """Where the pieces in a file belong: key -> first element, shape of the whole."""
        text = (handle.metadata() or {}).get(PIECES, "{}")
        try:
            parts = {key: (first, shape) for key, (first, shape) in json.loads(text).items()}
            sound = all(
                isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**63 for n in [first, *shape])
                for first, shape in parts.values()
            )
        except (ValueError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise CheckpointError(f"{self.path / file}: damaged (its metadata does not say where its pieces belong)")
        return parts

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        return self._reading(lambda: safe_open(self.path / file, framework="pt"), file)

    def _reading(self, read: Callable[[], Any], file: str = "") -> Any:
        from safetensors import SafetensorError

        try:
            return read()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / file}: cannot be read as safetensors ({error})") from None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Reads manifest and state of a step folder. Raises CheckpointError where they are missing or do not agree."""
    path = Path(path)
    step, files = read_manifest(path / MANIFEST)
    state = read_state(path / STATE)
    # a copy may bear any other name; a link under the name of another step counts as that step's
    named = _NAME.fullmatch(os.path.basename(os.path.abspath(path)))
    for said, by in [(state["step"], STATE), *([(int(named[1]), "the folder's name")] if named else [])]:
        if said != step:
            raise CheckpointError(f"{path / MANIFEST}: is of step {step}, but {by} says step {said}: one is damaged")
    return Checkpoint(path, step, files, state)


def step_folders(run: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that bears the name of a checkpoint of a run folder, newest first, unverified."""
    folder = Path(run) / FOLDER
    found = [(_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(((int(match[1]), entry) for match, entry in found if match), reverse=True)


def newest_checkpoint(
    run: str | Path, kinds: Collection[str] = tuple(KINDS), finite: bool = False
) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest complete checkpoint of a run folder, and what is wrong with each newer one that was passed over.

    kinds: those that are verified, because the caller reads them; by default all. finite: one that holds NaN or Inf is
    passed over too.
    """
    complaints: list[CheckpointError] = []
    for _, path in step_folders(run):
        try:
            checkpoint = open_checkpoint(path)
            checkpoint.verify(kinds)
            if finite:
                checkpoint.require_finite()
            return checkpoint, complaints
        except CheckpointError as error:
            complaints.append(error)
    return None, complaints
