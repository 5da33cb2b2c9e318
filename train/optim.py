"""AdamW whose exponential moving average of the weights is one of its states, and other AdamWs that hold it likewise.

Held as a state, the EMA is sharded, moved and checkpointed with the moments in every ZeRO stage, and costs no
communication. It is kept in float32: in bfloat16 a decay of 0.9999 would vanish.
"""

from collections.abc import Callable, Iterable
from itertools import repeat
from operator import is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_fast.errors import ConfigError
from dit_fast.ops.adamw import States, adamw
from dit_fast.ops.long_skip import refold
from dit_fast.runs import OptimizerConfig

STATES = ("exp_avg", "exp_avg_sq", "ema")


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Rate of step `step` (from 0): linear up to `lr` over `warmup_steps` steps, then constant."""
    if step >= config.warmup_steps:
        return config.lr
    return config.lr * (step + 1) / config.warmup_steps


def rate_shares(optimizer: torch.optim.Optimizer, base: float) -> list[float]:
    """The rate of each group over that of the schedule, `base`, which all follow in proportion.

    Raises ConfigError where the schedule's is 0, so that they would all stand still, and a group has one of its own.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    if base == 0 and any(rates):
        raise ConfigError(
            f"optimizer.lr=0 stops also what has a learning rate of its own ({max(rates):g}), since that follows its "
            "schedule; set a small one, optimizer.lr=1e-12"
        )
    return [rate / base if base else 1.0 for rate in rates]


class AdamWEMA(torch.optim.Optimizer):
    """AdamW with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101) and an EMA of the updated weights.

    `dit_fast.ops.adamw` is the update; before the first one the EMA equals the weights. States per parameter: "step"
    (0-d float32 on the parameter's device), "exp_avg", "exp_avg_sq", "ema". They come into being with the first step or
    with `init_states`. Parameters without a gradient are left alone.

    applied: 0-d float32; where it is 0 the next steps change nothing. A group's "factor", 0-d float32, is that of its
    gradients in the pass; its "lr" may be 0-d float64 on the device. Neither is read on the host. A parameter's
    `shadow` (nn/linear.py) is written with it, and what a long skip's weight keeps `folded` behind it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float = 0.9999,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "ema_decay": ema_decay}
        super().__init__(params, {**defaults, "factor": None})
        self.applied: Tensor | None = None
        self._held: dict[int, _Held] = {}  # by group

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update, in place."""
        if closure is not None:
            raise ConfigError("AdamWEMA takes no closure")
        rules = ("lr", "betas", "eps", "weight_decay", "ema_decay", "factor")
        for index, group in enumerate(self.param_groups):
            moved = group["params"]
            gradients = [parameter.grad for parameter in moved]
            if not all(map(is_not, gradients, repeat(None))):
                moved = [parameter for parameter in moved if parameter.grad is not None]
                gradients = [parameter.grad for parameter in moved]
            if moved:
                held = self._hold(index, moved)
                told = {name: group[name] for name in rules}
                adamw(moved, gradients, held.states, applied=self.applied, shadows=held.shadows, **told)
                for shadow, parameter in held.written:
                    shadow.of_version = parameter._version
        for held in self._held.values():
            refold(held.folded)

    def _hold(self, index: int, parameters: list[Tensor]) -> "_Held":
        """Made anew where other parameters have a gradient, and after `load_state_dict`, which replaces `state`."""
        held = self._held.get(index)
        same = held is not None and held.state is self.state and len(held.parameters) == len(parameters)
        if held is None or not same or any(map(is_not, held.parameters, parameters)):
            init_states(self, parameters)
            every = [self.state[parameter] for parameter in parameters]
            states = States(*([each[name] for each in every] for name in (*STATES, "step")))
            none = torch.empty(0, dtype=torch.bfloat16, device=parameters[0].device)
            shadows: list[Any] = [getattr(parameter, "shadow", none) for parameter in parameters]
            written = [pair for pair in zip(shadows, parameters, strict=True) if pair[0] is not none]
            folded = [parameter for parameter in parameters if hasattr(parameter, "folded")]
            held = self._held[index] = _Held(self.state, [*parameters], states, shadows, written, folded)
        return held


class _Held(NamedTuple):
    """What steps find again for the parameters of a group that have a gradient. Shadows and folded weights that come
    later, or in the place of these, are written by who reads them."""

    state: Any
    parameters: list[Tensor]
    states: States
    shadows: list[Tensor]
    written: list[tuple[Any, Tensor]]  # shadow and parameter
    folded: list[Tensor]


