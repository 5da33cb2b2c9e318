"""One checkpoint of a training run: safetensors, JSON and a manifest, free of ZeRO stage and rank count.

`step_00001000/` holds model.safetensors and ema.safetensors (every entry of the model's state dict, float32 masters),
optim-0000k-of-0000n.safetensors ("exp_avg.NAME", "exp_avg_sq.NAME"; trained parameter i lies in file i mod n),
rest.safetensors ("METHOD.NAME", only where a method has moving state of its own), state.json, and MANIFEST.json (bytes
and sha256 of each file, a digest of itself), which is written last. The step in the folder's name, in the manifest and
in state.json is the same. A folder without a manifest, or with the suffix .partial, is not a checkpoint. Nothing here
is a pickle. Whatever is wrong with one is a CheckpointError of one line.
"""

import hashlib
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_fast.checkpoint.manifest import MANIFEST, STATE, State, read_manifest, read_state
from dit_fast.errors import CheckpointError

FOLDER = "checkpoints"  # inside the run folder
KINDS = ("model", "ema", "exp_avg", "exp_avg_sq", "rest")
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


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose manifest and state were read. files: name -> (bytes, sha256). state: step, samples_seen,
    optimizer_step, skipped_steps, left_out, config, data set fingerprint, versions."""

    path: Path
    step: int
    files: dict[str, tuple[int, str]]
    state: State

    def verify(self, files: Collection[str] | None = None) -> None:
        """Raises CheckpointError naming a file that is missing, unreadable, or of another size or content.

        files: those that the caller reads; by default all.
        """
        for name in self.files if files is None else files:
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

    def source(self, kind: str) -> Callable[[str], Tensor]:
        """A function from parameter name to CPU tensor, for a kind of KINDS."""
        where = self._where(kind)

        def tensor(name: str) -> Tensor:
            if name not in where:
                raise CheckpointError(
                    f"{self.path}: holds no {kind} of parameter '{name}'; was it made by another model?"
                )
            handle, key = where[name]
            return self._reading(lambda: handle.get_tensor(key))

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
                handle, key = where[name]
                found = handle.get_slice(key)
                have = (found.get_dtype(), found.get_shape())
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
                if not torch.isfinite(source(name)).all():
                    raise CheckpointError(f"{self.path}: {kind} of '{name}' is not finite")

    def state_dict(self, kind: str = "ema") -> dict[str, Tensor]:
        """All weights ("model") or their moving averages ("ema") by name, float32 on the CPU."""
        source = self.source(kind)
        return {name: source(name) for name in self.names(kind)}

    def _where(self, kind: str) -> dict[str, tuple[Any, str]]:
        """name -> (open file, key in it)."""
        prefix = f"{kind}." if kind.startswith("exp_") else ""
        where: dict[str, tuple[Any, str]] = {}
        for file in sorted(self.files):
            if file.startswith("optim-") if prefix else file == f"{kind}.safetensors":
                handle = self._open(file)
                keys = [key for key in handle.keys() if key.startswith(prefix)]  # noqa: SIM118
                where.update({key.removeprefix(prefix): (handle, key) for key in keys})
        return where

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
    run: str | Path, files: Collection[str] | None = None, finite: bool = False
) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest complete checkpoint of a run folder, and what is wrong with each newer one that was passed over.

    files: those that are verified, because the caller reads them; by default all. finite: one that holds NaN or Inf is
    passed over too.
    """
    complaints: list[CheckpointError] = []
    for _, path in step_folders(run):
        try:
            checkpoint = open_checkpoint(path)
            checkpoint.verify(files)
            if finite:
                checkpoint.require_finite()
            return checkpoint, complaints
        except CheckpointError as error:
            complaints.append(error)
    return None, complaints
