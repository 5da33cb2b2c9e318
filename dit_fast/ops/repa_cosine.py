"""REPA's alignment loss: minus the mean cosine of predicted and given tokens.

REPA (arXiv 2410.06940), Eq. 8. With r = 1 / max(|p|, 1e-12) per token, s alike for the target, and c the cosine,

    value = -mean c,    dp = -(g/M) r (s q - c r p),    dq = -(g/M) s (r p - c s q),

without the second term where a norm is at its floor, a constant. The fused forward is one launch and keeps r, s and c,
12 bytes per token; the backward reads both tensors once and writes each gradient that is needed once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_fast.ops._op import Op, differentiable, rows, spread, triton, wide
from dit_fast.ops._register import define

EPS = 1e-12


def _refuses(prediction: Tensor, target: Tensor) -> Sequence[str]:
    from dit_fast.kernels import repa_cosine as kernel

    return kernel.supports(prediction, target)


OP = Op("repa_cosine", "prediction[N, T, Z] target[N, T, Z]", triton(_refuses), nonempty=True)


def repa_cosine(prediction: Tensor, target: Tensor, backend: str = "auto") -> Tensor:
    """Minus the mean over tokens of the cosine of prediction and target [N, T, Z], 0-d.

    Dtypes may differ; arithmetic and result are float32, or float64 where an input is. A norm below 1e-12 counts as
    1e-12. Both inputs may need a gradient; one that does not costs nothing. Autocast changes nothing. "torch" is plain
    autograd; "triton" differentiates in forward mode and, once, in reverse mode, of the value or of its forward-mode
    derivative. Raises UserError for shapes, dtypes or devices that do not
    fit and for empty tensors, ConfigError for a backend that is unknown or cannot run.
    """
    given = OP.check(backend, prediction=prediction, target=target)
    chosen = OP.choose(backend, prediction.device, prediction, target, given=given)
    if chosen == "torch":
        return _reference(prediction, target)
    return _fused(prediction.flatten(0, 1), target.flatten(0, 1), chosen)[0]


def _reference(prediction: Tensor, target: Tensor) -> Tensor:
    dtype = wide(prediction, target)
    return -(F.normalize(prediction.to(dtype), dim=-1) * F.normalize(target.to(dtype), dim=-1)).sum(-1).mean()


def _inverse_norm(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1)
    return torch.where(norm <= EPS, 1 / EPS, 1 / norm)


def _turn(own: Tensor, other: Tensor, inverse: Tensor, cosine: Tensor) -> Tensor:
    """d cosine / d own [M, Z], for directions own and other."""
    return inverse[:, None] * (other - torch.where(inverse < 1 / EPS, cosine, 0)[:, None] * own)


def _torch_forward(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    p, q = (x.to(wide(prediction, target)) for x in (prediction, target))
    r, s = _inverse_norm(p), _inverse_norm(q)
    cosine = ((p * r[:, None]) * (q * s[:, None])).sum(1)
    return -cosine.mean(), torch.stack([r, s, cosine])


def _torch_backward(
    upstream: Tensor, prediction: Tensor, target: Tensor, saved: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    r, s, cosine = saved
    p, q = prediction.to(saved.dtype) * r[:, None], target.to(saved.dtype) * s[:, None]
    scale = -upstream / len(p)
    return (
        (scale * _turn(p, q, r, cosine)).to(prediction.dtype) if needs[0] else None,
        (scale * _turn(q, p, s, cosine)).to(target.dtype) if needs[1] else None,
    )


def _forward(prediction: Tensor, target: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from dit_fast.kernels import repa_cosine as kernel

        return kernel.forward(rows(prediction), rows(target))
    return _torch_forward(prediction, target)


def _backward(
    upstream: Tensor, prediction: Tensor, target: Tensor, saved: Tensor, needs: Sequence[bool], backend: str
) -> list[Tensor]:
    if backend == "triton":
        from dit_fast.kernels import repa_cosine as kernel

        grads = kernel.backward(upstream, rows(prediction), rows(target), saved, (needs[0], needs[1]))
    else:
        grads = _torch_backward(upstream, prediction, target, saved, needs)
    return [grad for grad in grads if grad is not None]


def _fake_forward(prediction: Tensor, target: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    dtype = wide(prediction, target)
    return prediction.new_empty((), dtype=dtype), prediction.new_empty((3, len(prediction)), dtype=dtype)


def _fake_backward(
    upstream: Tensor, prediction: Tensor, target: Tensor, saved: Tensor, needs: Sequence[bool], backend: str
) -> list[Tensor]:
    pairs = zip((prediction, target), needs, strict=True)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x, needed in pairs if needed]


forward_op = define(
    "repa_cosine_forward(Tensor prediction, Tensor target, str backend) -> (Tensor, Tensor)", _forward, _fake_forward
)
backward_op = define(
    "repa_cosine_backward(Tensor upstream, Tensor prediction, Tensor target, Tensor saved, bool[] needs, str backend)"
    " -> Tensor[]",
    _backward,
    _fake_backward,
)


class _Cosine(torch.autograd.Function):
    """(prediction [M, Z], target [M, Z], backend) -> value 0-d, saved [3, M]."""

    @staticmethod
    def forward(prediction: Tensor, target: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return forward_op(prediction, target, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        prediction, target, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(prediction, target, output[1])
        ctx.save_for_forward(prediction, target)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None
        needs = ctx.needs_input_grad[:2]
        return spread(backward_op(upstream, *ctx.saved_tensors, needs, ctx.backend), needs, 3)

    @staticmethod
    def jvp(ctx: Any, prediction: Tensor | None, target: Tensor | None, _: None) -> tuple[Tensor, None]:
        p, q = ctx.saved_tensors
        # Not the saved norms: a backward through this rule has to see what they depend on.
        r, s, cosine = _torch_forward(p, q)[1]
        p, q = p.to(r.dtype) * r[:, None], q.to(r.dtype) * s[:, None]
        change = torch.zeros_like(cosine)
        if prediction is not None:
            change = change + (prediction.to(r.dtype) * _turn(p, q, r, cosine)).sum(1)
        if target is not None:
            change = change + (target.to(r.dtype) * _turn(q, p, s, cosine)).sum(1)
        return -change.mean(), None


_fused = differentiable(_Cosine, "repa_cosine")
