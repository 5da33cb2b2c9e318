"""One checkpoint of a training run: safetensors, JSON and a manifest, free of ZeRO stage and rank count.

`step_00001000/` holds model.safetensors and ema.safetensors (every entry of the model's state dict, float32 masters),
optim-0000k-of-0000n.safetensors ("exp_avg.NAME", "exp_avg_sq.NAME"; trained parameter i lies in file i mod n),
state.json, and MANIFEST.json (bytes and sha256 of each file), which is written last. A folder without a manifest, or
with the suffix .partial, is not a checkpoint. Nothing here is a pickle.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_fast.errors import CheckpointError

FORMAT = "dit_fast checkpoint"
VERSION = 1
MANIFEST, STATE = "MANIFEST.json", "state.json"
FOLDER = "checkpoints"  # inside the run folder
_NAME = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    return f"step_{step:08d}"


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose manifest was read. files: name -> (bytes, sha256)."""

    path: Path
    step: int
    files: dict[str, tuple[int, str]]

    @property
    def state(self) -> dict[str, Any]:
        """The content of state.json: step, samples_seen, optimizer_step, config, data set fingerprint, versions."""
        return _read_json(self.path / STATE)

    def verify(self, hashes: bool = True) -> None:
        """Raises CheckpointError naming a file that is missing, of the wrong size or (hashes) of other content."""
        for name, (size, digest) in self.files.items():
            path = self.path / name
            if not path.is_file():
                raise CheckpointError(f"{path}: is missing")
            if path.stat().st_size != size:
                raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, its manifest says {size}")
            if hashes:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        raise CheckpointError(f"{path}: content differs from its manifest (sha256)")

    def source(self, kind: str) -> Callable[[str], Tensor]:
        """A function from parameter name to CPU tensor, for kind "model", "ema", "exp_avg" or "exp_avg_sq"."""
        from safetensors import safe_open

        where: dict[str, Any] = {}
        prefix = "" if kind in ("model", "ema") else f"{kind}."
        for file in sorted(self.files):
            if file.startswith("optim-") if prefix else file == f"{kind}.safetensors":
                handle = safe_open(self.path / file, framework="pt")
                where.update({key: handle for key in handle.keys() if key.startswith(prefix)})  # noqa: SIM118

        def tensor(name: str) -> Tensor:
            if prefix + name not in where:
                raise CheckpointError(
                    f"{self.path}: holds no {kind} of parameter '{name}'; was it made by another model?"
                )
            return where[prefix + name].get_tensor(prefix + name)

        return tensor

    def state_dict(self, kind: str = "ema") -> dict[str, Tensor]:
        """All weights ("model") or their moving averages ("ema") by name, float32 on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path / f"{kind}.safetensors")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Reads the manifest of a step folder. Raises CheckpointError where there is none or it cannot be read."""
    path = Path(path)
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"format {manifest.get('format')!r} version {manifest.get('version')!r}"
        raise CheckpointError(f"{path / MANIFEST}: {found}; this dit_fast reads {FORMAT!r} version {VERSION}")
    try:
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        return Checkpoint(path, int(manifest["step"]), files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: damaged ({error!r})") from None


def step_folders(run: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that bears the name of a checkpoint of a run folder, newest first, unverified."""
    folder = Path(run) / FOLDER
    found = [(_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(((int(match[1]), entry) for match, entry in found if match and entry.is_dir()), reverse=True)


def newest_checkpoint(run: str | Path, hashes: bool = True) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest complete checkpoint of a run folder, and what is wrong with each newer one that was passed over."""
    complaints: list[CheckpointError] = []
    for _, path in step_folders(run):
        try:
            checkpoint = open_checkpoint(path)
            checkpoint.verify(hashes)
            return checkpoint, complaints
        except CheckpointError as error:
            complaints.append(error)
    return None, complaints


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing, so {path.parent} is not a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value
