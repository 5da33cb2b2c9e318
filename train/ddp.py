"""The engine of torch's DistributedDataParallel: every rank holds everything, and gradients are averaged."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from dit_fast.runs import TrainConfig
from dit_fast.train.engine import Batch, Groups, SingleEngine, StepResult
from dit_fast.world import World

# torch 2.13 has another name for it, under which buffers would still be copied at the start
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)


class DDPEngine(SingleEngine):
    """`SingleEngine` in every rank, with gradients averaged over the ranks while the backward runs.

    Buckets have torch's sizes, whatever engine.reduce_bucket_size; they are the gradients (no copies). Where all ranks
    are done, weights, moments and averages are the same bits on each. loss: as `Engine`'s.
    """

    def __init__(self, loss: nn.Module, config: TrainConfig, world: World, groups: Groups = ()):
        parallel = DistributedDataParallel(  # makes the ranks' weights those of rank 0, before states copy them
            loss.to(world.device),
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=True,  # a step may use others than the one before
        )
        super().__init__(loss, config, world, groups)
        if config.engine.communication_dtype == "bf16":
            parallel.register_comm_hook(None, default_hooks.bf16_compress_hook)
        self._parallel = self._called = parallel
        self._left = 0  # micro-batches of this step

    def _whole_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        self._left = len(micro_batches)
        return super()._whole_step(micro_batches, step)

    def _forward(self, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        self._left -= 1
        with self._parallel.no_sync() if self._left else nullcontext():
            return super()._forward(batch, step)
