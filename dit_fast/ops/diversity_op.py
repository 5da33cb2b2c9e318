"""The statistics behind the diversity loss as a torch op, with an analytic gradient and a forward-mode rule.

With x_k the [M, D] features of block k and u = x / max(|x|, 1e-8) their directions, one pass over the features gives

    sums, abs_sums, square_sums [K, D] = sum over tokens of x, |x|, x^2        pair_sums [K, K] = sum of u_k . u_l

and the gradient of any function of them is one pass too. With G = d/d pair_sums, V_k = sum over l of (G + G^T)_kl u_l,

    dx_k = upstream + d/d sums + d/d abs_sums * sign(x) + 2 d/d square_sums * x + (V_k - (V_k . u_k) u_k) / |x_k|.

A norm below 1e-8 counts as 1e-8, a constant: then nothing is subtracted from V.

What the forward keeps for the backward beside the norms: on request the mixture, the sum of u_k over blocks, [M, D],
which "cpp" has on the way (see diversity_taps.py); by "triton" the cosines u_k . u_l of every token, [M, K, K].

The fused implementations sum over fixed chunks of 256 tokens and add the chunks in order, so that the numbers depend
neither on the number of threads nor on the size of the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fast import _C
from dit_fast.backend import Implementation
from dit_fast.errors import UserError
from dit_fast.ops._op import FUSED, Op, differentiable, rows, triton, wide
from dit_fast.ops._register import define
from dit_fast.ops.autocast import without_autocast

EPS = 1e-8
_BEST_LEVEL = -1


def _refuses(*features: Tensor) -> list[str]:
    return [
        f"block {block} is {feature.dtype}, not float32, bfloat16 or float16"
        for block, feature in enumerate(features)
        if feature.dtype not in FUSED
    ]


def _triton_refuses(*features: Tensor) -> list[str]:
    from dit_fast.kernels import diversity

    return _refuses(*features) + diversity.supports([rows(feature) for feature in features])


OP = Op(
    "diversity_loss",
    "features[N, T, D]",
    Implementation("cpp", ("cpu",), _C.unavailable, refuses=_refuses),
    triton(_triton_refuses),
    nonempty=True,
)


def _torch_forward(features: list[Tensor], mix: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = wide(*features)
    with without_autocast(features[0]):
        statistics, directions, inverse_norms = [], [], []
        for feature in features:
            x = feature.to(dtype)
            statistics.append(torch.stack([x.sum(0), x.abs().sum(0), x.square().sum(0)]))
            inverse_norms.append(torch.linalg.vector_norm(x, dim=1).clamp_min(EPS).reciprocal())
            directions.append(x * inverse_norms[-1][:, None])
        stacked = torch.stack(directions)
        pair_sums = stacked.flatten(1) @ stacked.flatten(1).T
        norms = torch.stack(inverse_norms)
        return torch.stack(statistics, 1), pair_sums, norms, _mixture(features, norms, mix)


def _mixture(features: Sequence[Tensor], inverse_norms: Tensor, mix: bool) -> Tensor:
    tokens, width = features[0].shape
    mixture = inverse_norms.new_zeros(tokens if mix else 0, width)
    for feature, inverse in zip(features if mix else (), inverse_norms, strict=False):
        mixture.addcmul_(feature.to(mixture.dtype), inverse[:, None])
    return mixture


def _torch_backward(
    features: list[Tensor],
    inverse_norms: Tensor,
    grad_statistics: Tensor,
    grad_pair_sums: Tensor,
    upstream: list[Tensor],
    wanted: list[int],
) -> list[Tensor]:
    dtype = inverse_norms.dtype
    grad_sums, grad_abs_sums, grad_square_sums = grad_statistics
    weights = grad_pair_sums + grad_pair_sums.T
    directions = [x.to(dtype) * norm[:, None] for x, norm in zip(features, inverse_norms, strict=True)]
    result = []
    for place, k in enumerate(wanted):
        x, inverse = features[k].to(dtype), inverse_norms[k, :, None]
        mixed = sum((weights[k, l] * direction for l, direction in enumerate(directions)), torch.zeros_like(x))
        along = torch.where(inverse < 1 / EPS, (mixed * directions[k]).sum(1, keepdim=True), 0)
        grad = grad_sums[k] + grad_abs_sums[k] * x.sign() + 2 * grad_square_sums[k] * x
        grad = grad + inverse * (mixed - along * directions[k])
        result.append((grad + upstream[place].to(dtype) if upstream else grad).to(features[k].dtype))
    return result


def _cpp_forward(features: list[Tensor], mix: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _empty_outputs(features, mix, "cpp")
    torch.ops.dit_fast_native.diversity_forward(features, *outputs, _BEST_LEVEL)
    return outputs


def _cpp_backward(
    features: list[Tensor],
    inverse_norms: Tensor,
    grad_statistics: Tensor,
    grad_pair_sums: Tensor,
    upstream: list[Tensor],
    wanted: list[int],
) -> list[Tensor]:
    out = _empty_gradients(features, wanted)
    grads = (grad_statistics.contiguous(), grad_pair_sums.contiguous())
    torch.ops.dit_fast_native.diversity_backward(features, inverse_norms, *grads, upstream, wanted, out, _BEST_LEVEL)
    return out


def _forward(features: list[Tensor], mix: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """statistics, pair_sums, inverse_norms, and what is kept. mix: whether the mixture is, by all but "triton"."""
    features = [rows(x) for x in features]
    if backend == "triton":
        from dit_fast.kernels import diversity

        return diversity.forward(features)
    return _cpp_forward(features, mix) if backend == "cpp" else _torch_forward(features, mix)


def _backward(
    features: list[Tensor],
    inverse_norms: Tensor,
    kept: Tensor | None,
    grad_statistics: Tensor,
    grad_pair_sums: Tensor,
    upstream: list[Tensor],
    wanted: list[int],
    backend: str,
) -> list[Tensor]:
    """kept: by the forward, for "triton". upstream: nothing, or what is added to each, by all but "triton"."""
    features, upstream = [rows(x) for x in features], [rows(x) for x in upstream]
    grads = (grad_statistics, grad_pair_sums)
    if backend == "triton":
        from dit_fast.kernels import diversity

        if kept is None or upstream:
            raise UserError('diversity_backward: "triton" takes the cosines of its forward, and adds nothing')
        return diversity.backward(features, inverse_norms, kept, *grads, wanted)
    run = _cpp_backward if backend == "cpp" else _torch_backward
    return run(features, inverse_norms, *grads, upstream, wanted)


def _empty_outputs(features: Sequence[Tensor], mix: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, (tokens, width) = len(features), features[0].shape
    new = lambda *shape: features[0].new_empty(shape, dtype=wide(*features))  # noqa: E731
    kept = new(tokens, count, count) if backend == "triton" else new(tokens if mix else 0, width)
    return new(3, count, width), new(count, count), new(count, tokens), kept


def _empty_gradients(features: Sequence[Tensor], wanted: Sequence[int]) -> list[Tensor]:
    return [torch.empty_like(features[k], memory_format=torch.contiguous_format) for k in wanted]


forward_op = define(
    "diversity_forward(Tensor[] features, bool mix, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _empty_outputs,
)
backward_op = define(
    "diversity_backward(Tensor[] features, Tensor inverse_norms, Tensor? kept, Tensor grad_statistics, "
    "Tensor grad_pair_sums, Tensor[] upstream, int[] wanted, str backend) -> Tensor[]",
    _backward,
    lambda features, norms, kept, statistics, pairs, upstream, wanted, backend: _empty_gradients(features, wanted),
)


class _Statistics(torch.autograd.Function):
    """(backend, *features [M, D]) -> statistics [3, K, D], pair_sums [K, K], inverse_norms [K, M], kept."""

    @staticmethod
    def forward(backend: str, *features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return forward_op(list(features), False, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, *features = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[2:], *features)
        ctx.save_for_forward(*features)

    @staticmethod
    def backward(
        ctx: Any, grad_statistics: Tensor | None, grad_pair_sums: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        inverse_norms, kept, *features = ctx.saved_tensors
        grads_above = with_zeros(grad_statistics, grad_pair_sums, inverse_norms, features)
        wanted = [k for k, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        grads = backward_op(features, inverse_norms, kept, *grads_above, [], wanted, ctx.backend)
        result: list[Tensor | None] = [None] * (1 + len(features))
        for k, grad in zip(wanted, grads, strict=True):
            result[1 + k] = grad
        return tuple(result)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
        return *tangent(ctx.saved_tensors, tangents), None, None


_fused = differentiable(_Statistics, "diversity_stats")


def with_zeros(
    grad_statistics: Tensor | None, grad_pair_sums: Tensor | None, inverse_norms: Tensor, features: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Both gradients, of features [..., D]; zeros for a result that was not used."""
    count, width = len(features), features[0].shape[-1]
    return (
        inverse_norms.new_zeros(3, count, width) if grad_statistics is None else grad_statistics,
        inverse_norms.new_zeros(count, count) if grad_pair_sums is None else grad_pair_sums,
    )


