"""Micro-batches for one rank: the plan's order, cut the same way for every world size, resumed by one integer."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from dit_fast.data.batch import BadSample, Batch
from dit_fast.data.cache import ShardCache
from dit_fast.data.dataset import LatentDataset
from dit_fast.data.plan import Plan, Window, merged
from dit_fast.data.reader import IndexedReader
from dit_fast.data.threads import Threads
from dit_fast.errors import ConfigError, DataError

PREFETCH = 4  # micro-batches of each thread
MOST_WORKERS = 256  # of one rank
HANGING_SECONDS = 3600  # a wait this long for a batch never ends: a disk that hangs (servers have limits)
STRIDE = 2654435761  # prime and above any number of samples, so it divides none
TRIES = 16  # samples tried in the place of a bad one


@dataclass(frozen=True)
class Replacement:
    """A position whose sample is bad (`error` says how), and the number of the sample that is there instead."""

    position: int
    sample: int
    shard: str
    by: int
    error: str


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
    cache: ShardCache | None = None,
    on_bad: Callable[[Replacement], None] | None = None,
) -> Iterator[Batch]:
    """Endless iterator over this rank's micro-batches, from position `start` (samples seen) on.

    Global batch t holds positions start + [t B, (t+1) B), or later ones where windows of whole batches are left out;
    rank r takes [r::world_size] of them, cut into micro-batches of `micro_batch`. Each micro-batch: moments float32
    [n, 2, C, h, w] (mean, std), label int64 [n], position int64 [n], and `fields` as `dataset.info.fields` declares
    them, [n, *shape]: float32 where they are floating-point, else in their dtype (image uint8 [n, 3, S, S], features
    float32 [n, T, Z]). reader "indexed" reads shards where they lie, "stream" through `cache` (none: a `ShardCache()`),
    "auto" local folders the first way and addresses the second; all give the same batches. num_workers: threads that
    read ahead; with 0 the caller reads. Memory is pinned when CUDA is there. Closing the iterator ends its threads.

    on_bad: called with each replacement of a bad sample just before its batch comes; what is there instead depends on
    data and position alone, lies in the same shard group, and keeps the position. None: a bad sample is an error.

    Raises ConfigError when the sizes do not divide, DataError for absent fields and, later, for damaged data: BadSample
    for a sample, with `on_bad` where TRIES others are bad too.
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
    streamed = reader == "stream" or (reader == "auto" and dataset.remote)
    indexed = IndexedReader(dataset, fields, check_crc, (cache or ShardCache()) if streamed else None)
    indexed.follow(plan)
    positions = _Positions(global_batch, micro_batch, rank, world_size, start, left_out)
    return _batches(indexed, plan, positions, num_workers, on_bad)


def _read(reader: IndexedReader, plan: Plan, positions: np.ndarray, mend: bool) -> tuple[Batch, Iterable[Replacement]]:
    """The micro-batch at these positions, and which of its samples were replaced."""
    low = int(positions[0])
    samples = plan.indices(low, int(positions[-1]) + 1)[positions - low]
    tries, found = np.zeros(len(samples), np.int64), dict[int, Replacement]()
    while True:
        try:
            return reader.read(positions, samples), found.values()
        except BadSample as error:
            if not mend:
                raise
            for place in np.flatnonzero(samples == error.sample).tolist():
                tries[place] += 1
                if tries[place] > TRIES:
                    raise BadSample(
                        f"{error}; {TRIES} other samples in its place are bad too", error.sample, error.shard
                    ) from None
                position = int(positions[place])
                group = plan.group(position)
                inside = (position - group.start + int(tries[place]) * STRIDE) % (group.stop - group.start)
                samples[place] = plan.order(group)[inside]
                first = found.get(place, Replacement(position, error.sample, error.shard, -1, str(error)))
                found[place] = replace(first, by=int(samples[place]))


def _batches(
    reader: IndexedReader,
    plan: Plan,
    positions: _Positions,
    threads: int,
    on_bad: Callable[[Replacement], None] | None,
) -> Iterator[Batch]:
    pinned = torch.cuda.is_available()

    def make(batch: np.ndarray) -> tuple[Batch, Iterable[Replacement]]:
        reader.enter(plan, batch, positions.rank / positions.world_size)
        try:
            made, replaced = _read(reader, plan, batch, on_bad is not None)
            if pinned:
                made = {name: values.pin_memory() for name, values in made.items()}
            return made, replaced
        except (MemoryError, RuntimeError) as error:  # torch's allocators raise RuntimeError
            text = (str(error).splitlines() or [""])[0]
            if isinstance(error, RuntimeError) and "allocate" not in text:
                raise
            raise DataError(
                f"no memory for a batch ({text or 'MemoryError'}); use fewer data.num_workers or a smaller "
                "engine.micro_batch"
            ) from None

    def told(made: Batch, replaced: Iterable[Replacement]) -> Batch:
        for each in replaced:
            assert on_bad is not None
            on_bad(each)
        return made

    pool = _threads(threads) if threads else None
    waiting: deque[Future] = deque()
    try:
        for batch in positions:
            if pool is None:
                yield told(*make(batch))
                continue
            waiting.append(pool.submit(make, batch))
            if len(waiting) > PREFETCH * threads:
                yield told(*_made(waiting.popleft()))
    finally:
        if pool is not None:
            pool.close()
        if reader.cache is not None:
            reader.cache.close()


def _threads(count: int) -> Threads:
    try:
        return Threads(count, "read")
    except RuntimeError as error:
        raise DataError(f"{count} reading threads cannot be started ({error}); use fewer data.num_workers") from None


def _made(future: Future) -> tuple[Batch, Iterable[Replacement]]:
    try:
        return future.result(HANGING_SECONDS)
    except TimeoutError:
        if future.done():
            raise
        raise DataError(f"no batch came in {HANGING_SECONDS} s; the disk or its server hangs") from None
