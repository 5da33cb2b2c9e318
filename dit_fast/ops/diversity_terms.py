"""The terms of the diversity loss from its statistics: the formula, and the same as one op where launches count.

`formula` is the definition, differentiable any number of times. `fused` has its values, and an analytic gradient whose
equations stand in kernels/diversity_terms.py: one launch forward, one backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dit_fast.errors import UserError
from dit_fast.ops._op import differentiable
from dit_fast.ops._register import define
from dit_fast.ops.autocast import without_autocast
from dit_fast.ops.diversity_op import EPS

PAPER_COEFFICIENT = 0.33
MOST = 32  # blocks
_NAMES = 4  # total, orthogonality, mutual information, dispersion
_INSTEAD = 'backend="torch"'


def formula(
    statistics: Tensor, pair_sums: Tensor, weights: Tensor, members: Tensor, count: Tensor, release: bool
) -> tuple[Tensor, ...]:
    """total, orthogonality, mutual information and dispersion, 0-d, from statistics [3, K, D] and pair_sums [K, K].

    weights [K, K]: of the pairs; members [K]: 1 for blocks that occur in one; count, 0-d: tokens.
    """
    sums, abs_sums, square_sums = statistics.unbind(0)
    means = sums / count
    directions = means / torch.linalg.vector_norm(means, dim=-1, keepdim=True).clamp_min(EPS)
    with without_autocast(means):
        orthogonality = (weights * (directions @ directions.T)).sum()
    cosines = pair_sums / count
    # sqrt(max(x, eps^2)) is max(sqrt(x), eps) with a finite gradient at a channel that is zero everywhere.
    usage = abs_sums / count / square_sums.clamp_min(EPS**2).sqrt()
    if release:
        mutual_information = (weights * cosines.abs()).sum()
        spread = _spread(usage.sum(0) / (len(usage) + EPS))
        dispersion = -(spread / 0.25).clamp(0, 1)
        total = (orthogonality + mutual_information + dispersion) / 3
    else:
        mutual_information = (weights * cosines).sum()
        dispersion = -_spread((members[:, None] * usage).sum(0) / (members.sum() + EPS))
        total = PAPER_COEFFICIENT * (orthogonality + mutual_information + dispersion)
    return total, orthogonality, mutual_information, dispersion


def _spread(usage: Tensor) -> Tensor:
    return (usage / (usage.amax() + EPS)).var(correction=0)


def takes(backend: str, statistics: Tensor) -> bool:
    """Whether `fused` is for statistics [3, K, D] that `backend` summed; tangents and the compiler get the formula."""
    if backend != "triton" or statistics.dtype is not torch.float32 or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return statistics.shape[1] <= MOST


def _forward(
    statistics: Tensor, pair_sums: Tensor, weights: Tensor, members: Tensor, count: Tensor, release: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The terms, the sums' products [K, K] and the channels' usage [D]; the last two padded as the kernel likes it."""
    if backend == "triton":
        from dit_fast.kernels import diversity_terms as kernel

        known = (statistics.contiguous(), pair_sums.contiguous(), weights, members, count)
        return kernel.forward(*known, release)  # type: ignore[return-value]
    counted = torch.ones_like(members) if release else members
    usage = statistics[1] / count / statistics[2].clamp_min(EPS**2).sqrt()
    usage = (counted[:, None] * usage).sum(0) / (counted.sum() + EPS)
    _, _, *rest = _fake_forward(statistics)
    gram = rest[2].zero_()
    gram[: len(members), : len(members)] = statistics[0] @ statistics[0].T
    return *formula(statistics, pair_sums, weights, members, count, release), gram, usage  # type: ignore[return-value]


