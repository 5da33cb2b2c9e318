"""The adaLN family as one torch op with parts switched off, an analytic gradient and a forward-mode rule.

With n the normalised row, m and r = 1/sqrt(variance + eps) its statistics, per-sample vectors broadcast over tokens,

    x_new = x + gate * y        n = r (x_new - m)        out = n (1 + scale) + shift

and for gradients e of x_new and g of out, with h = g (1 + scale) and means over the row,

    a = e + r (h - mean(h) - n mean(h n))        dx = a        dy = gate * a        dgate = sum over tokens of a * y
    dscale = sum over tokens of g * n            dshift = sum over tokens of g

Without y, x_new is x; without shift and scale there is no out. Saved for the backward: x_new, which the model holds
anyway, y, the vectors and two numbers per row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fast import _C, kernels
from dit_fast.backend import Implementation, choose, register
from dit_fast.ops import _library, adaln_cpp

OPS = ("layer_norm_modulate", "gate_residual", "gate_residual_modulate")
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

for _name in OPS:
    register(
        _name,
        Implementation("cpp", ("cpu",), _C.unavailable),
        Implementation("triton", kernels.devices(), kernels.unavailable),
    )


def supports(tensors: Sequence[Tensor | None], backend: str) -> list[str]:
    """Reasons why "cpp" or "triton" cannot take x, y [N, T, D] and the vectors [N, D]; empty if it can."""
    present = [tensor for tensor in tensors if tensor is not None]
    odd = {tensor.dtype for tensor in present} - set(_FUSED_DTYPES)
    reasons = [f"some input is {dtype}, not float32, bfloat16 or float16" for dtype in sorted(odd, key=str)]
    if backend == "triton":
        from dit_fast.kernels import adaln as kernel

        x = present[0]
        reasons += kernel.supports(x)
    return reasons


def choose_backend(name: str, backend: str, *tensors: Tensor | None) -> str:
    """tensors: x first. `name`: the public op, whose registration decides and whose name errors carry."""
    device_type = next(tensor.device.type for tensor in tensors if tensor is not None)
    return choose(name, backend, device_type, lambda other: supports(tensors, other))


def _runner(name: str, backend: str, *tensors: Tensor | None) -> Any:
    chosen = choose_backend(name, backend, *tensors)
    if not next(tensor.numel() for tensor in tensors if tensor is not None):
        return None
    if chosen == "triton":
        from dit_fast.kernels import adaln as kernel

        return kernel
    return adaln_cpp if chosen == "cpp" else None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _over_tokens(vector: Tensor, wide: torch.dtype) -> Tensor:
    return vector.to(wide).unsqueeze(1)


def _torch_forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    stats: tuple[Tensor, Tensor] | None, eps: float, out_dtype: torch.dtype, want_stats: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    wide, x_new, out, mean, variance = _wide(x), None, None, None, None
    if y is not None and gate is not None:
        x = x_new = (x.to(wide) + _over_tokens(gate, wide) * y.to(wide)).to(x.dtype)
    if stats is not None:
        mean, variance = stats
    elif want_stats:
        variance, mean = torch.var_mean(x.to(wide), -1, correction=0)
    if shift is not None and scale is not None and mean is not None and variance is not None:
        normalised = (x.to(wide) - mean.unsqueeze(-1)) * (variance + eps).rsqrt().unsqueeze(-1)
        out = (normalised * (1 + _over_tokens(scale, wide)) + _over_tokens(shift, wide)).to(out_dtype)
    return x_new, out, mean, variance


def _torch_backward(
    grad_x_new: Tensor | None, grad_out: Tensor | None, x_new: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, mean: Tensor | None, variance: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    above = [grad for grad in (grad_x_new, grad_out) if grad is not None]
    wide = _wide(x_new if x_new is not None else above[0])
    grad_y = grad_gate = grad_shift = grad_scale = None
    # A copy: what the op returns may not be what it was given.
    total = (
        torch.zeros((), dtype=wide, device=above[0].device) if grad_x_new is None else grad_x_new.to(wide, copy=True)
    )
    if grad_out is not None and x_new is not None and scale is not None and mean is not None and variance is not None:
        g, rstd = grad_out.to(wide), (variance + eps).rsqrt().unsqueeze(-1)
        normalised = (x_new.to(wide) - mean.unsqueeze(-1)) * rstd
        h = g * (1 + _over_tokens(scale, wide))
        inner = (h * normalised).mean(-1, keepdim=True)
        total = total + rstd * (h - h.mean(-1, keepdim=True) - normalised * inner)
        grad_scale, grad_shift = (g * normalised).sum(1), g.sum(1)
    if y is not None and gate is not None:
        grad_y, grad_gate = total * _over_tokens(gate, wide), (total * y.to(wide)).sum(1)
    return total, grad_y, grad_gate, grad_shift, grad_scale


def _forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    mean: Tensor | None, variance: Tensor | None, eps: float, out_dtype: torch.dtype, want_stats: bool, name: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    runner = _runner(name, backend, x, y, gate, shift, scale)
    stats = None if mean is None or variance is None else (mean, variance)
    want_stats = (want_stats or shift is not None) and stats is None
    if runner is None:
        results = _torch_forward(x, y, gate, shift, scale, stats, eps, out_dtype, want_stats)
    else:
        results = runner.forward(x, y, gate, shift, scale, eps, stats, out_dtype, want_stats)
    absent = (False, False, stats is not None, stats is not None)
    # Contiguous whatever the strides of x, as the fake promises the compiler.
    return tuple(x.new_empty(0) if t is None or no else t.contiguous() for t, no in zip(results, absent, strict=True))  # type: ignore[return-value]


def _fake_forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    mean: Tensor | None, variance: Tensor | None, eps: float, out_dtype: torch.dtype, want_stats: bool, name: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    new = lambda here, shape, dtype: x.new_empty(shape if here else (0,), dtype=dtype if here else x.dtype)  # noqa: E731
    measured = (want_stats or shift is not None) and mean is None
    rows = [new(measured, x.shape[:2], _wide(x)) for _ in range(2)]
    return new(y is not None, x.shape, x.dtype), new(shift is not None, x.shape, out_dtype), rows[0], rows[1]


def _backward(
    grad_x_new: Tensor | None, grad_out: Tensor | None, x_new: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, mean: Tensor | None, variance: Tensor | None, eps: float, x_dtype: torch.dtype,
    gate_dtype: torch.dtype, shift_dtype: torch.dtype, scale_dtype: torch.dtype, name: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    runner = _runner(name, backend, grad_x_new, grad_out, x_new, y, gate, scale)
    inputs = (grad_x_new, grad_out, x_new, y, gate, scale, mean, variance, eps)
    y_dtype, vectors = None if y is None else y.dtype, (gate_dtype, shift_dtype, scale_dtype)
    if runner is None:
        results: Sequence[Tensor | None] = _torch_backward(*inputs)
        dtypes = (x_dtype, y_dtype, *vectors)
        results = [None if t is None else t.to(dtype).contiguous() for t, dtype in zip(results, dtypes, strict=True)]
    else:
        results = runner.backward(*inputs, x_dtype, y_dtype, vectors)
    like = next(tensor for tensor in (grad_x_new, grad_out) if tensor is not None)
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in results)  # type: ignore[return-value]


def _fake_backward(
    grad_x_new: Tensor | None, grad_out: Tensor | None, x_new: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, mean: Tensor | None, variance: Tensor | None, eps: float, x_dtype: torch.dtype,
    gate_dtype: torch.dtype, shift_dtype: torch.dtype, scale_dtype: torch.dtype, name: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = grad_x_new if grad_x_new is not None else grad_out
    if like is None:
        raise RuntimeError(f"{name}: a backward without gradients")
    samples, _, width = like.shape
    present = (y is not None, grad_out is not None, grad_out is not None)
    streams = [like.new_empty(like.shape, dtype=x_dtype)]
    streams.append(like.new_empty(like.shape, dtype=y.dtype) if y is not None else like.new_empty(0))
    vectors = [
        like.new_empty((samples, width), dtype=dtype) if here else like.new_empty(0)
        for here, dtype in zip(present, (gate_dtype, shift_dtype, scale_dtype), strict=True)
    ]
    return streams[0], streams[1], vectors[0], vectors[1], vectors[2]


forward_op = _library.define(
    "adaln_forward(Tensor x, Tensor? y, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? mean, Tensor? variance, "
    "float eps, ScalarType out_dtype, bool want_stats, str name, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
backward_op = _library.define(
    "adaln_backward(Tensor? grad_x_new, Tensor? grad_out, Tensor? x_new, Tensor? y, Tensor? gate, Tensor? scale, "
    "Tensor? mean, Tensor? variance, float eps, ScalarType x_dtype, ScalarType gate_dtype, ScalarType shift_dtype, "
    "ScalarType scale_dtype, str name, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class AdaLN(torch.autograd.Function):
    """Streams, vectors and statistics, some None -> x_new, out, mean, variance; what is absent has no elements."""

    @staticmethod
    def forward(
        x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
        mean: Tensor | None, variance: Tensor | None, eps: float, out_dtype: torch.dtype, want_stats: bool, name: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return forward_op(x, y, gate, shift, scale, mean, variance, eps, out_dtype, want_stats, name, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, y, gate, shift, scale, mean, variance, ctx.eps, ctx.out_dtype, _, ctx.name, ctx.backend = inputs
        x_new, out, *measured = output
        if mean is not None:
            measured = [mean, variance]
        ctx.x_dtype = x.dtype
        ctx.vector_dtypes = [x.dtype if vector is None else vector.dtype for vector in (gate, shift, scale)]
        ctx.mark_non_differentiable(*output[2:], *(t for t, given in ((x_new, y), (out, shift)) if given is None))
        ctx.set_materialize_grads(False)
        normalises = shift is not None
        stream = x if y is None else x_new
        ctx.save_for_backward(
            stream if normalises else None, y, gate, scale, *(measured if normalises else (None, None))
        )
        ctx.save_for_forward(x, y, gate, scale)

    @staticmethod
    @_library.once_differentiable("adaLN")
    def backward(ctx: Any, grad_x_new: Tensor | None, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        # Under the compiler, gradients of outputs that are absent come as empty tensors.
        saved = ctx.saved_tensors
        y_given, normalises = saved[1] is not None, saved[3] is not None
        grad_x_new, grad_out = grad_x_new if y_given else None, grad_out if normalises else None
        if grad_x_new is None and grad_out is None:
            return (None,) * 12
        grads = backward_op(
            grad_x_new, grad_out, *saved, ctx.eps, ctx.x_dtype, *ctx.vector_dtypes, ctx.name, ctx.backend
        )
        present = (True, y_given, y_given, grad_out is not None, grad_out is not None)
        wanted = zip(grads, present, ctx.needs_input_grad[:5], strict=True)
        return *(grad if here and needed else None for grad, here, needed in wanted), *(None,) * 7


class AdaLNWithTangent(AdaLN):
    """The same with a forward-mode rule in plain tensor operations; the compiler refuses functions that have one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        _library.once_in_forward_mode(ctx.name)
        x, y, gate, scale = ctx.saved_tensors
        dx, dy, dgate, dshift, dscale = tangents[:5]
        wide = _wide(x)
        change = torch.zeros_like(x, dtype=wide) if dx is None else dx.to(wide)
        stream = x.to(wide)
        if y is not None:
            wide_y, wide_gate = y.to(wide), _over_tokens(gate, wide)
            stream = stream + wide_gate * wide_y
            change = change if dy is None else change + wide_gate * dy.to(wide)
            change = change if dgate is None else change + _over_tokens(dgate, wide) * wide_y
        d_x_new = None if y is None else change.to(x.dtype)
        if scale is None:
            return d_x_new, None, None, None
        centred = stream - stream.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        normalised = centred * rstd
        along = (change * normalised).mean(-1, keepdim=True)
        d_out = rstd * (change - change.mean(-1, keepdim=True) - normalised * along) * (1 + _over_tokens(scale, wide))
        d_out = d_out if dscale is None else d_out + normalised * _over_tokens(dscale, wide)
        d_out = d_out if dshift is None else d_out + _over_tokens(dshift, wide)
        return d_x_new, d_out.to(ctx.out_dtype), None, None


def apply(
    name: str, x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    stats: tuple[Tensor, Tensor] | None, eps: float, out_dtype: torch.dtype, want_stats: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The differentiable op; compiled code is tied to no implementation, there the op chooses when it runs."""
    function = AdaLN if torch.compiler.is_compiling() else AdaLNWithTangent
    mean, variance = stats or (None, None)
    return function.apply(x, y, gate, shift, scale, mean, variance, eps, out_dtype, want_stats, name, backend)
