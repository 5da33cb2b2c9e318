"""Writing checkpoints so that a kill, a full disk or a crash at any moment leaves the previous one intact.

`step_N.partial/` is filled by all ranks in parallel, each file flushed; then the manifest is written, the folder
renamed into place. The format is described and read in `dit_fast.checkpoint.step`.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dit_fast import files
from dit_fast.checkpoint.manifest import MANIFEST, REST, STATE, WEIGHTS, State, optimizer_file, write_manifest
from dit_fast.checkpoint.step import DTYPES, FOLDER, Checkpoint, newest_checkpoint, step_folders, step_name
from dit_fast.errors import CheckpointError
from dit_fast.train.engine import Engine
from dit_fast.train.guard import Diverged, Finiteness
from dit_fast.world import World

logger = logging.getLogger("dit_fast")

MOMENTS = ("exp_avg", "exp_avg_sq")
MARGIN = 1 << 20  # bytes for headers, state and manifest
Entry = tuple[str, torch.dtype, torch.Size]
Untrained = Mapping[str, Mapping[str, Tensor]]


class TensorFile:
    """A safetensors file written tensor by tensor, in the announced order, hashed on the way."""

    def __init__(self, path: Path, entries: Iterable[Entry]):
        header, offset = {}, 0
        for name, dtype, shape in entries:
            end = offset + shape.numel() * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        self._hash, self.bytes = hashlib.sha256(), 0
        self._file: BinaryIO = path.open("wb")
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._put(len(text).to_bytes(8, "little") + text)

    def add(self, tensor: Tensor) -> None:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._put(content.numpy().data)

    def finish(self) -> bytes:
        """Flushes to the disk and closes; returns the sha256."""
        files.sync(self._file)
        self._file.close()
        return self._hash.digest()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # a full disk may refuse the last buffer too; the file is removed anyway
            self._file.close()

    def _put(self, data: bytes | memoryview) -> None:
        files.write(self._file, data)
        self._hash.update(data)
        self.bytes += len(data)


class Checkpoints:
    """The checkpoints of one run folder. keep: newest ones that stay (0: all); keep_every: steps that stay for ever."""

    def __init__(self, run: Path, world: World, keep: int = 0, keep_every: int = 0):
        self.run, self.folder, self.world = run, run / FOLDER, world
        self.keep, self.keep_every = keep, keep_every

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, on all ranks; None for a new run. Clears away what a killed save left.

        A newer one that is damaged, unreadable or not finite is set aside as `step_N.damaged`, with a warning. Raises
        CheckpointError where there are checkpoints but none is whole: training never starts over in silence.
        """
        found = self.world.agree(self._find)
        if found is None:
            return None
        path, step, files, content = found
        state = State(content)
        state.path = Path(path) / STATE
        return Checkpoint(Path(path), step, {name: (size, digest) for name, (size, digest) in files.items()}, state)

    def _find(self) -> list[Any] | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for partial in self.folder.glob("step_*.partial"):
            files.remove_tree(partial)
            left = "cannot be removed" if os.path.lexists(partial) else "removed"
            logger.info("%s: left by a save that did not finish; %s", partial, left)
        if not os.access(self.folder, os.W_OK):  # no step is done that could not be saved
            raise CheckpointError(f"{self.folder}: cannot be written; mend its permissions or set another run.dir")
        checkpoint, complaints = newest_checkpoint(self.run, finite=True)
        if checkpoint is None:
            if complaints:
                raise CheckpointError(
                    f"{complaints[0]}, and none of the other {len(complaints) - 1} checkpoints is whole; "
                    f"restore one, or remove {self.folder} to start from step 0"
                )
            return None
        for complaint in complaints:
            logger.warning("%s; going back to step %d", complaint, checkpoint.step)
        for step, path in step_folders(self.run):
            if step > checkpoint.step:
                aside = path.with_suffix(".damaged")
                files.remove_tree(aside)
                files.rename(path, aside)
        return [str(checkpoint.path), checkpoint.step, checkpoint.files, checkpoint.state]

    def save(self, engine: Engine, untrained: Untrained, state: Mapping[str, Any], retire: bool = True) -> bool:
        """Writes the checkpoint of state["step"]; collective. False, with a warning, where the disk did not take it.

        untrained: `Rest.tensors()`. retire: whether those beyond `keep` go then. Raises Diverged, on all ranks, where a
        tensor holds NaN or Inf. What was there before stays whole whatever happens.
        """
        final = self.folder / step_name(state["step"])
        partial = final.with_suffix(".partial")
        error = self._prepare(partial, engine, untrained) if self.world.rank == 0 else None
        if self._report(error, partial):
            return False
        content = _layout(engine, untrained, self.world)
        digests = torch.zeros(len(content), 40, dtype=torch.int32)
        finite = Finiteness(self.world)
        error = _write_files(partial, content, engine, untrained, self.world.rank, digests, finite)
        if (name := finite.first_exception()) is not None:
            if self.world.rank == 0:
                files.remove_tree(partial)
            raise Diverged(f"{name} is not finite after step {state['step']}, so no checkpoint was written")
        digests = self.world.reduce(digests.to(self.world.device), "sum").cpu()
        if self._report(error, partial):
            return False
        if self.world.rank == 0:
            error = self._publish(partial, final, list(content), digests, state, retire)
        return not self._report(error, partial)

    def _prepare(self, partial: Path, engine: Engine, untrained: Untrained) -> str | None:
        trained = sum(shape.numel() for _, shape in engine.trainable())
        needed = 16 * trained + sum(x.nbytes for each in untrained.values() for x in each.values()) + MARGIN
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.remove_tree(partial)
            free = files.free_bytes(self.folder)
            if free < needed:
                return f"needs {needed >> 20} MiB and the disk has {free >> 20} MiB left"
            partial.mkdir()
        except OSError as error:
            return str(error)
        return None

    def _publish(
        self, partial: Path, final: Path, names: list[str], digests: Tensor, state: Mapping[str, Any], retire: bool
    ) -> str | None:
        try:
            content = json.dumps(state, indent=1).encode()
            files.write_synced(partial / STATE, content)
            listed: dict[str, dict[str, Any]] = {
                STATE: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            }
            for name, row in zip(names, digests.to(torch.uint8), strict=True):
                data = row.numpy().tobytes()
                listed[name] = {"bytes": int.from_bytes(data[:8], "little"), "sha256": data[8:].hex()}
            files.write_synced(partial / MANIFEST, write_manifest(state["step"], listed))
            files.sync_folder(partial)
            files.rename(partial, final)
        except OSError as error:
            return str(error)
        try:
            files.sync_folder(self.folder)  # before this returns, the older ones are the only ones sure to be there
            if retire:
                self._retire()
        except OSError as error:
            logger.warning("%s is written, but %s; older checkpoints stay", final, error)
        return None

    def _retire(self) -> None:
        """Removes checkpoints beyond `keep`; each loses its name first, so that a kill leaves no half of one."""
        for step, path in step_folders(self.run)[self.keep :] if self.keep else []:
            if not (self.keep_every and step % self.keep_every == 0):
                doomed = path.with_suffix(".partial")
                files.rename(path, doomed)
                files.remove_tree(doomed)

    def _report(self, error: str | None, partial: Path) -> bool:
        """Whether any rank failed; the partial folder is then gone and the reason logged where it arose."""
        failed = torch.tensor([float(error is not None)], dtype=torch.float32, device=self.world.device)
        if not self.world.reduce(failed, "max").item():
            return False
        if error is not None:
            logger.warning("checkpoint %s not written: %s; earlier ones are untouched", partial.stem, error)
        if self.world.rank == 0:
            files.remove_tree(partial)
        return True


