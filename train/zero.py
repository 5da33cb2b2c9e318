"""The DeepSpeed engine, ZeRO stages 0 to 3: the only home of deepspeed and of its private names.

Weights are float32 in every stage and bf16 is autocast inside the loss: DeepSpeed's own bf16 mode takes a wrong
first step in stage 0, and gradients would be reduced in half precision. Checkpoints are ours, so nothing here loads
or writes a pickle. Tested with deepspeed 0.19; the contract is tests/train/test_zero.py.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dit_fast.errors import ConfigError
from dit_fast.ops.linear import renew_shadows
from dit_fast.ops.long_skip import refold
from dit_fast.runs import TrainConfig
from dit_fast.train.engine import Batch, Engine, Groups, Source, uneven_ranks
from dit_fast.train.optim import init_states
from dit_fast.world import World

ours = logging.getLogger("dit_fast")

NEVER = 2**31 - 1  # steps between DeepSpeed's own progress lines

# torch 2.13 renamed collectives that DeepSpeed 0.19 calls by their old names, at every step
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise every process warns that it looked for a GPU

try:
    import deepspeed
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
except ImportError as failure:
    raise ConfigError(
        f"engine.name=deepspeed needs DeepSpeed, which does not import ({failure}); pip install 'dit_fast[train]', or "
        "set engine.name=ddp"
    ) from None

# The shared-memory collective is compiled as DeepSpeed meets a process group on CPUs; a run shall not need a compiler.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


class Fragment(NamedTuple):
    """Where this rank's part of a parameter lies: flat[start : start + length] = whole.flatten()[offset : ...]."""

    flat: Tensor
    start: int
    offset: int
    length: int


def deepspeed_config(config: TrainConfig, world_size: int, micro_batch: int, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's JSON, generated; buckets are never larger than the model."""
    engine = config.engine
    return {
        "train_batch_size": engine.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": engine.global_batch // (micro_batch * world_size),
        "gradient_clipping": 0.0,  # ours, by group; its default is 1
        "communication_data_type": engine.communication_dtype,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": NEVER,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "overlap_comm": engine.overlap_comm and engine.zero_stage > 1,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": min(engine.reduce_bucket_size, num_parameters),
            "allgather_bucket_size": min(engine.allgather_bucket_size, num_parameters),
        },
    }


