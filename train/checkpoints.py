"""Writing checkpoints so that a kill, a full disk or a crash at any moment leaves the previous one intact.

`step_N.partial/` is filled by all ranks in parallel, each file flushed; then the manifest is written, the folder
renamed into place. The format is described and read in `dit_fast.checkpoint.step`.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dit_fast import files
from dit_fast.checkpoint.manifest import MANIFEST, STATE, State, optimizer_file, write_manifest
from dit_fast.checkpoint.step import DTYPES, FOLDER, Checkpoint, newest_checkpoint, step_folders, step_name
from dit_fast.errors import CheckpointError
from dit_fast.train.engine import Engine
from dit_fast.train.guard import Diverged, Finiteness
from dit_fast.world import World

logger = logging.getLogger("dit_fast")

MOMENTS = ("exp_avg", "exp_avg_sq")
TRAINED = ("model", "ema", *MOMENTS)  # of the trained parameters
MARGIN = 1 << 20  # bytes for headers, state and manifest
Entry = tuple[str, torch.dtype, torch.Size]
Untrained = Mapping[str, Mapping[str, Tensor]]
Layout = Mapping[str, Mapping[tuple[str, str], Entry]]  # file -> kind and name -> what it holds, in order


class TensorFile:
    """A safetensors file written tensor by tensor, in the announced order, hashed on the way."""

    def __init__(self, path: Path, entries: Iterable[Entry]):
        header, offset = {}, 0
        for name, dtype, shape in entries:
            end = offset + shape.numel() * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        self._hash, self._size = hashlib.sha256(), 0
        self._file: BinaryIO = path.open("wb")
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._put(len(text).to_bytes(8, "little") + text)

    def add(self, tensor: Tensor) -> None:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._put(content.numpy().data)

    def finish(self) -> bytes:
        """Flushes to the disk and closes; returns size (8 bytes) and sha256 (32)."""
        files.sync(self._file)
        self._file.close()
        return self._size.to_bytes(8, "little") + self._hash.digest()

    def abandon(self) -> None:
        """Closes a file that is not wanted; nothing after `finish`."""
        with contextlib.suppress(OSError):  # a full disk may refuse the last buffer too; the file is removed anyway
            self._file.close()

    def _put(self, data: bytes | memoryview) -> None:
        files.write(self._file, data)
        self._hash.update(data)
        self._size += len(data)


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
        partial, errors = final.with_suffix(".partial"), list[OSError]()
        if self.world.rank == 0:
            with _noting(errors):
                self._prepare(partial, engine, untrained)
        if self._failed(errors, partial):
            return False
        layout, finite = _layout(engine, untrained, self.world.size), Finiteness(self.world)
        digests = self._write(partial, layout, _tensors(engine, untrained), finite, errors)
        if (name := finite.first_exception()) is not None:
            if self.world.rank == 0:
                files.remove_tree(partial)
            raise Diverged(
                f"{name} is not finite after step {state['step']}, so no checkpoint was written", (state["step"],) * 2
            )
        digests = self.world.reduce(digests.to(self.world.device), "sum").cpu()
        if self._failed(errors, partial):
            return False
        if self.world.rank == 0:
            with _noting(errors):
                self._publish(partial, final, list(layout), digests, state, retire)
        return not self._failed(errors, partial)

    def _prepare(self, partial: Path, engine: Engine, untrained: Untrained) -> None:
        trained = sum(shape.numel() for _, shape in engine.trainable())
        needed = 16 * trained + sum(x.nbytes for each in untrained.values() for x in each.values()) + MARGIN
        self.folder.mkdir(parents=True, exist_ok=True)
        files.remove_tree(partial)
        free = files.free_bytes(self.folder)
        if free < needed:
            raise OSError(f"needs {needed >> 20} MiB and the disk has {free >> 20} MiB left")
        partial.mkdir()

    def _write(
        self,
        partial: Path,
        layout: Layout,
        tensors: Iterable[tuple[str, str, Tensor]],
        finite: Finiteness,
        errors: list[OSError],
    ) -> Tensor:
        """Streams this rank's share of the files; int32 [files, 40], what `TensorFile.finish` gave, zeros for others'.

        After an error of the disk it only goes on gathering, so that no other rank waits for this one.
        """
        mine: dict[str, TensorFile] = {}
        with _noting(errors):
            for file in [*layout][self.world.rank :: self.world.size]:
                mine[file] = TensorFile(partial / file, layout[file].values())
        place = {key: writer for file, writer in mine.items() for key in layout[file]}
        for kind, name, tensor in tensors:
            finite.look(f"{kind} of '{name}'", tensor)
            if not errors and (kind, name) in place:
                with _noting(errors):
                    place[kind, name].add(tensor)
        digests = torch.zeros(len(layout), 40, dtype=torch.int32)
        with _noting(errors):
            for number, file in enumerate(layout):
                if file in mine and not errors:
                    digests[number] = torch.frombuffer(bytearray(mine[file].finish()), dtype=torch.uint8)
        for writer in mine.values():
            writer.abandon()
        return digests

    def _publish(
        self, partial: Path, final: Path, names: list[str], digests: Tensor, state: Mapping[str, Any], retire: bool
    ) -> None:
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
        try:
            files.sync_folder(self.folder)  # before this returns, the older ones are the only ones sure to be there
            if retire:
                self._retire()
        except OSError as error:
            logger.warning("%s is written, but %s; older checkpoints stay", final, error)

    def _retire(self) -> None:
        """Removes checkpoints beyond `keep`; each loses its name first, so that a kill leaves no half of one."""
        for step, path in step_folders(self.run)[self.keep :] if self.keep else []:
            if not (self.keep_every and step % self.keep_every == 0):
                doomed = path.with_suffix(".partial")
                files.rename(path, doomed)
                files.remove_tree(doomed)

    def _failed(self, errors: list[OSError], partial: Path) -> bool:
        """Whether any rank met an error; the partial folder is then gone and the reason logged where it arose."""
        failed = torch.tensor([float(bool(errors))], dtype=torch.float32, device=self.world.device)
        if not self.world.reduce(failed, "max").item():
            return False
        for error in errors[:1]:
            logger.warning("checkpoint %s not written: %s; earlier ones are untouched", partial.stem, error)
        if self.world.rank == 0:
            files.remove_tree(partial)
        return True


@contextlib.contextmanager
def _noting(errors: list[OSError]) -> Iterator[None]:
    """What the disk refuses is noted, so that this rank does not leave the others waiting."""
    try:
        yield
    except OSError as error:
        errors.append(error)


def _tensors(engine: Engine, untrained: Untrained) -> Iterator[tuple[str, str, Tensor]]:
    """Kind, name and value of everything that is saved, in the order of the files; collective."""
    for kind in TRAINED:
        for name, tensor in engine.full_state(kind):
            yield kind, name, tensor
    for kind, tensors in untrained.items():
        for name, tensor in tensors.items():
            yield kind, name, tensor


def _layout(engine: Engine, untrained: Untrained, count: int) -> Layout:
    """The same on every rank. count: of the moments' files."""
    trained = engine.trainable()
    count = min(count, len(trained))
    moments = {name: optimizer_file(k % count, count) for k, (name, _) in enumerate(trained)}
    held = [(kind, name, torch.float32, shape) for kind in TRAINED for name, shape in trained]
    held += [(kind, name, x.dtype, x.shape) for kind, tensors in untrained.items() for name, x in tensors.items()]
    layout: dict[str, dict[tuple[str, str], Entry]] = {}
    for kind, name, dtype, shape in held:
        file, inside = (moments[name], f"{kind}.{name}") if kind in MOMENTS else (f"{kind}.safetensors", name)
        layout.setdefault(file, {})[kind, name] = (inside, dtype, shape)
    return layout
