"""Threads that read and fetch."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from dit_fast.errors import DataError

_here = threading.local()
_never: Future = Future()


def closed() -> Future:
    """Done once the `Threads` that the caller runs in are closed; other callers' never is."""
    return getattr(_here, "closed", _never)


def pause(seconds: float = 0.0) -> None:
    """Waits. Raises DataError, which nobody is there to see, once the caller's `Threads` are closed."""
    if wait([closed()], seconds).done:
        raise DataError("nobody waits for this any more")


class Threads:
    """A few daemon threads: one that waits for a disk or a server does not keep the program from ending, as those of
    concurrent.futures would.
    """

    def __init__(self, count: int, name: str):
        self._jobs: queue.SimpleQueue[tuple[Future, Callable[..., Any], tuple] | None] = queue.SimpleQueue()
        self._count = count
        self._closed: Future = Future()
        for number in range(count):
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True).start()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future:
        """The result of `work(*arguments)`, or what it raises, in a while."""
        future: Future = Future()
        self._jobs.put((future, work, arguments))
        return future

    def close(self) -> None:
        """No further job is begun, and those that wait for a server end. Waits for nothing."""
        self._closed.set_result(None)
        for _ in range(self._count):
            self._jobs.put(None)

    def _run(self) -> None:
        _here.closed = self._closed
        while (job := self._jobs.get()) is not None:
            future, work, arguments = job
            if self._closed.done():
                future.cancel()
                continue
            try:
                future.set_result(work(*arguments))
            except BaseException as error:
                future.set_exception(error)
            del job, future, work, arguments  # an idle thread keeps nothing alive