class ZeroEngine(Engine):
    """DeepSpeed ranks. The model's weights must be in place before; optimizer states are restored after."""

    def __init__(self, loss: nn.Module, config: TrainConfig, world: World, micro_batch: int, groups: Groups = ()):
        super().__init__(loss, config, world, groups)
        self.stage = config.engine.zero_stage
        size = sum(shape.numel() for shape in self._shapes.values())
        if config.engine.overlap_comm and self.stage < 2 and world.rank == 0:
            ours.warning(
                "engine.overlap_comm=true is not used in ZeRO stage %d: DeepSpeed's stage 1 then applies gradients "
                "that were not reduced; set engine.overlap_comm=false, or engine.zero_stage=2",
                self.stage,
            )
        self._leaves = [(name, module) for name, module in loss.named_modules() if [*module.parameters(False)]]
        if self.stage == 3:
            register_reads(loss)
            for index, (_, module) in enumerate(self._leaves):  # before DeepSpeed's hooks, which gather parameters
                self._hooks.append(module.register_forward_pre_hook(lambda *_, index=index: self._together(index)))
        linear = nn.functional.linear
        logger = logging.getLogger("DeepSpeed")
        logger.setLevel(logging.ERROR)  # "untested optimizer" and the like; ours is tested
        self._engine, *_ = deepspeed.initialize(
            model=loss,
            optimizer=self._optimizer,
            config=deepspeed_config(config, world.size, micro_batch, size),
            dist_init_required=False,
        )
        logger.setLevel(logging.WARNING)
        # Stage 3 puts one of its own there, for the whole process, which has no forward mode nor second derivative.
        self._linear, nn.functional.linear = nn.functional.linear, linear
        init_states(self._optimizer, self._flats())
        self._shadows = [] if self.stage == 3 else self._make_shadows()  # stage 3 holds no whole weights

    def _forward(self, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        with self._own_linear():
            result = self._engine(batch, step)
        if self.stage == 3:
            self._together(-1)
        return result

    @contextmanager
    def _own_linear(self) -> Iterator[None]:
        linear, nn.functional.linear = nn.functional.linear, self._linear
        try:
            yield
        finally:
            nn.functional.linear = linear

    @torch.compiler.disable
    def _together(self, index: int) -> None:
        """Raises ConfigError in the first step unless all ranks enter this one of the modules now (-1: have ended).

        Stage 3 gathers a module's parameters as it is entered: ranks in different modules would wait for ever.
        """
        if not self._checked and not self._in_backward:
            both = torch.tensor([index, -index], dtype=torch.int64, device=self.world.device)
            most, least = self.world.reduce(both, "max").tolist()
            if most != -least:
                raise uneven_ranks(f"the module '{self._leaves[most][0]}'")

    def _backward(self, loss: Tensor, count: int) -> None:
        with self._own_linear():  # recomputed blocks
            self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def _gradients(self) -> list[list[Tensor]]:
        if self.stage == 0:
            return super()._gradients()
        zero = self._engine.optimizer
        found: list[list[Tensor]] = [[] for _ in self._optimizer.param_groups]
        for part, gradients in zero.averaged_gradients.items():
            found[zero.sub_group_to_group_id[part] if self.stage == 3 else part].extend(gradients)
        return found

    def _over_ranks(self, norms: list[Tensor]) -> Tensor:
        whole = super()._over_ranks(norms)
        return self.world.reduce(whole.square(), "sum").sqrt() if self.stage else whole

    def _step(self) -> None:
        self._engine.step()
        if self.stage and self._shadows:  # after the gather; in stage 0 the optimizer has written them
            weights = [parameter for _, parameter in self._named]
            torch.autograd.graph.increment_version(weights)  # which DeepSpeed writes by other names
            renew_shadows(weights)
            refold(weights)
        if self.stage == 3:  # a parameter without a gradient would be moved by its last one again
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()

    def _step_or_not(self, applied: Tensor) -> Tensor:
        if self.stage == 0:  # DeepSpeed would apply a gradient that is not finite
            return super()._step_or_not(applied)
        self._step()
        return torch.full_like(applied, self._engine.was_step_applied())

    def untrained(self) -> dict[str, Tensor]:
        with self._gathered(False):
            state = super().untrained()
            return {name: tensor.clone() for name, tensor in state.items()} if self.stage == 3 else state

    @contextmanager
    def whole(self) -> Iterator[None]:
        with self._gathered(True), self._gathered(False, modifier_rank=0):
            yield

    def _gathered(self, trained: bool, **options: Any) -> AbstractContextManager[Any]:
        parameters = [parameter for parameter in self.loss.parameters() if parameter.requires_grad is trained]
        return deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3, **options)

    def full_state(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        if self.stage == 0:
            yield from super().full_state(kind)
            return
        for name, first, piece, _ in self.own_state(kind):
            whole = torch.zeros(self._shapes[name].numel(), dtype=torch.float32, device=self.world.device)
            whole[first : first + len(piece)].copy_(piece)
            # every element comes from one rank; adding bit patterns to zeros keeps even the sign of zero
            self.world.reduce(whole.view(torch.int32), "sum")
            yield name, whole.view(self._shapes[name])

    def own_state(self, kind: str) -> Iterator[tuple[str, int, Tensor, Tensor]]:
        if self.stage == 0:
            yield from super().own_state(kind)
            return
        for name, parameter in self._named:
            fragment = self._fragment(parameter)
            if fragment is None:
                piece = torch.empty(0, dtype=torch.float32, device=self.world.device)
                yield name, 0, piece, piece
            else:
                values = fragment.flat if kind == "model" else self._optimizer.state[fragment.flat][kind]
                piece = values.detach()[fragment.start : fragment.start + fragment.length]
                yield name, fragment.offset, piece, piece

    def load_full_state(self, kind: str, source: Source) -> None:
        if self.stage == 0:
            super().load_full_state(kind, source)
            return
        for name, parameter in self._named:
            fragment = self._fragment(parameter)
            if fragment is not None:
                part = source(name, fragment.offset, fragment.offset + fragment.length)
                target = self._optimizer.state[fragment.flat][kind]
                target[fragment.start : fragment.start + fragment.length].copy_(part)

    def close(self) -> None:
        super().close()
        self._engine.destroy()
        if self.stage == 3:  # what DeepSpeed keeps of a model for ever
            parameter_offload.FWD_MODULE_STACK.clear()
            for method in vars(PartitionedParameterCoordinator).values():
                for cell in getattr(method, "__closure__", None) or ():
                    if hasattr(cell.cell_contents, "cache_clear"):
                        cell.cell_contents.cache_clear()

    def _flats(self) -> list[Tensor]:
        """The tensors the optimizer updates: whole parameters in stage 0, this rank's flat float32 partitions above."""
        if self.stage == 0:
            return [parameter for _, parameter in self._named]
        if self.stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return list(self._engine.optimizer.single_partition_of_fp32_groups)

    def _fragment(self, parameter: Any) -> Fragment | None:
        zero = self._engine.optimizer
        if self.stage == 3:
            group, start, length = zero.grad_position[zero.get_param_id(parameter)]
            offset = length * self.world.rank
            length = min(length, parameter.ds_numel - offset)  # the last part may be padded
            return Fragment(zero.fp32_partitioned_groups_flat[group], start, offset, length) if length > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Fragment(flat, inside.start, outside.start, outside.numel)


def register_reads(loss: nn.Module) -> None:
    """Tells DeepSpeed which modules read parameters of others; it finds out by itself, but not in compiled blocks."""
    for module in loss.modules():
        for reader, owner in getattr(module, "reads", list)():
            for parameter in owner.parameters():
                deepspeed.zero.register_external_parameter(reader, parameter)


def deepspeed_fused_adam() -> type[torch.optim.Optimizer]:
    """DeepSpeed's FusedAdam class. Its CUDA operation is built when it is made, unless DeepSpeed came prebuilt."""
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam
