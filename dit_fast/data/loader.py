"""Micro-batches for one rank: the plan's order, cut the same way for every world size, resumed by one integer."""

import multiprocessing.connection
import multiprocessing.util
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from dit_fast.data.dataset import LatentDataset
from dit_fast.data.plan import Plan, Window, merged
from dit_fast.data.reader import IndexedReader
from dit_fast.data.stream import StreamReader
from dit_fast.errors import ConfigError, DataError, UserError

PREFETCH = 4
MOST_WORKERS = 256  # of one rank
POLL_SECONDS = 5  # between looks at whether the workers live
# a wait this long for a batch never ends: a disk that hangs, a full /dev/shm (connections have limits)
HANGING_SECONDS = 3600


class _Positions:
    """The positions of one rank's micro-batches, without end: int64 [micro_batch] each."""

    def __init__(
        self, global_batch: int, micro_batch: int, rank: int, world_size: int, start: int, left_out: Sequence[Window]
    ):
        self.global_batch, self.micro_batch, self.start = global_batch, micro_batch, start
        self.left_out = merged(left_out)
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[np.ndarray]:
        first = self.start
        while True:
            first = next((stop for start, stop in self.left_out if start <= first < stop), first)
            mine = np.arange(first + self.rank, first + self.global_batch, self.world_size, dtype=np.int64)
            yield from mine.reshape(-1, self.micro_batch)
            first += self.global_batch


class _Planned:
    """A sampler: (positions, sample numbers) per micro-batch."""

    def __init__(self, positions: _Positions, plan: Plan):
        self.positions, self.plan = positions, plan

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in self.positions:
            low = int(batch[0])
            yield batch, self.plan.indices(low, int(batch[-1]) + 1)[batch - low]


class _Indexed(Dataset):
    """Micro-batches by (positions, sample numbers). Errors travel as values: torch would wrap them in its traceback."""

    def __init__(self, reader: IndexedReader):
        self.reader = reader

    def __getitem__(self, item: tuple[np.ndarray, np.ndarray]) -> dict[str, torch.Tensor] | UserError:
        return _or_error(lambda: self.reader.read(*item))


class _Streamed(IterableDataset):
    """Worker w of n takes micro-batches w, w + n, ...; the DataLoader asks the workers in turn: the order is kept."""

    def __init__(self, reader: StreamReader, positions: _Positions):
        self.reader, self.positions = reader, positions

    def __iter__(self) -> Iterator[dict[str, torch.Tensor] | UserError]:
        worker = get_worker_info()
        step, first = (worker.num_workers, worker.id) if worker else (1, 0)
        batches = self.reader.read(batch for number, batch in enumerate(self.positions) if number % step == first)
        item: dict[str, torch.Tensor] | UserError | None = None
        while not isinstance(item, UserError):
            item = _or_error(lambda: next(batches))
            yield item


def _or_error(read: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor] | UserError:
    """A batch, or what the user can mend; other errors are ours and keep their traceback."""
    try:
        batch = read()
        if get_worker_info():  # where a full /dev/shm can be told; else a thread of torch meets it and goes silent
            for tensor in batch.values():
                tensor.share_memory_()
        return batch
    except UserError as error:
        return error
    except (MemoryError, RuntimeError) as error:  # torch's allocators raise RuntimeError
        text = (str(error).splitlines() or [""])[0]
        known = any(words in text for words in ("allocate", "unable to", "No space"))
        if isinstance(error, RuntimeError) and not known:
            raise
        return DataError(
            f"no memory for a batch ({text or 'MemoryError'}); use fewer data.num_workers, a smaller "
            "data.shuffle_group (streams) or a larger /dev/shm (docker: --shm-size)"
        )


def _as_is(item: Any) -> Any:
    return item