def _layout(
    engine: Engine, untrained: Untrained, world: World
) -> dict[str, tuple[int, dict[str, list[str]], list[Entry]]]:
    """File name -> (rank that writes it, kind -> parameter names, entries in order); the same on every rank."""
    trained = engine.trainable()
    rest = {kind: [(name, x.dtype, x.shape) for name, x in tensors.items()] for kind, tensors in untrained.items()}
    names = [name for name, _ in trained]
    weights = [(name, torch.float32, shape) for name, shape in trained]
    count = min(world.size, len(trained))
    content: dict[str, tuple[int, dict[str, list[str]], list[Entry]]] = {
        file: (k % world.size, {kind: names}, weights + rest[kind])
        for k, (file, kind) in enumerate(zip(WEIGHTS, ("model", "ema"), strict=True))
    }
    for k in range(count):
        mine = trained[k::count]
        entries = [(f"{kind}.{name}", torch.float32, shape) for kind in MOMENTS for name, shape in mine]
        chosen = [name for name, _ in mine]
        content[optimizer_file(k, count)] = (k, dict.fromkeys(MOMENTS, chosen), entries)
    if rest["rest"]:
        content[REST] = (world.size - 1, {}, rest["rest"])
    return content


def _write_files(
    partial: Path,
    content: Mapping[str, tuple[int, dict[str, list[str]], list[Entry]]],
    engine: Engine,
    untrained: Untrained,
    rank: int,
    digests: Tensor,
    finite: Finiteness,
) -> str | None:
    """Streams this rank's files while all ranks gather; an error on one rank does not leave the others waiting."""
    error: str | None = None
    opened: dict[str, TensorFile] = {}
    wanted: dict[tuple[str, str], TensorFile] = {}
    try:
        for file, (owner, kinds, entries) in content.items():
            if owner == rank:
                opened[file] = TensorFile(partial / file, entries)
                wanted.update({(kind, name): opened[file] for kind, names in kinds.items() for name in names})
    except OSError as failure:
        error = str(failure)
    for name, tensor in {id(x): (name, x) for tensors in untrained.values() for name, x in tensors.items()}.values():
        finite.look(f"'{name}'", tensor)
    for kind in ("model", "ema", *MOMENTS):
        for name, tensor in engine.full_state(kind):
            finite.look(f"{kind} of '{name}'", tensor)
            if error is None and (kind, name) in wanted:
                try:
                    wanted[kind, name].add(tensor)
                except OSError as failure:
                    error = str(failure)
    try:
        for number, file in enumerate(content):
            if error is None and file in opened:
                for tensor in untrained.get(file.removesuffix(".safetensors"), {}).values():
                    opened[file].add(tensor)
                size = opened[file].bytes.to_bytes(8, "little")
                digests[number] = torch.frombuffer(bytearray(size + opened[file].finish()), dtype=torch.uint8)
    except OSError as failure:
        error = str(failure)
    if error is not None:
        for writer in opened.values():
            writer.abandon()
    return error
