"""A side of `step` in a process of its own: on a CPU what a step costs depends on the process's memory.

The trainer keeps what it frees (`dit_fast.train.allocator`), others give it back to the kernel and fault it in again,
and what one side has freed would serve the next one. So each lives as in its own training run, and waits for its turn.
"""

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from dit_fast.benchmarks.measure import reason
from dit_fast.benchmarks.step_sides import OURS, VARIANTS, WITHOUT, Sides, StepCase
from dit_fast.errors import ConfigError
from dit_fast.train.allocator import keep_memory

CPU = torch.device("cpu")


class SideProcess:
    """Built as `Sides(case, ...).make(name)` in a new process, by CPU threads as here. Raises what that raised, by its
    first line: ConfigError, or RuntimeError."""

    def __init__(self, case: StepCase, overrides: Sequence[str], small: bool, name: str):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        arguments = other, case, tuple(overrides), small, name, torch.get_num_threads()
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other.close()
        self.has_parts: bool = self._answer()

    def first(self) -> None:
        self._ask("first", 0)

    def run(self, step: int) -> None:
        self._ask("run", step)

    def parts(self, step: int, device: torch.device) -> dict[str, float]:
        return self._ask("parts", step)

    def peak(self, device: torch.device) -> int:
        return self._ask("peak", 0)

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def _ask(self, what: str, step: int) -> Any:
        self._connection.send((what, step))
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except EOFError:
            raise RuntimeError("the side's process died") from None
        if kind == "error":
            raise RuntimeError(value)
        if kind == "configuration":
            raise ConfigError(value)
        return value


def _serve(
    connection: Connection, case: StepCase, overrides: Sequence[str], small: bool, name: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    if name in (OURS, *VARIANTS) or name.startswith(WITHOUT):
        keep_memory()
    try:
        side = Sides(case, CPU, overrides, small).make(name)
        answers: dict[str, Any] = {
            "first": lambda step: side.first(),
            "run": lambda step: [side.run(step)].clear(),  # nothing of it crosses
            "parts": lambda step: side.parts(step, CPU),
            "peak": lambda step: side.peak(CPU),
        }
        connection.send(("", side.has_parts))
        while True:
            what, step = connection.recv()
            connection.send(("", answers[what](step)))
    except EOFError:
        pass  # closed: it is no longer needed
    except Exception as error:
        connection.send(("configuration" if isinstance(error, ConfigError) else "error", reason(error)))