def build_loader(
    dataset: LatentDataset,
    plan: Plan,
    *,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    start: int,
    left_out: Sequence[Window] = (),
    fields: tuple[str, ...] = (),
    num_workers: int = 0,
    reader: Literal["auto", "indexed", "stream"] = "auto",
    check_crc: bool = True,
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless iterator over this rank's micro-batches, from position `start` (samples seen) on.

    Global batch t holds positions start + [t B, (t+1) B), or later ones where windows of whole batches are left out;
    rank r takes [r::world_size] of them, cut into micro-batches of `micro_batch`. Each micro-batch: moments float32
    [n, 2, C, h, w] (mean, std), label int64 [n], position int64 [n], and `fields` as `dataset.info.fields` declares
    them, [n, *shape]: float32 where they are floating-point, else in their dtype (image uint8 [n, 3, S, S], features
    float32 [n, T, Z]). reader "auto": "indexed" for local folders, "stream" for addresses; both give the same batches.
    Memory is pinned when CUDA is there. Closing the iterator ends its workers.

    Raises ConfigError when the sizes do not divide, DataError for absent fields and, later, for damaged data.
    """
    if micro_batch < 1 or world_size < 1 or global_batch % (micro_batch * world_size):
        raise ConfigError(
            f"global_batch {global_batch} is not a multiple of micro_batch {micro_batch} x {world_size} ranks; "
            "change engine.global_batch or engine.micro_batch"
        )
    if not 0 <= rank < world_size or start < 0 or num_workers < 0:
        raise ConfigError(f"rank {rank} of {world_size}, start {start}, {num_workers} workers: out of range")
    if num_workers > MOST_WORKERS:
        raise ConfigError(f"data.num_workers is {num_workers}; a rank takes at most {MOST_WORKERS}, a few are enough")
    if reader not in ("auto", "indexed", "stream"):
        raise ConfigError(f"unknown reader '{reader}'; valid: auto, indexed, stream")
    if plan.num_samples != len(dataset):
        raise DataError(
            f"{dataset.root}: has {len(dataset)} samples, the plan was made for {plan.num_samples}; make a new Plan"
        )
    positions = _Positions(global_batch, micro_batch, rank, world_size, start, left_out)
    options: dict[str, Any] = {
        "batch_size": None,
        "collate_fn": _as_is,
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available(),
        "in_order": True,
        "prefetch_factor": PREFETCH if num_workers else None,
        "timeout": POLL_SECONDS if num_workers else 0,
        "worker_init_fn": _start_worker,
    }
    if reader == "stream" or (reader == "auto" and dataset.remote):
        loader = DataLoader(_Streamed(StreamReader(dataset, plan, fields, check_crc), positions), **options)
    else:
        indexed = _Indexed(IndexedReader(dataset, fields, check_crc))
        loader = DataLoader(indexed, sampler=_Planned(positions, plan), **options)
    return _raising(loader)


def _start_worker(_: int) -> None:
    """What goes to a whole group of processes is the trainer's to answer; it ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # DeepSpeed's launcher sends SIGTERM to all descendants of a rank, whose last steps need them: the second one ends
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _raising(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    batches = _start(loader)
    # at exit multiprocessing waits for what it sent one SIGTERM, and the first does not end a worker
    at_exit = multiprocessing.util.Finalize(None, _kill, (getattr(batches, "_workers", []),), exitpriority=0)
    try:
        while not isinstance(item := _next(batches, loader.num_workers), UserError):
            yield item
    finally:
        del batches  # ends the workers now: a traceback would keep them
        at_exit.cancel()
    raise item


def _next(batches: Iterator[Any], num_workers: int) -> dict[str, torch.Tensor] | UserError:
    """The next batch, or the error that stands in its place."""
    waited = 0
    while True:
        try:
            return next(batches)
        except (RuntimeError, OSError, EOFError) as error:
            if not isinstance(error, RuntimeError):  # a connection ends a little before its dying worker does
                workers = {worker.sentinel: worker for worker in getattr(batches, "_workers", [])}
                for ended in multiprocessing.connection.wait(list(workers), timeout=5):
                    workers[ended].join(5)
            dead, timed_out = _death(batches), "timed out" in str(error)
            if dead is None and "exited unexpectedly" in str(error):  # with status 0: interrupted while it started
                dead = "a loader worker ended before its work was done"
            if dead is None and not timed_out:
                raise
            waited += POLL_SECONDS
            if dead is None and waited < HANGING_SECONDS:
                continue
            hangs = f"no batch came in {HANGING_SECONDS} s; the disk or its server hangs, or /dev/shm is full"
            return DataError(f"{dead or hangs}; use fewer than {num_workers} data.num_workers")


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        worker.kill()


def _start(loader: DataLoader) -> Iterator[Any]:
    """The loader's iterator with its workers running.

    torch sets a handler that raises wherever the main program is when a worker dies, in the middle of an optimizer step
    too. It is taken away again: `next` finds out by itself, within seconds.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if main else None
    try:
        return iter(loader)
    except OSError as error:
        raise DataError(
            f"{loader.num_workers} loader workers cannot be started ({error.strerror}); use fewer data.num_workers"
        ) from None
    finally:
        if main and before is not None:
            signal.signal(signal.SIGCHLD, before)


def _death(batches: Any) -> str | None:
    """How a worker ended, with the likely cause; None where all live."""
    for code in (worker.exitcode for worker in getattr(batches, "_workers", [])):
        if code == -signal.SIGKILL:
            return "a loader worker was killed, most often because memory ran out"
        if code == -signal.SIGBUS:
            return "a loader worker ended by SIGBUS: /dev/shm is full (docker: give a larger --shm-size)"
        if code:
            return f"a loader worker ended by {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"
    return None
