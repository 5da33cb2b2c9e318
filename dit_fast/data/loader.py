"""Micro-batches for one rank: the plan's order, cut the same way for every world size, resumed by one integer."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from dit_fast.data.dataset import LatentDataset
from dit_fast.data.plan import Plan
from dit_fast.data.reader import IndexedReader
from dit_fast.data.stream import StreamReader
from dit_fast.errors import ConfigError, DataError, UserError

PREFETCH = 4


class _Positions:
    """The positions of one rank's micro-batches, without end: int64 [micro_batch] each."""

    def __init__(self, global_batch: int, micro_batch: int, rank: int, world_size: int, start: int):
        self.global_batch, self.micro_batch, self.start = global_batch, micro_batch, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[np.ndarray]:
        first = self.start
        while True:
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
        try:
            return self.reader.read(*item)
        except UserError as error:
            return error


class _Streamed(IterableDataset):
    """Worker w of n takes micro-batches w, w + n, ...; the DataLoader asks the workers in turn: the order is kept."""

    def __init__(self, reader: StreamReader, positions: _Positions):
        self.reader, self.positions = reader, positions

    def __iter__(self) -> Iterator[dict[str, torch.Tensor] | UserError]:
        worker = get_worker_info()
        step, first = (worker.num_workers, worker.id) if worker else (1, 0)
        mine = (batch for number, batch in enumerate(self.positions) if number % step == first)
        try:
            yield from self.reader.read(mine)
        except UserError as error:
            yield error


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
    fields: tuple[str, ...] = (),
    num_workers: int = 0,
    reader: Literal["auto", "indexed", "stream"] = "auto",
    check_crc: bool = True,
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless iterator over this rank's micro-batches, from position `start` (samples seen) on.

    Global batch t holds positions start + [t B, (t+1) B); rank r takes [r::world_size] of them, cut into
    micro-batches of `micro_batch`. Each micro-batch: moments float32 [n, 2, C, h, w] (mean, std), label int64 [n],
    position int64 [n], and for `fields`: image uint8 [n, 3, S, S], features float32 [n, T, Z]. reader "auto":
    "indexed" for local folders, "stream" for addresses; both give the same batches. Memory is pinned when CUDA is
    there. Closing the iterator ends its workers.

    Raises ConfigError when the sizes do not divide, DataError for absent fields and, later, for damaged data.
    """
    if micro_batch < 1 or world_size < 1 or global_batch % (micro_batch * world_size):
        raise ConfigError(
            f"global_batch {global_batch} is not a multiple of micro_batch {micro_batch} x {world_size} ranks; "
            "change engine.global_batch or engine.micro_batch"
        )
    if not 0 <= rank < world_size or start < 0 or num_workers < 0:
        raise ConfigError(f"rank {rank} of {world_size}, start {start}, {num_workers} workers: out of range")
    if reader not in ("auto", "indexed", "stream"):
        raise ConfigError(f"unknown reader '{reader}'; valid: auto, indexed, stream")
    if plan.num_samples != len(dataset):
        raise DataError(
            f"{dataset.root}: has {len(dataset)} samples, the plan was made for {plan.num_samples}; make a new Plan"
        )
    positions = _Positions(global_batch, micro_batch, rank, world_size, start)
    options: dict[str, Any] = {
        "batch_size": None,
        "collate_fn": _as_is,
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available(),
        "in_order": True,
        "prefetch_factor": PREFETCH if num_workers else None,
    }
    if reader == "stream" or (reader == "auto" and dataset.remote):
        loader = DataLoader(_Streamed(StreamReader(dataset, plan, fields, check_crc), positions), **options)
    else:
        indexed = _Indexed(IndexedReader(dataset, fields, check_crc))
        loader = DataLoader(indexed, sampler=_Planned(positions, plan), **options)  # type: ignore[arg-type]
    return _raising(loader)


def _raising(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item