def _backward(
    statistics: Tensor, pair_sums: Tensor, weights: Tensor, members: Tensor, count: Tensor, gram: Tensor, usage: Tensor,
    total: Tensor | None, orthogonality: Tensor | None, information: Tensor | None, dispersion: Tensor | None,
    release: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grads = (total, orthogonality, information, dispersion)
    if backend == "triton":
        from dit_fast.kernels import diversity_terms as kernel

        known = (statistics.contiguous(), pair_sums.contiguous(), weights, members, count, gram, usage)
        return kernel.backward(*known, grads, release)
    zero = count.new_zeros(())
    all_of, *apart = (zero if grad is None else grad for grad in grads)
    share = all_of / 3 if release else all_of * PAPER_COEFFICIENT
    of_orthogonality, of_information, of_dispersion = (share + each for each in apart)
    sums, abs_sums, square_sums = statistics.unbind(0)
    lengths = (torch.linalg.vector_norm(sums, dim=1) / count).clamp_min(EPS) * count
    pairs = (weights + weights.T) / (lengths[:, None] * lengths)
    along = (pairs * gram[: len(members), : len(members)]).sum(1) / lengths.square()
    along = torch.where(lengths > EPS * count, along, 0)
    grad_sums = of_orthogonality * (pairs @ sums - along[:, None] * sums)
    slope = of_information * weights / count
    top, mean = usage.amax(), usage.mean()
    spread = ((usage - mean) / (top + EPS)).square().mean()
    falls = -of_dispersion
    if release:
        slope, falls = slope * pair_sums.sign(), torch.where(spread / 0.25 > 1, 0, falls / 0.25)
    most = usage == top
    of_usage = 2 * (usage - mean) / (len(usage) * (top + EPS).square()) - most * 2 * spread / ((top + EPS) * most.sum())
    counted = torch.ones_like(members) if release else members
    of_usage = falls * of_usage * (counted / (counted.sum() + EPS) / count)[:, None]
    roots = square_sums.clamp_min(EPS**2).sqrt()
    grad_squares = torch.where(square_sums < EPS**2, 0, -of_usage * abs_sums / (2 * roots**3))
    return torch.stack([grad_sums, of_usage / roots, grad_squares]), slope


def _fake_forward(statistics: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    padded, new = 16 if statistics.shape[1] <= 16 else 32, statistics.new_empty
    return new(()), new(()), new(()), new(()), new(padded, padded), new(statistics.shape[2])


forward_op = define(
    "diversity_terms(Tensor statistics, Tensor pair_sums, Tensor weights, Tensor members, Tensor count, bool release, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
backward_op = define(
    "diversity_terms_backward(Tensor statistics, Tensor pair_sums, Tensor weights, Tensor members, Tensor count, "
    "Tensor gram, Tensor usage, Tensor? total, Tensor? orthogonality, Tensor? information, Tensor? dispersion, "
    "bool release, str backend) -> (Tensor, Tensor)",
    _backward,
    lambda statistics, pair_sums, *_: (statistics.new_empty(statistics.shape), pair_sums.new_empty(pair_sums.shape)),
)


class _Terms(torch.autograd.Function):
    """(statistics [3, K, D], pair_sums [K, K], weights, members, count, release, backend) -> terms, gram, usage."""

    @staticmethod
    def forward(
        statistics: Tensor, pair_sums: Tensor, weights: Tensor, members: Tensor, count: Tensor, release: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return forward_op(statistics, pair_sums, weights, members, count, release, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.forms = inputs[5:]
        ctx.mark_non_differentiable(*output[_NAMES:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], *output[_NAMES:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads[:_NAMES]):
            return (None,) * 7
        return *backward_op(*ctx.saved_tensors, *grads[:_NAMES], *ctx.forms), *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise UserError(f"diversity_loss: no tangents here; for those use {_INSTEAD}")


_fused = differentiable(_Terms, "diversity_loss", _INSTEAD)


def fused(
    statistics: Tensor, pair_sums: Tensor, weights: Tensor, members: Tensor, count: Tensor, release: bool,
    backend: str = "triton",
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `formula`; all that is no statistics is constant."""
    return _fused(statistics, pair_sums, weights, members, count, release, backend)[:_NAMES]