def tangent(features: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Directional derivative of (statistics, pair_sums) at features [M, D] along tangents [M, D] (None: zero).

    Norms are taken anew, so that a backward through the result sees what they depend on.
    """
    columns, directions, turns, dtype = [], [], [], wide(*features)
    for feature, change in zip(features, tangents, strict=True):
        x = feature.to(dtype)
        dx = torch.zeros_like(x) if change is None else change.to(dtype)
        columns.append(torch.stack([dx.sum(0), (x.sign() * dx).sum(0), 2 * (x * dx).sum(0)]))
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        direction = x / norm.clamp_min(EPS)
        along = torch.where(norm > EPS, (dx * direction).sum(1, keepdim=True), 0)
        directions.append(direction.flatten())
        turns.append(((dx - along * direction) / norm.clamp_min(EPS)).flatten())
    with without_autocast(features[0]):
        half = torch.stack(turns) @ torch.stack(directions).T
    return torch.stack(columns, 1), half + half.T


def statistics(backend: str, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Differentiable statistics [3, K, D] and pair_sums [K, K] of features [M, D], in both modes of differentiation.

    backend: the name of an implementation.
    """
    if torch.compiler.is_compiling() and not (torch.is_grad_enabled() and any(x.requires_grad for x in features)):
        # The compiler runs a function without gradients directly, and fails on one with *arguments.
        return forward_op(list(features), False, backend)[:2]
    return _fused(backend, *features)[:2]
