"""Threads that read and fetch."""

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from dit_fast.errors import DataError

ENDING_SECONDS = 2.0
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
            thread = threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True)
            thread.start()
            _running[thread] = self

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future:
        """The result of `work(*arguments)`, or what it raises, in a while."""
        future: Future = Future()
        self._jobs.put((future, work, arguments))
        return future

    def close(self) -> None:
        """No further job is begun, and those that wait for a server end. Waits for nothing; may be called again."""
        if self._closed.done():
            return
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


_running: weakref.WeakKeyDictionary[threading.Thread, Threads] = weakref.WeakKeyDictionary()


@atexit.register
def _end() -> None:
    """Waits a moment for what threads are doing: one that comes back from compiled code while Python is taken down ends
    the program with SIGABRT. One that hangs does not come back."""
    running, last = dict(_running), time.monotonic() + ENDING_SECONDS
    for threads in running.values():
        threads.close()
    for thread in running:
        thread.join(max(last - time.monotonic(), 0))
