"""Stopping politely: a signal or a file asks, all ranks agree one step later, and the loop saves and leaves with 0."""

import signal
from pathlib import Path
from types import FrameType

import torch

from dit_fast.train.world import Late, World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_FILE = "STOP"


class StopRequest:
    """Asked by SIGTERM or SIGUSR1 to any rank, or by a file RUN/STOP. Use as a context: handlers are put back after."""

    def __init__(self, run: Path, world: World):
        self._file, self._world = run / STOP_FILE, world
        self._asked = False
        self._flag: Late | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Called by every rank after each step: whether some rank was asked before the call before this one.

        The flag reduced in one call is read in the next, when it has long arrived: nothing waits for the device.
        """
        last = self._flag is not None and bool(self._flag.read().item())
        asked = self._asked or (self._world.rank == 0 and self._file.exists())
        flag = torch.tensor([float(asked)]).to(self._world.device, non_blocking=True)
        self._flag = Late(self._world.reduce(flag, "max"))
        return last

    def clear(self) -> None:
        """Removes RUN/STOP, so that the next start goes on."""
        if self._world.rank == 0:
            self._file.unlink(missing_ok=True)
