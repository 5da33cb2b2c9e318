"""Engines run a step: `SingleEngine` in one process, `ddp.DDPEngine` and `zero.ZeroEngine` in ranks; `Engine` is all.

What a training loss must keep to, the same for all: all trained parameters lie in its model before the engine is made,
none is 0-dim, and nothing but the engine runs a backward that reaches them (DeepSpeed's stages 1 to 3 would lose a part
of the gradient in silence). A parameter without a gradient has the gradient zero. Which parameters a micro-batch uses
does not depend on the rank.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from operator import is_not
from typing import Any, cast

import torch
from torch import Tensor, nn

from dit_fast.errors import ConfigError
from dit_fast.nn.linear import make_shadows
from dit_fast.nn.long_skip import keep_folded
from dit_fast.ops.linear import renew_shadows
from dit_fast.ops.long_skip import refold
from dit_fast.runs import TrainConfig
from dit_fast.train.graph import GraphedStep, Graphs
from dit_fast.train.optim import AdamWEMA, applied_steps, build_optimizer, init_states, rate_shares, set_applied_steps
from dit_fast.world import World

Batch = Mapping[str, Tensor]
Source = Callable[..., Tensor]  # of a name; of elements from one up to another, with their two numbers behind it
Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class StepResult:
    """All 0-d float32 on the device; whoever reads them waits. logs: this rank's values, averaged over micro-batches.
    grad_norm: global L2 norm before clipping. applied: 1, or 0 where the norm is not finite: then weights, EMA, moments
    and buffers of the model are what they were before, on every rank."""

    logs: dict[str, Tensor]
    grad_norm: Tensor
    applied: Tensor


class Engine(ABC):
    """One training step and access to the whole state, whatever the sharding. Here: parameters that lie whole.

    groups: parameter groups as torch's optimizers take them ("lr" follows the schedule in proportion), for some of the
    model's parameters; one with a "clip" is clipped to that norm by itself, all others together to optimizer.grad_clip.
    Raises ConfigError for a loss that breaks the rules above, at the latest in the first step.
    """

    def __init__(self, loss: nn.Module, config: TrainConfig, world: World, groups: Groups = ()):
        self.loss, self.config, self.world = loss, config, world
        self.model: Any = loss.model
        self._named = own_parameters(loss)
        self._shapes = {name: parameter.shape for name, parameter in self._named}
        apart = {id(parameter): parameter for group in groups for parameter in group["params"]}
        rest = [parameter for _, parameter in self._named if apart.pop(id(parameter), None) is None]
        for parameter in apart.values():
            raise ConfigError(f"a group of the optimizer holds {self._label(parameter)}; register it on the model")
        self._optimizer = build_optimizer(config.optimizer, [{"params": rest}, *groups], world.device.type)
        self._lr_shares = rate_shares(self._optimizer, config.optimizer.lr)
        self._buffers = Buffers(loss)
        self._checked = self._in_backward = False
        self._hooks: list[Any] = [each.register_post_accumulate_grad_hook(self._accumulated) for _, each in self._named]

    def train_step(self, micro_batches: Sequence[Batch], step: int, lr: float) -> StepResult:
        """Forward and backward over the micro-batches of this rank, then one clipped update."""
        if not self._checked:
            self._refuse_unknown(parameter for _, parameter in own_parameters(self.loss))
        self._buffers.keep()
        # Neither compiled blocks nor a replay look whether what they read is of today.
        if self.config.engine.compile or self.config.engine.cuda_graph:
            renew_shadows(parameter for _, parameter in self._named)
            refold(parameter for _, parameter in self._named)
        for group, share in zip(self._optimizer.param_groups, self._lr_shares, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * share)
            else:
                group["lr"] = lr * share
        return self._whole_step(micro_batches, step)

    def _whole_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        sums: dict[str, Tensor] = {}
        for batch in micro_batches:
            loss, logs = self._forward(batch, step)
            if not self._checked:
                reached = list(leaves_of_graph(loss))
                self._refuse_unknown(reached)
                self._refuse_uneven(reached)
            self._in_backward = True
            self._backward(loss, len(micro_batches))
            self._in_backward = False
            for name, value in logs.items():
                value = value.float() if len(micro_batches) == 1 else value.float() / len(micro_batches)
                sums[name] = sums[name] + value if name in sums else value
        self._checked = True
        norm, applied = self._update()
        self._buffers.settle(applied)
        return StepResult(sums, norm, applied)

    def _make_shadows(self) -> list[tuple[Tensor, Tensor]]:
        """Gives the parameters of linear layers their copies for autocast; (copy, parameter) of each.

        To be called when the weights are in place. Where something else than the optimizer writes one afterwards, its
        next reader writes its copy anew.
        """
        if self.config.engine.precision != "bf16" or not isinstance(self._optimizer, AdamWEMA):
            return []
        trained = [parameter for _, parameter in self._named]
        keep_folded(self.model, trained)
        return make_shadows(self.model, trained)

    @abstractmethod
    def _forward(self, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]: ...

    @abstractmethod
    def _backward(self, loss: Tensor, count: int) -> None:
        """Adds the gradient of loss / count."""

    @abstractmethod
    def _step(self) -> None:
        """The optimizer's step."""

    def _update(self) -> tuple[Tensor, Tensor]:
        """One clipped step of the optimizer: the norm of the whole gradient, and whether it was applied."""
        gradients = self._gradients()
        norm, factors = self._clip(gradients)
        applied = (norm < math.inf).float()
        if isinstance(self._optimizer, AdamWEMA):
            self._optimizer.applied = applied
            for group, factor in zip(self._optimizer.param_groups, factors, strict=True):
                group["factor"] = factor
            self._step()
        else:
            for own, factor in zip(gradients, factors, strict=True):
                if own and factor is not None:
                    torch._foreach_mul_(own, factor + (norm - norm))  # adds zero, or NaN where the norm is not finite
            applied = self._step_or_not(applied)
        return norm, applied

    def _clip(self, every: Sequence[list[Tensor]]) -> tuple[Tensor, list[Tensor | None]]:
        """The norm of the whole gradient, 0-d float32, and by what each group's is multiplied; None: by 1."""
        groups = self._optimizer.param_groups
        bundles: dict[int, list[Tensor]] = {}  # by the group whose limit it is; -1: the general one
        keys = [index if "clip" in group else -1 for index, group in enumerate(groups)]
        for key, gradients in zip(keys, every, strict=True):
            bundles.setdefault(key, []).extend(gradients)
        bundles = {key: bundles[key] for key in sorted(bundles) if bundles[key]}
        norms = [torch.linalg.vector_norm(torch.stack(torch._foreach_norm(x)).float()) for x in bundles.values()]
        whole = self._over_ranks(norms)
        factors: dict[int, Tensor | None] = {}
        for key, own in zip(bundles, whole, strict=True):
            limit = groups[key]["clip"] if key >= 0 else self.config.optimizer.grad_clip
            factors[key] = torch.clamp(limit / (own + 1e-6), max=1.0) if limit > 0 else None
        norm = whole[0] if len(norms) == 1 else torch.linalg.vector_norm(whole)
        return norm, [factors.get(key) for key in keys]

    def _gradients(self) -> list[list[Tensor]]:
        """This rank's share of the gradient, by parameter group; missing ones become zeros."""
        found = []
        for group in self._optimizer.param_groups:
            own = [parameter.grad for parameter in group["params"]]
            if not all(map(is_not, own, repeat(None))):
                for place, parameter in enumerate(group["params"]):
                    if own[place] is None:
                        own[place] = parameter.grad = torch.zeros_like(parameter)
            found.append(own)
        return found

    def _over_ranks(self, norms: list[Tensor]) -> Tensor:
        """Norms of shares to norms of the whole."""
        return torch.stack(norms)

    def _step_or_not(self, applied: Tensor) -> Tensor:
        """The step of an optimizer that cannot be told on the device to change nothing; whether it was applied.

        It leaves parameters without a gradient alone. The test waits for the device, as DeepSpeed's own does in
        stages 1 to 3.
        """
        if not bool(applied):
            for _, parameter in self._named:
                parameter.grad = None
        self._step()
        return applied

    def _accumulated(self, parameter: Tensor) -> None:
        if not self._in_backward:
            raise ConfigError(
                f"a forward ran a backward of its own, to {self._label(parameter)}: it would be lost in ZeRO stages 1 "
                "to 3; return the sum of all losses, the engine runs the one backward of each micro-batch"
            )

    def _refuse_unknown(self, parameters: Iterable[nn.Parameter]) -> None:
        known = {id(parameter) for _, parameter in self._named}
        for parameter in parameters:
            if id(parameter) not in known:
                raise ConfigError(
                    f"the loss depends on {self._label(parameter)}, which is not in the optimizer and would never be "
                    "trained; a method's constructor must register its modules on the model"
                )

    def _refuse_uneven(self, parameters: Iterable[nn.Parameter]) -> None:
        """Ranks that reduce other gradients wait for each other for ever, or add up what does not belong together."""
        reached = {id(parameter) for parameter in parameters}
        used = [int(id(parameter) in reached) for _, parameter in self._named]
        both = torch.tensor([used, [-each for each in used]], dtype=torch.int64, device=self.world.device)
        most, least = self.world.reduce(both, "max")
        for (_, parameter), uneven in zip(self._named, (most != -least).tolist(), strict=True):
            if uneven:
                raise uneven_ranks(self._label(parameter))

    def _label(self, parameter: Tensor) -> str:
        named = (name for name, each in self.loss.named_parameters() if each is parameter)
        shape = list(getattr(parameter, "ds_shape", parameter.shape))
        return f"the parameter '{next(named, 'outside of the model')}' {shape}"

    def trainable(self) -> list[tuple[str, torch.Size]]:
        """Names (of the model) and shapes of the trained parameters, in the model's order; the same on every rank."""
        return list(self._shapes.items())

    def untrained(self) -> dict[str, Tensor]:
        """The other entries of the model's state dict (buffers, frozen parameters), whole and as they are now.

        Collective. They are the live tensors, but in ZeRO stage 3, where they are copies.
        """
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in self._shapes}

    def whole(self) -> AbstractContextManager[Any]:
        """Within, every parameter of the loss can be read whole on every rank; collective."""
        return nullcontext()

    def full_state(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor) of "model", "ema", "exp_avg" or "exp_avg_sq" for every trained parameter.

        Collective: all ranks iterate to the end, and all get every tensor whole. Not for use after it is advanced.
        """
        for name, parameter in self._named:
            yield name, parameter.detach() if kind == "model" else self._optimizer.state[parameter][kind]

    def own_state(self, kind: str) -> Iterator[tuple[str, int, Tensor, Tensor]]:
        """(name, first element, piece, held), flat float32, of every trained parameter: what of it this rank saves, and
        all that it has of it, live.

        The ranks' pieces, which may be empty, make up each flattened tensor. Not collective.
        """
        shares = self.world.shares([shape.numel() for shape in self._shapes.values()])
        for (name, tensor), (first, end) in zip(self.full_state(kind), shares, strict=True):
            held = tensor.reshape(-1)
            yield name, first, held[first:end], held

    def load_full_state(self, kind: str, source: Source) -> None:
        """Puts `source(name)` into the moments or EMA of every trained parameter; weights are loaded earlier."""
        for name, parameter in self._named:
            self._optimizer.state[parameter][kind].copy_(source(name))

    def applied_steps(self) -> int:
        return applied_steps(self._optimizer)

    def set_applied_steps(self, count: int) -> None:
        set_applied_steps(self._optimizer, count)

    def close(self) -> None:
        """Lets go of the model; hooks that hold its owner are a cycle that Python's collector does not see."""
        while self._hooks:
            self._hooks.pop().remove()


