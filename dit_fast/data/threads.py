"""Threads that read and fetch."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Threads:
    """A few daemon threads: one that waits for a disk or a server does not keep the program from ending, as those of
    concurrent.futures would.
    """

    def __init__(self, count: int, name: str):
        self._jobs: queue.SimpleQueue[tuple[Future, Callable[..., Any], tuple] | None] = queue.SimpleQueue()
        self._count, self._closed = count, False
        for number in range(count):
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True).start()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future:
        """The result of `work(*arguments)`, or what it raises, in a while."""
        future: Future = Future()
        self._jobs.put((future, work, arguments))
        return future

    def close(self) -> None:
        """No further job is begun. Waits for nothing."""
        self._closed = True
        for _ in range(self._count):
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, work, arguments = job
            if self._closed:
                future.cancel()
                continue
            try:
                future.set_result(work(*arguments))
            except BaseException as error:
                future.set_exception(error)
            del job, future, work, arguments  # an idle thread keeps nothing alive
