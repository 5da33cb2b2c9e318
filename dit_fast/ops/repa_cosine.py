"""REPA's alignment loss: minus the mean cosine of predicted and given tokens.

REPA (arXiv 2410.06940), Eq. 8. With r = 1 / max(|p|, 1e-12) per token, s alike for the target, and c the cosine,

    value = -mean c,    dp = -(g/M) r (s q - c r p),    dq = -(g/M) s (r p - c s q),

without the second term where a norm is at its floor, a constant. The fused forward is one launch and keeps r, s and c,
12 bytes per token; the backward reads both tensors once and writes each gradient that is needed once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_fast import kernels
from dit_fast.backend import Implementation, choose, register
from dit_fast.errors import UserError
from dit_fast.ops import _library
from dit_fast.ops._arguments import require_settings, require_tensors

EPS = 1e-12

register("repa_cosine", Implementation("triton", kernels.devices(), kernels.unavailable))


def repa_cosine(prediction: Tensor, target: Tensor, backend: str = "auto") -> Tensor:
    """Minus the mean over tokens of the cosine of prediction and target [N, T, Z], 0-d.

    Dtypes may differ; arithmetic and result are float32, or float64 where an input is. A norm below 1e-12 counts as
    1e-12. Both inputs may need a gradient; one that does not costs nothing. Autocast changes nothing. "torch" is plain
    autograd; "triton" differentiates in forward mode and, once, in reverse mode, of the value or of its forward-mode
    derivative. Raises UserError for shapes, dtypes or devices that do not
    fit and for empty tensors, ConfigError for a backend that is unknown or cannot run.
    """
    require_tensors("repa_cosine", prediction=prediction, target=target)
    require_settings("repa_cosine", backend)
    _check(prediction, target)
    # Compiled code is tied to no implementation: there the op chooses when it runs.
    if backend == "torch" or (not torch.compiler.is_compiling() and _choose(prediction, target, backend) == "torch"):
        return _reference(prediction, target)
    function = _Cosine if torch.compiler.is_compiling() else _CosineWithTangent
    return function.apply(prediction.flatten(0, 1), target.flatten(0, 1), backend)[0]


def supports(prediction: Tensor, target: Tensor, backend: str = "triton") -> list[str]:
    """Reasons why the fused implementation cannot take these tensors [..., Z]; empty if it can."""
    from dit_fast.kernels import repa_cosine as kernel

    return kernel.supports(prediction, target)


def _choose(prediction: Tensor, target: Tensor, backend: str) -> str:
    return choose("repa_cosine", backend, prediction.device.type, lambda name: supports(prediction, target, name))


def _wide(prediction: Tensor, target: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)


def _reference(prediction: Tensor, target: Tensor) -> Tensor:
    wide = _wide(prediction, target)
    return -(F.normalize(prediction.to(wide), dim=-1) * F.normalize(target.to(wide), dim=-1)).sum(-1).mean()


def _inverse_norm(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1)
    return torch.where(norm <= EPS, 1 / EPS, 1 / norm)


def _turn(own: Tensor, other: Tensor, inverse: Tensor, cosine: Tensor) -> Tensor:
    """d cosine / d own [M, Z], for directions own and other."""
    return inverse[:, None] * (other - torch.where(inverse < 1 / EPS, cosine, 0)[:, None] * own)


def _torch_forward(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    p, q = (x.to(_wide(prediction, target)) for x in (prediction, target))
    r, s = _inverse_norm(p), _inverse_norm(q)
    cosine = ((p * r[:, None]) * (q * s[:, None])).sum(1)
    return -cosine.mean(), torch.stack([r, s, cosine])


def _torch_backward(
    upstream: Tensor, prediction: Tensor, target: Tensor, saved: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    r, s, cosine = saved
    p, q = prediction.to(saved.dtype) * r[:, None], target.to(saved.dtype) * s[:, None]
    scale = -upstream / len(p)
    return (
        (scale * _turn(p, q, r, cosine)).to(prediction.dtype) if needs[0] else None,
        (scale * _turn(q, p, s, cosine)).to(target.dtype) if needs[1] else None,
    )


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _forward(prediction: Tensor, target: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if _choose(prediction, target, backend) == "triton":
        from dit_fast.kernels import repa_cosine as kernel

        return kernel.forward(_rows(prediction), _rows(target))
    return _torch_forward(prediction, target)


def _backward(
    upstream: Tensor, prediction: Tensor, target: Tensor, saved: Tensor, needs: list[bool], backend: str
) -> list[Tensor]:
    if _choose(prediction, target, backend) == "triton":
        from dit_fast.kernels import repa_cosine as kernel

        grads = kernel.backward(upstream, _rows(prediction), _rows(target), saved, (needs[0], needs[1]))
    else:
        grads = _torch_backward(upstream, prediction, target, saved, needs)
    return [grad for grad in grads if grad is not None]


def _fake_forward(prediction: Tensor, target: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    wide = _wide(prediction, target)
    return prediction.new_empty((), dtype=wide), prediction.new_empty((3, len(prediction)), dtype=wide)


def _fake_backward(
    upstream: Tensor, prediction: Tensor, target: Tensor, saved: Tensor, needs: list[bool], backend: str
) -> list[Tensor]:
    pairs = zip((prediction, target), needs, strict=True)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x, needed in pairs if needed]


forward_op = _library.define(
    "repa_cosine_forward(Tensor prediction, Tensor target, str backend) -> (Tensor, Tensor)", _forward, _fake_forward
)
backward_op = _library.define(
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
    @_library.once_differentiable("repa_cosine")
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
        if upstream is None:
            return None, None, None
        needs = list(ctx.needs_input_grad[:2])
        grads = iter(backward_op(upstream, *ctx.saved_tensors, needs, ctx.backend))
        return next(grads) if needs[0] else None, next(grads) if needs[1] else None, None


class _CosineWithTangent(_Cosine):
    """The same with a forward-mode rule in plain tensor operations; the compiler refuses functions that have one."""

    @staticmethod
    def jvp(ctx: Any, prediction: Tensor | None, target: Tensor | None, _: None) -> tuple[Tensor, None]:
        _library.once_in_forward_mode("repa_cosine")
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


def _check(prediction: Tensor, target: Tensor) -> None:
    if prediction.dim() != 3 or prediction.shape != target.shape:
        raise UserError(
            f"repa_cosine: prediction and target must be of one shape [N, T, Z], "
            f"not {list(prediction.shape)} and {list(target.shape)}"
        )
    if not prediction.numel():
        raise UserError(f"repa_cosine: no tokens to average over in {list(prediction.shape)}")
    for name, x in (("prediction", prediction), ("target", target)):
        if not x.is_floating_point():
            raise UserError(f"repa_cosine: {name} must be floating point, not {x.dtype}")
    if target.device != prediction.device:
        raise UserError(
            f"repa_cosine: target is on {target.device}, prediction on {prediction.device}; move them to one device"
        )
