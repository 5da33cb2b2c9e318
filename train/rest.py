"""State that no optimizer trains: the model's buffers and frozen parameters, averages of buffers, methods' own tensors.

It is read as it is at every save. What of it moves must move alike on all ranks, for one copy is saved.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dit_fast.checkpoint.step import DTYPES, Checkpoint
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.methods import Method
from dit_fast.train.engine import Engine
from dit_fast.world import World

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def method_tensors(methods: Iterable[Method]) -> dict[str, Tensor]:
    """The moving state of all methods, live, as "METHOD.NAME"."""
    return {f"{method.name}.{name}": tensor for method in methods for name, tensor in method.tensors().items()}


class Rest:
    """The untrained state of a run. decay: of the averages of `Method.averaged` buffers, the same as the weights' EMA.

    checkpoint: the one that the engine was restored from; averages and methods' tensors are then too. Raises
    ConfigError for a method that averages what is no persistent floating-point buffer of the model.
    """

    def __init__(self, methods: Iterable[Method], engine: Engine, decay: float, checkpoint: Checkpoint | None = None):
        self._methods, self._engine, self._decay = tuple(methods), engine, decay
        buffers = {name: x for name, x in self._buffers().items() if name in engine.model.state_dict()}
        self._averages: dict[str, Tensor] = {}
        for method in self._methods:
            for name in method.averaged:
                if name not in buffers or not buffers[name].is_floating_point():
                    raise ConfigError(f"method '{method.name}' averages '{name}', which is no saved buffer of floats")
                self._averages[name] = buffers[name].detach().clone()
        if checkpoint is not None:
            for kind, tensors in (("ema", self._averages), ("rest", method_tensors(self._methods))):
                source = checkpoint.source(kind)
                for name, tensor in tensors.items():
                    tensor.detach().copy_(source(name))
        self._moving = [method for method in self._methods if type(method).after_update is not Method.after_update]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """By file ("model", "ema", "rest") and name; live tensors, not to be changed; collective.

        Raises CheckpointError on all ranks for one that is not the same on all, or of a dtype that no file can hold.
        """
        model, own = self._engine.untrained(), method_tensors(self._methods)
        moving = [*model.items(), *self._averages.items(), *own.items()]
        for name, tensor in moving:
            if tensor.dtype not in DTYPES:
                raise CheckpointError(f"'{name}' is {tensor.dtype}, which a checkpoint cannot hold; use another dtype")
        if (differs := first_difference(self._engine.world, moving)) is not None:
            raise CheckpointError(
                f"'{differs}' is not the same on all ranks, and a checkpoint holds one; average what moves it over the "
                "ranks (torch.distributed.all_reduce)"
            )
        return {"model": model, "ema": model | self._averages, "rest": own}

    @torch.no_grad()
    def after_update(self, applied: Tensor, number: int) -> None:
        """To be called after every step, number from 0; collective. applied: 0-d float32, 0 where no weight moved."""
        active = [method for method in self._moving if method.active(number)]
        if not (active or self._averages):
            return
        engine = self._engine
        if active:
            with engine.whole():
                for method in active:
                    method.after_update(engine.model, applied)
        buffers = self._buffers()
        for name, average in self._averages.items():
            average.lerp_(buffers[name], ((1 - self._decay) * applied).to(average.dtype))

    def _buffers(self) -> dict[str, Tensor]:
        return dict(self._engine.model.named_buffers())


def first_difference(world: World, tensors: Sequence[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor whose bits differ between ranks; collective, the same names in the same order."""
    if world.size == 1 or not tensors:
        return None
    digests = torch.stack([digest(tensor).to(world.device) for _, tensor in tensors])
    spread = world.reduce(torch.stack([digests, -digests]), "max").sum(0)
    return next((name for (name, _), wide in zip(tensors, spread.tolist(), strict=True) if wide), None)


def digest(tensor: Tensor) -> Tensor:
    """0-d int64 in [0, 2^62) on the tensor's device, of its bits and their places; no cryptographic one."""
    bits = tensor.detach().contiguous().reshape(-1).view(INTEGERS[tensor.element_size()]).long()
    place = torch.arange(len(bits), dtype=torch.int64, device=bits.device)
    mixed = (bits + place * 0x9E3779B97F4A7C1) * 0x2545F4914F6CDD1D
    mixed ^= mixed >> 29
    return (mixed * 0x3C79AC492BA7B653).sum() & (2**62 - 1)