def with_ema(base: type[torch.optim.Optimizer]) -> type[Any]:
    """A subclass of an AdamW that takes `ema_decay` and holds "ema" among its states; the update is the base's."""

    class WithEMA(base):  # type: ignore[misc, valid-type]
        def __init__(self, params: Iterable[Any], *, ema_decay: float, **options: Any):
            super().__init__(params, **options)
            self.defaults["ema_decay"] = ema_decay
            for group in self.param_groups:
                group["ema_decay"] = ema_decay

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> None:
            updated = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            init_states(self, updated)
            super().step()
            for group in self.param_groups:
                moved = [p for p in group["params"] if p.grad is not None]
                if moved:
                    torch._foreach_lerp_([self.state[p]["ema"] for p in moved], moved, 1 - group["ema_decay"])

    WithEMA.__name__ = WithEMA.__qualname__ = f"{base.__name__}EMA"
    return WithEMA


def build_optimizer(config: OptimizerConfig, parameters: Iterable[Any], device_type: str) -> Any:
    """The optimizer a configuration names, over parameters or groups of them.

    Raises ConfigError where the named one cannot run here, with the reason.
    """
    trainable = list(parameters)
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "ema_decay": config.ema_decay,
    }
    if config.name == "adamw":
        return AdamWEMA(trainable, **options)
    if config.name == "torch_adamw":
        return with_ema(torch.optim.AdamW)(trainable, **options)
    if config.name == "torch_fused_adamw":
        return with_ema(torch.optim.AdamW)(trainable, fused=True, **options)
    if device_type != "cuda":
        raise ConfigError(f"optimizer.name={config.name} runs on CUDA devices only; use optimizer.name=adamw here")
    base = _apex_fused_adam() if config.name == "apex_fused_adam" else _deepspeed_fused_adam()
    try:
        return with_step_per_group(with_ema(base))(trainable, adam_w_mode=True, **options)
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise ConfigError(f"optimizer.name={config.name} cannot run: {reason[0]}; use optimizer.name=adamw") from error


def with_step_per_group(base: type[torch.optim.Optimizer]) -> type[Any]:
    """For optimizers that count steps in plain integers of their own: keeps those in line with the state "step"."""

    class StepPerGroup(base):  # type: ignore[misc, valid-type]
        def step(self, closure: Callable[[], Any] | None = None) -> None:
            counted = []
            for group in self.param_groups:
                moved = [p for p in group["params"] if p.grad is not None]
                if moved:
                    init_states(self, moved)
                    group["step"] = max(int(self.state[p]["step"]) for p in moved)
                    self._set_step(moved, group["step"])
                    counted.append((moved, torch.tensor(group["step"] + 1.0, dtype=torch.float32)))
            super().step()
            for moved, count in counted:
                self._set_step(moved, count)

        def _set_step(self, parameters: list[Tensor], count: Any) -> None:
            for parameter in parameters:
                self.state[parameter]["step"] = count.clone() if isinstance(count, Tensor) else count

    StepPerGroup.__name__ = StepPerGroup.__qualname__ = base.__name__
    return StepPerGroup


def init_states(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor] | None = None) -> None:
    """Creates the missing states of parameters (default: of all), so that values can be put into them."""
    every = (parameter for group in optimizer.param_groups for parameter in group["params"])
    options = optimizer.defaults
    counts_on_device = isinstance(optimizer, AdamWEMA) or options.get("fused") or options.get("capturable")
    for parameter in every if parameters is None else parameters:
        if not optimizer.state[parameter]:
            weight = parameter.detach()
            optimizer.state[parameter] |= {
                "step": torch.tensor(0.0, dtype=torch.float32, device=weight.device if counts_on_device else None),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
                "ema": weight.clone(),
            }


def applied_steps(optimizer: torch.optim.Optimizer) -> int:
    """Updates applied so far (0 before the first); waits for the device once, where they are counted on it."""
    counts = [torch.as_tensor(state["step"]) for state in optimizer.state.values() if "step" in state]
    return int(torch.stack(counts).max()) if counts else 0


def set_applied_steps(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Puts the number of applied updates into every parameter's state."""
    for state in optimizer.state.values():
        state["step"].fill_(count)


def _apex_fused_adam() -> type[torch.optim.Optimizer]:
    try:
        import amp_C  # noqa: F401  the compiled part; PyPI's unrelated `apex` has none
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ConfigError(
            f"optimizer.name=apex_fused_adam needs NVIDIA apex with its CUDA extensions ({error}); build it from "
            "source: the package called 'apex' on PyPI is another project"
        ) from None
    return FusedAdam


def _deepspeed_fused_adam() -> type[torch.optim.Optimizer]:
    try:
        from dit_fast.train.zero import deepspeed_fused_adam
    except ImportError as error:
        raise ConfigError(
            f"optimizer.name=deepspeed_fused_adam needs DeepSpeed ({error}); pip install 'dit_fast[train]'"
        ) from None
    return deepspeed_fused_adam()
