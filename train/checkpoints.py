"""Writing checkpoints so that a kill, a full disk or a crash at any moment leaves the previous one intact.

Each rank copies its part to host memory, and training goes on while a thread looks for NaN and Inf in the copy, writes
it into `step_N.partial/` and flushes it. Each then tells rank 0 what it wrote, through the job's store: no collective
runs beside those of training. When all have, rank 0 writes the manifest and renames the folder into place. One save is
under way at most. All ranks know at the same place of the run what became of it: where `settle` waits for it.
The format is described and read in `dit_fast.checkpoint.step`.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dit_fast import files
from dit_fast.checkpoint.manifest import MANIFEST, STATE, State, write_manifest
from dit_fast.checkpoint.step import FOLDER, Checkpoint, extremes, newest_checkpoint, step_folders, step_name
from dit_fast.errors import CheckpointError, UserError
from dit_fast.train.engine import Engine
from dit_fast.train.guard import Diverged, Finiteness
from dit_fast.train.part import HostMemory, Share, Untrained, shares, write_part
from dit_fast.world import Late, World

logger = logging.getLogger("dit_fast")

MARGIN = 1 << 20  # bytes for headers, state and manifest
PATIENCE = 1200.0  # seconds in which the other ranks write their parts after rank 0 has: less than a collective waits
SLOW = 5.0  # seconds of waiting for a disk that are told
LEAVING = 5.0  # the same where this process ends and the others may be dead


@dataclasses.dataclass
class Save:
    """A save whose values were taken. error: why it failed, once that is known; on rank 0 of all ranks' reasons one.

    names: of the shares, the same on every rank. replicas: whether what a rank has of each beside its own share is
    finite. broken: how many of the names are left from the first on that this rank has found not to be; 0: none is.
    """

    number: int  # of this job's saves
    final: Path
    held: Sequence[Share]
    names: Sequence[str]
    state: Mapping[str, Any]
    retire: bool
    patience: float = PATIENCE
    replicas: Late | None = None
    broken: int = 0
    error: str = ""
    said: bool = False
    crash: BaseException | None = None  # no matter of the disk

    @property
    def partial(self) -> Path:
        return self.final.with_suffix(".partial")


class Checkpoints:
    """The checkpoints of one run folder. keep: newest ones that stay (0: all); keep_every: steps that stay for ever.

    background: whether a thread writes them. owned: called before one is published; raises UserError where this
    process no longer may. written: step of the newest one; ranks other than 0 know that from `settle` on.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        run: Path,
        world: World,
        keep: int = 0,
        keep_every: int = 0,
        background: bool = False,
        owned: Callable[[], None] = lambda: None,
    ):
        self.run, self.folder, self.world = run, run / FOLDER, world
        self.keep, self.keep_every = keep, keep_every
        self.written: int | None = None
        self._memory, self._owned = HostMemory(world.device) if background else None, owned
        self._under_way: tuple[Save, threading.Thread | None] | None = None

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, on all ranks; None for a new run. Clears away what a killed save left.

        A save under way is waited for. A newer one that is damaged, unreadable or not finite is set aside as
        `step_N.damaged`, with a warning. Raises CheckpointError where there are checkpoints but none is whole: training
        never starts over in silence.
        """
        self.settle()
        found = self.world.agree(self._find)
        if found is None:
            return None
        path, self.written, files, content = found
        state = State(content)
        state.path = Path(path) / STATE
        listed = {name: (size, digest) for name, (size, digest) in files.items()}
        return Checkpoint(Path(path), found[1], listed, state)

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

    def save(self, engine: Engine, untrained: Untrained, state: Mapping[str, Any], retire: bool = True) -> None:
        """Saves the state as it is now, as the checkpoint of state["step"]; collective. Waits for the save before.

        In the background it returns when the values were copied, and `settle` tells whether they were written.
        untrained: `Rest.tensors()`. retire: whether those beyond `keep` go then. Raises what `settle` does, of the save
        before. What was there before stays whole whatever happens; what the disk refuses is a warning.
        """
        self.settle()
        world, held = self.world, list(shares(engine, untrained, self.world))
        names = [f"{share.kind} of '{share.name}'" for share in held]
        save = Save(next(self._numbers), self.folder / step_name(state["step"]), held, names, state, retire)
        with _noting(save):
            if world.rank == 0:
                self._prepare(save.partial, engine, untrained)
            if self._memory is not None:
                self._memory.reserve(held)
        self._under_way = save, None
        if self._any(bool(save.error)):
            return
        replicas = Finiteness(world)  # nobody copies what others save
        for share, name in zip(held, names, strict=True):
            replicas.look(name, share.held[: 0 if share.is_all_held else None])
        save.replicas = Late(replicas.here())
        if self._memory is None:
            self._write(save)
            return
        save.held = self._memory.copy(held)
        thread = threading.Thread(target=self._work, args=(save,), daemon=True, name="checkpoint")
        self._under_way = save, thread
        thread.start()

    def look(self) -> None:
        """Between steps: says, as soon as it is known, that the save under way has failed. Not collective."""
        if self._under_way is None:
            return
        save, thread = self._under_way
        if save.error and not save.said and not (thread and thread.is_alive()):
            logger.warning("checkpoint %s not written: %s; earlier ones are untouched", save.final.name, save.error)
            save.said = True

    def settle(self) -> bool:
        """Waits until the save under way is written or has failed; whether it was written, True without one.

        Collective. What failed has been said in one line. Raises Diverged, on all ranks, where a tensor of that save
        holds NaN or Inf on one: it was not written.
        """
        if self._under_way is None:
            return True
        save, thread = self._under_way
        if thread is not None:
            began = time.monotonic()
            thread.join()
            if (waited := time.monotonic() - began) > SLOW and self.world.rank == 0:
                logger.warning("training waited %.0f s until checkpoint %s was written", waited, save.final.name)
        self.look()
        self._under_way = None
        failed, broken = self._most(bool(save.error or save.crash), save.broken)
        if save.crash is not None:
            raise save.crash
        if failed and self.world.rank == 0:
            files.remove_tree(save.partial)
        if broken:
            name, step = save.names[-broken], save.state["step"]
            raise Diverged(f"{name} is not finite after step {step}, so no checkpoint was written", (step, step))
        if not failed:
            self.written = save.state["step"]
        return not failed

    def leave(self, error: Exception) -> None:
        """Waits for this rank's part of a save under way before the process ends with an error; not collective.

        Rank 0 waits for the others too, not long where they may be dead.
        """
        if self._under_way is not None:
            save, thread = self._under_way
            if not isinstance(error, UserError) or error.alone:
                save.patience = LEAVING
            if thread is not None:
                thread.join()
            self.look()

    def _prepare(self, partial: Path, engine: Engine, untrained: Untrained) -> None:
        trained = sum(shape.numel() for _, shape in engine.trainable())
        needed = 16 * trained + sum(x.nbytes for each in untrained.values() for x in each.values()) + MARGIN
        self.folder.mkdir(parents=True, exist_ok=True)
        files.remove_tree(partial)
        free = files.free_bytes(self.folder)
        if free < needed:
            raise OSError(f"needs {needed >> 20} MiB and the disk has {free >> 20} MiB left")
        partial.mkdir()

    def _work(self, save: Save) -> None:
        try:
            if self._memory is not None:
                self._memory.wait()
            self._write(save)
        except BaseException as error:  # raised where training waits for it
            save.crash = error

    def _write(self, save: Save) -> None:
        """Writes this rank's part; on rank 0 waits for the others' and publishes all."""
        listed: dict[str, dict[str, Any]] = {}
        with _noting(save):
            self._look_at_values(save)
            listed = write_part(save.partial, save.held, self.world)
        save.held = ()
        if self.world.rank:
            self.world.post(f"save/{save.number}/{self.world.rank}", json.dumps([listed, save.error]))
            save.said = bool(save.error)  # by rank 0
            return
        for other, (theirs, error) in self._others(save):
            listed |= theirs
            save.error = save.error or (f"rank {other}: {error}" if error else "")
        with _noting(save):
            if not save.error:
                self._publish(save, listed)
        if save.error:
            files.remove_tree(save.partial)

    def _look_at_values(self, save: Save) -> None:
        """Raises UserError where a value that this rank has is not finite."""
        assert save.replicas is not None
        for number, (share, finite) in enumerate(zip(save.held, save.replicas.read().tolist(), strict=True)):
            if not (finite and extremes(share.values).isfinite().all()):
                save.broken = len(save.names) - number
                raise UserError(f"{save.names[number]} is not finite")

    def _others(self, save: Save) -> Iterator[tuple[int, tuple[dict[str, Any], str]]]:
        began = time.monotonic()
        for other in range(1, self.world.size):
            while (text := self.world.posted(f"save/{save.number}/{other}")) is None:
                if time.monotonic() - began > save.patience:
                    text = json.dumps([{}, f"has not written its part within {save.patience:.0f} s"])
                    break
                time.sleep(0.02)
            yield other, json.loads(text)

    def _publish(self, save: Save, listed: Mapping[str, Mapping[str, Any]]) -> None:
        content = json.dumps(save.state, indent=1).encode()
        files.write_synced(save.partial / STATE, content)
        own = {STATE: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
        files.write_synced(save.partial / MANIFEST, write_manifest(save.state["step"], {**own, **listed}))
        files.sync_folder(save.partial)
        self._owned()
        files.rename(save.partial, save.final)
        self.written = save.state["step"]
        try:
            files.sync_folder(self.folder)  # before this returns, the older ones are the only ones sure to be there
            if save.retire:
                self._retire()
        except OSError as error:
            logger.warning("%s is written, but %s; older checkpoints stay", save.final, error)

    def _retire(self) -> None:
        """Removes checkpoints beyond `keep`; each loses its name first, so that a kill leaves no half of one."""
        for step, path in step_folders(self.run)[self.keep :] if self.keep else []:
            if not (self.keep_every and step % self.keep_every == 0):
                doomed = path.with_suffix(".partial")
                files.rename(path, doomed)
                files.remove_tree(doomed)

    def _any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self._most(here)[0])

    def _most(self, *here: int) -> list[int]:
        """The largest of all ranks' numbers, one by one."""
        return self.world.reduce(torch.tensor(here, dtype=torch.int32, device=self.world.device), "max").tolist()


@contextlib.contextmanager
def _noting(save: Save) -> Iterator[None]:
    """What the disk refuses is noted, so that this rank does not leave the others waiting."""
    try:
        yield
    except (OSError, UserError) as error:
        save.error = save.error or str(error)
