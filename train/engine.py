"""Engines run a step: `SingleEngine` in one process, `zero.ZeroEngine` in DeepSpeed's ranks, behind one protocol."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dit_fast.config import TrainConfig
from dit_fast.train.optim import STATES, applied_steps, build_optimizer, set_applied_steps
from dit_fast.train.world import World

KINDS = ("model", *reversed(STATES))  # "model", "ema", "exp_avg_sq", "exp_avg"
Batch = Mapping[str, Tensor]
Source = Callable[[str], Tensor]


@dataclass(frozen=True)
class StepResult:
    """logs: this rank's values, averaged over micro-batches, 0-d on the device. grad_norm: global L2 norm before
    clipping (inf or nan where the step was not applied). applied: False when the gradient was not finite: then weights,
    EMA and moments are what they were before, on every rank."""

    logs: dict[str, Tensor]
    grad_norm: Tensor | float
    applied: bool


class Engine(Protocol):
    """One training step and access to the whole state, whatever the sharding."""

    world: World
    objective: nn.Module

    def train_step(self, micro_batches: Sequence[Batch], step: int, lr: float) -> StepResult:
        """Forward and backward over the micro-batches of this rank, then one clipped update."""

    def trainable(self) -> list[tuple[str, torch.Size]]:
        """Names (of the model) and shapes of the trained parameters, in the model's order; the same on every rank."""

    def full_state(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor) of "model", "ema", "exp_avg" or "exp_avg_sq" for every trained parameter.

        Collective: all ranks iterate to the end, and all get every tensor whole. Not for use after it is advanced.
        """

    def load_full_state(self, kind: str, source: Source) -> None:
        """Puts `source(name)` into the moments or EMA of every trained parameter; weights are loaded earlier."""

    def applied_steps(self) -> int: ...

    def set_applied_steps(self, count: int) -> None: ...


class Accumulator:
    """Mean of the logs of the micro-batches of a step."""

    def __init__(self, count: int):
        self.count, self.sums = count, {}  # type: ignore[var-annotated]

    def add(self, logs: Mapping[str, Tensor]) -> None:
        for name, value in logs.items():
            value = value.float() / self.count
            self.sums[name] = self.sums[name] + value if name in self.sums else value


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Global L2 norm of the gradients, 0-d float32 on their device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def clip_or_drop(parameters: Sequence[nn.Parameter], limit: float) -> tuple[Tensor, bool]:
    """Scales gradients to a global norm of at most `limit` (0: as they are); drops all where the norm is not finite.

    An optimizer leaves parameters without a gradient alone, so a dropped step changes nothing. The test waits for the
    device once a step, as DeepSpeed's own does in stages 1 to 3.
    """
    norm = gradient_norm(parameters)
    if not torch.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None
        return norm, False
    if limit > 0:
        scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
        torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], scale)
    return norm, True


def own_parameters(objective: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trained parameters of the objective's model, by the model's names."""
    model: Any = objective.model
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


class SingleEngine:
    """One process, no DeepSpeed. The objective is moved to the world's device."""

    def __init__(self, objective: nn.Module, config: TrainConfig, world: World):
        self.world, self.config = world, config
        self.objective = objective.to(world.device)
        self._named = own_parameters(objective)
        self._parameters = [parameter for _, parameter in self._named]
        self._optimizer = build_optimizer(config.optimizer, self._parameters, world.device.type)
        self._optimizer.init_states()

    def train_step(self, micro_batches: Sequence[Batch], step: int, lr: float) -> StepResult:
        logs = Accumulator(len(micro_batches))
        for batch in micro_batches:
            loss, values = self.objective(batch, step)
            (loss / len(micro_batches)).backward()
            logs.add(values)
        norm, applied = clip_or_drop(self._parameters, self.config.optimizer.grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(logs.sums, norm, applied)

    def trainable(self) -> list[tuple[str, torch.Size]]:
        return [(name, parameter.shape) for name, parameter in self._named]

    def full_state(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._named:
            yield name, parameter.detach() if kind == "model" else self._optimizer.state[parameter][kind]

    def load_full_state(self, kind: str, source: Source) -> None:
        for name, parameter in self._named:
            self._optimizer.state[parameter][kind].copy_(source(name))

    def applied_steps(self) -> int:
        return applied_steps(self._optimizer)

    def set_applied_steps(self, count: int) -> None:
        set_applied_steps(self._optimizer, count)
