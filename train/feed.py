"""The batches of one rank, fetched ahead, so that all ranks leave at the same step where one of them has no more."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dit_fast.data import LatentDataset, Plan, ShardCache, build_loader
from dit_fast.data.loader import Replacement
from dit_fast.data.plan import Window
from dit_fast.errors import DataError, UserError
from dit_fast.runs import TrainConfig
from dit_fast.world import World

Batch = dict[str, Tensor]

AHEAD = 2  # the agreement to leave is read one step after it was asked for: the step in between needs its batch


def batches_of(
    config: TrainConfig,
    dataset: LatentDataset,
    world: World,
    micro: int,
    start: int,
    left_out: Sequence[Window],
    fields: tuple[str, ...],
    on_bad: Callable[[Replacement], None],
) -> Iterator[Batch]:
    """This rank's micro-batches of a run from position `start` on; on_bad is told what was replaced."""
    streamed = config.data.reader == "stream" or dataset.remote
    return build_loader(
        dataset,
        Plan(dataset.info.shard_sizes, config.data_seed, config.data.shuffle_group),
        global_batch=config.engine.global_batch,
        micro_batch=micro,
        rank=world.rank,
        world_size=world.size,
        start=start,
        left_out=left_out,
        fields=fields,
        num_workers=config.data.num_workers,
        reader=config.data.reader,
        check_crc=config.data.check_crc,
        cache=ShardCache(config.data.cache, int(config.data.cache_gib * 2**30)) if streamed else None,
        on_bad=None if config.data.strict else on_bad,
    )


class Feed:
    """Micro-batches of the steps to come. An error that ends them is kept until all ranks have agreed to leave.

    batches: endless, per micro-batch. per_step: how many make a step of this rank. steps: how many steps are wanted.
    """

    def __init__(self, batches: Iterator[Batch], per_step: int, steps: int, world: World):
        self._batches, self._per_step, self._left, self._world = batches, per_step, steps, world
        self._ready: deque[list[Batch]] = deque()
        self.error: Exception | None = None

    def fetch(self) -> None:
        """Fills up to AHEAD steps; raises nothing."""
        while len(self._ready) < AHEAD and self._left and self.error is None:
            try:
                self._ready.append([next(self._batches) for _ in range(self._per_step)])
                self._left -= 1
            except Exception as error:  # a fault of the program too: what was learned until now is saved first
                self.error = error

    def take(self) -> list[Batch]:
        """The micro-batches of the next step, on the device."""
        batches = self._ready.popleft()
        return [{k: v.to(self._world.device, non_blocking=True) for k, v in batch.items()} for batch in batches]

    def dry(self) -> bool:
        """Whether some rank has nothing for the next step; collective, waits for the device."""
        flag = torch.tensor([float(not self._ready)], dtype=torch.float32, device=self._world.device)
        return bool(self._world.reduce(flag, "max").item())

    def failure(self) -> Exception:
        """The error of the first rank that has one, named, on all ranks; collective."""
        failed = self._world.size - self._world.rank if self.error is not None else 0
        first = self._world.reduce(torch.tensor([failed], dtype=torch.int64, device=self._world.device), "max")
        rank = self._world.size - int(first.item())
        text = self._world.agree(lambda: _text(self.error), rank)
        if rank == self._world.rank and not isinstance(self.error, UserError):
            assert self.error is not None
            return self.error
        return DataError(f"rank {rank}: {text}")


def _text(error: Exception | None) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
