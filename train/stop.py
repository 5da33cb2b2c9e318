"""Leaving politely: a signal, a file or a rank without data asks, all ranks agree one step later, the loop saves."""

import logging
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

import torch

from dit_fast.train.guard import Diverged
from dit_fast.world import Late, World

logger = logging.getLogger("dit_fast")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FILE = "STOP"
BY_PERSON, BY_SCHEDULER = 1.0, 2.0  # who asked; the larger wins


class Preempted(Exception):
    """A scheduler took the machine before the last step; all is saved, and the same command goes on."""


class StopRequest:
    """Asked by SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) to any rank, or by a file STOP in one of the folders.

    SIGUSR1 is a scheduler's notice that the time is up, or `leash`'s that the launcher has died. A second SIGINT raises
    KeyboardInterrupt. Use as a context: at its end handlers are put back and the files removed.

    folders: of the run, and of the command that it is a stage of. failed: after `agreed()` was True, whether it was for
    a rank that has no data, and nobody asked to stop. preempted: likewise, whether SIGUSR1 did.
    """

    def __init__(self, folders: Iterable[Path], world: World):
        self._files, self._world, self._process = [folder / STOP_FILE for folder in folders], world, os.getpid()
        self._asked, self._interrupted, self.failed, self.preempted = 0.0, False, False, False
        self._flag: Late | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            if number == signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
                continue  # a shell's background job: Ctrl-C is meant for others
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if kind is None or not issubclass(kind, Diverged):  # else the run may go on from a checkpoint, and stop then
            self.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            if self._world.rank == 0 and os.getpid() == self._process:  # workers of the loader inherit this handler
                os.write(2, b"\ndit-fast: saving after this step; Ctrl-C again leaves at once\n")
        self._asked = max(self._asked, BY_SCHEDULER if number == signal.SIGUSR1 else BY_PERSON)

    def agreed(self, failed: bool = False) -> bool:
        """Called by every rank after each step: whether some rank was asked before the call before this one, or had
        said then that it has `failed` to get the data of the step after the next.

        The flags reduced in one call are read in the next, when they have long arrived: nothing waits for the device.
        """
        stopped, failing = self._flag.read().tolist() if self._flag is not None else (0.0, 0.0)
        self.failed, self.preempted = bool(failing) and not stopped, stopped == BY_SCHEDULER
        asked = self._asked or BY_PERSON * (self._world.rank == 0 and any(map(os.path.exists, self._files)))
        flag = torch.tensor([asked, float(failed)], dtype=torch.float32).to(self._world.device, non_blocking=True)
        self._flag = Late(self._world.reduce(flag, "max"))
        return bool(stopped or failing)

    def clear(self) -> None:
        """Removes the files, so that the next start goes on."""
        for file in self._files if self._world.rank == 0 else ():
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s cannot be removed (%s): the next start will stop again", file, error)