class SingleEngine(Engine):
    """One process, no DeepSpeed. The loss is moved to the world's device.

    graphs: with which engine.cuda_graph replays steps; None: CUDA's. Raises ConfigError where that cannot be.
    """

    def __init__(
        self, loss: nn.Module, config: TrainConfig, world: World, groups: Groups = (), graphs: Graphs | None = None
    ):
        super().__init__(loss.to(world.device), config, world, groups)
        init_states(self._optimizer)
        self._make_shadows()
        self._called: nn.Module = self.loss
        self._clean = True  # no gradient since the last update
        self._graphed: GraphedStep[StepResult] | None = None
        if config.engine.cuda_graph:
            if graphs is None and world.device.type != "cuda":
                raise ConfigError(
                    f"engine.cuda_graph=true needs a CUDA device, and this process runs on {world.device.type}; set "
                    "engine.cuda_graph=false"
                )
            if not isinstance(self._optimizer, AdamWEMA):
                raise ConfigError(
                    f"engine.cuda_graph=true needs optimizer.name=adamw, not {config.optimizer.name}, for which every "
                    "step waits"
                )
            for group in self._optimizer.param_groups:
                group["lr"] = torch.full((), group["lr"], dtype=torch.float64, device=world.device)
            self._graphed = GraphedStep(super()._whole_step, cast(Any, self.loss).kind, graphs or Graphs())

    def _whole_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        if self._graphed is None or not self._checked:
            return super()._whole_step(micro_batches, step)
        made = self._graphed(micro_batches, step)  # overwritten by the next step, and these may be read late
        logs = {name: value.clone() for name, value in made.logs.items()}
        return StepResult(logs, made.grad_norm.clone(), made.applied.clone())

    def _forward(self, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        made = self._called(batch, step)
        if not self._checked:
            return made
        self.close()  # after the first step one look at the gradients does, where a hook costs 3 us per parameter
        if self._clean:
            for _, parameter in self._named:
                if parameter.grad is not None:
                    self._accumulated(parameter)
        return made

    def _backward(self, loss: Tensor, count: int) -> None:
        (loss if count == 1 else loss / count).backward()
        self._clean = False

    def _step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._clean = True


class Buffers:
    """A loss's buffers as they were before a step, and what is put back where it was not applied.

    All are copied: version counters do not tell what a forward changed. Batch norm's kernels, `.data` and a new tensor
    under an old name leave them alone. Afterwards the tensors are the same ones, so that graphs find them.
    """

    def __init__(self, loss: nn.Module):
        self._loss = loss
        self._modules: list[nn.Module] | None = None
        self._before: dict[tuple[nn.Module, str], Tensor] = {}
        self._copies: dict[tuple[nn.Module, str], Tensor] = {}

    @torch.no_grad()
    def keep(self) -> None:
        """Before a step."""
        if self._modules is None:
            self._modules = [module for module in self._loss.modules() if [*module.buffers(recurse=False)]]
        named = (((module, name), x) for module in self._modules for name, x in module._buffers.items())
        self._before = {key: buffer for key, buffer in named if buffer is not None}
        for key, buffer in self._before.items():
            if key in self._copies:
                self._copies[key].copy_(buffer)
            else:
                self._copies[key] = buffer.detach().clone()

    @torch.no_grad()
    def settle(self, applied: Tensor) -> None:
        """After it. Raises ConfigError for a buffer of another shape or dtype than before."""
        moved = applied.bool()
        for (module, name), buffer in self._before.items():
            now = module._buffers[name]
            if now is None or (now.shape, now.dtype) != (buffer.shape, buffer.dtype):
                raise ConfigError(
                    f"a step made another shape or dtype of the buffer '{name}' of {type(module).__name__}, so no "
                    "skipped one could put it back; keep both as they are"
                )
            buffer.copy_(torch.where(moved, now, self._copies[module, name]))
            module._buffers[name] = buffer


def uneven_ranks(what: str) -> ConfigError:
    return ConfigError(
        f"{what} is used on some ranks only in one micro-batch; let what is used depend on the seed, the step and the "
        "micro-batch, never on the rank or its samples"
    )


def own_parameters(loss: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trained parameters of the loss's model, by its names. Raises ConfigError for a 0-dim one."""
    model: Any = loss.model
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in named:
        if not getattr(parameter, "ds_shape", parameter.shape):
            raise ConfigError(f"the parameter '{name}' is 0-dim, which ZeRO cannot share out; give it the shape [1]")
    return named


def leaves_of_graph(loss: Tensor) -> Iterator[nn.Parameter]:
    """The parameters to which a backward from `loss` would carry a gradient."""
    stack, seen = [loss.grad_fn], set[Any]([None])
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(after for after, _ in node.next_functions)  # type: ignore[union-attr]
            variable = getattr(node, "variable", None)
            if isinstance(variable, nn.Parameter):
                yield variable
