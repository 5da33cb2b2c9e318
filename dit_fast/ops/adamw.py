"""AdamW with the average of the weights, in place on lists of tensors: one pass in C++ or CUDA, or several by torch.

With g the gradient times `factor`, t the count of updates, this one included:

    m <- lerp(m, g, 1 - beta1)    v <- beta2 v + (1 - beta2) g^2    w <- (1 - lr decay) w
    w <- w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)    ema <- lerp(ema, w, 1 - ema_decay)

"cpp" and "cuda" (csrc/adamw*) read each gradient once, read and write the rest once, and write the shadows: 36 bytes
per parameter, 38 with them. "fused" is torch's fused AdamW, for CUDA without our library. "torch", the definition, is a
list of multi-tensor operations. They differ by rounding: torch's root on CPUs is often one unit off.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_fast import _C, backend
from dit_fast.backend import Implementation

OP = "adamw"
NUMBERS = 6  # float64 that hold those of one tensor in csrc/adamw.h

backend.register(
    OP,
    Implementation("cuda", ("cuda",), _C.cuda_unavailable),
    Implementation("cpp", ("cpu",), _C.unavailable),
    Implementation("fused", ("cuda", "cpu"), lambda: None, automatic=("cuda",)),
)


@dataclass(frozen=True)
class States:
    """Of the weights, in their order: float32 like them; counts 0-d float32, on the weights' device."""

    first: list[Tensor]
    second: list[Tensor]
    ema: list[Tensor]
    counts: list[Tensor]


@torch.no_grad()
def adamw(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: States,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decay: float,
    factor: Tensor | None = None,
    applied: Tensor | None = None,
    shadows: Sequence[Tensor] = (),
) -> None:
    """One update. lr: a number, or 0-d float64 on the device. factor: of the gradients, 0-d float32; None: 1.

    applied: 0-d float32; where it is 0 nothing changes, whatever the gradients are. shadows: for each weight its copy
    in bfloat16, or an empty tensor where it has none. "torch" reads `applied`, the others read nothing on the host.
    Weights of another dtype and such that are not contiguous are taken by "torch" alone; "cpp" and "cuda" raise
    RuntimeError for other tensors that are not contiguous float32.
    """
    device = weights[0].device
    plain = {weight.dtype for weight in weights} == {torch.float32} and all(map(Tensor.is_contiguous, weights))
    chosen = backend.choose(OP, "auto", device.type) if plain else "torch"
    rules = (*betas, eps, weight_decay, ema_decay)
    if chosen in ("cpp", "cuda"):
        rate = lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float64, device=device)
        lists = (weights, gradients, states.first, states.second, states.ema, list(shadows), states.counts)
        scratch, stream = None, 0
        if chosen == "cuda":
            scratch = torch.empty(NUMBERS * len(weights), dtype=torch.float64, device=device)
            stream = torch.cuda.current_stream(device).cuda_stream
        torch.ops.dit_fast_native.adamw_ema_(*lists, rate, factor, applied, *rules, scratch, stream)
        torch.autograd.graph.increment_version(weights)  # for graphs that hold them; the one pass bypasses autograd
        return
    if chosen == "fused":
        _fused(weights, gradients, states, lr, rules, factor, applied)
        torch.autograd.graph.increment_version(weights)
    elif applied is None or bool(applied):
        _reference(weights, gradients, states, float(lr), rules, factor)
    copied = [(shadow, weight) for shadow, weight in zip(shadows, weights, strict=False) if shadow.numel()]
    if copied:
        torch._foreach_copy_([shadow for shadow, _ in copied], [weight for _, weight in copied])


def _reference(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: States,
    lr: float,
    rules: tuple[float, ...],
    factor: Tensor | None,
) -> None:
    beta1, beta2, eps, weight_decay, ema_decay = rules
    if factor is not None:
        torch._foreach_mul_(gradients, factor)
    torch._foreach_add_(states.counts, 1)
    by_count: dict[float, list[int]] = {}
    for index, count in enumerate(torch.stack(states.counts).tolist()):
        by_count.setdefault(count, []).append(index)
    if weight_decay:
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_lerp_(states.first, gradients, 1 - beta1)
    torch._foreach_mul_(states.second, beta2)
    torch._foreach_addcmul_(states.second, gradients, gradients, 1 - beta2)
    for count, chosen in by_count.items():
        own, first, second = ([every[index] for index in chosen] for every in (weights, states.first, states.second))
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - beta2**count) ** 0.5)
        torch._foreach_add_(denominator, eps)
        torch._foreach_addcdiv_(own, first, denominator, -lr / (1 - beta1**count))
    torch._foreach_lerp_(states.ema, weights, 1 - ema_decay)


def _fused(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: States,
    lr: float | Tensor,
    rules: tuple[float, ...],
    factor: Tensor | None,
    applied: Tensor | None,
) -> None:
    beta1, beta2, eps, weight_decay, ema_decay = rules
    moves = torch.ones_like(states.counts[0]) if applied is None else applied
    if factor is not None:
        torch._foreach_mul_(gradients, factor)
    torch._foreach_add_(states.counts, [moves] * len(weights))
    torch._fused_adamw_(
        weights,
        gradients,
        states.first,
        states.second,
        [],
        states.counts,
        lr=lr.float() if isinstance(lr, Tensor) else lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=1 - moves,
    )
    change = torch._foreach_sub(weights, states.ema)
    torch._foreach_mul_(change, (1 - ema_decay) * moves)
    torch._foreach_add_(states.ema, change)
