"""The adaLN-Zero family: a norm without affine parameters, modulated per sample, and the gated residual before it.

DiT (arXiv 2212.09748) Sec. 3.2. All arithmetic is done in fp32 (fp64 for fp64 input), under autocast too, and rounded
once; results of the residual stream keep the stream's dtype. Differentiable in forward mode and, once, in reverse mode,
of the result or of its forward-mode derivative; backend="torch", the reference, twice in any combination of the modes.

Behind the three ops stands one with parts switched off. With n the normalised row, m and r = 1/sqrt(variance + eps) its
statistics, per-sample vectors broadcast over tokens,

    x_new = x + gate * y        n = r (x_new - m)        out = n (1 + scale) + shift

and for gradients e of x_new and g of out, with h = g (1 + scale) and means over the row,

    a = e + r (h - mean(h) - n mean(h n))        dx = a        dy = gate * a        dgate = sum over tokens of a * y
    dscale = sum over tokens of g * n            dshift = sum over tokens of g

Without g, dx is e itself: autograd gets back the tensor that it gave.

RMSNorm has r = 1/sqrt(variance + m^2 + eps), n = r x_new and a = e + r (h - n mean(h n)): the statistics of a row are
its mean and variance with either norm. Without y, x_new is x; without scale there is no out, and scale may be without
shift. Saved for the backward: x_new, which the model holds anyway, y, the vectors and two numbers per row. Kernels read
rows where they lie, at any distance, gradients too; what has a last stride other than 1 is copied first.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fast import _C
from dit_fast.backend import Implementation
from dit_fast.ops import adaln_cpp
from dit_fast.ops._op import FUSED, Op, check_norm, differentiable, odd_dtypes, triton, wide
from dit_fast.ops._register import define
from dit_fast.ops.diversity_descent import tap_backward_op
from dit_fast.ops.layer_norm import layer_norm, rms_norm
from dit_fast.ops.row_statistics import RowStatistics, known, row_statistics


def _refuses(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    out_dtype: torch.dtype,
) -> list[str]:  # fmt: skip
    vectors = [vector for vector in (gate, shift, scale) if vector is not None]
    reasons = odd_dtypes(x, *(() if y is None else (y,)), *vectors)
    if out_dtype not in FUSED:
        reasons.append(f"out_dtype is {out_dtype}, not float32, bfloat16 or float16")
    if any(vector.dim() == 3 for vector in vectors):
        reasons.append("a vector for each token is left to torch")
    return reasons


def _triton_refuses(x: Tensor, *arguments: Any) -> list[str]:
    from dit_fast.kernels import adaln as kernel

    return _refuses(x, *arguments) + kernel.supports(x)


_FASTER = (Implementation("cpp", ("cpu",), _C.unavailable, refuses=_refuses), triton(_triton_refuses))
_STREAMS = "x[N, T, D] y[N, T, D]"
_GATE = "gate[N, D] gate[N, T, D]"
_MODULATION = "shift[N, D] shift[N, T, D] scale[N, D] scale[N, T, D]"
MODULATE = Op("layer_norm_modulate", f"x[N, T, D] {_MODULATION}", *_FASTER)
RESIDUAL = Op("gate_residual", f"{_STREAMS} {_GATE}", *_FASTER)
BOTH = Op("gate_residual_modulate", f"{_STREAMS} {_GATE} {_MODULATION}", *_FASTER)


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    eps: float = 1e-6,
    backend: str = "auto",
    stats: RowStatistics | None = None,
    out_dtype: torch.dtype | None = None,
    norm: str = "layer",
    return_x: bool = False,
) -> Any:
    """`norm(x) * (1 + scale) + shift`.

    norm: "layer", LayerNorm, or "rms", `x / sqrt(mean(x^2) + eps)` (arXiv 1910.07467), whose weight w [D] the caller
    folds into the scale as `(w - 1) + w * scale`, in fp32 at least: [N, D], so nothing beside the stream, and what
    rounding adds to the factor `w (1 + scale)` is 1e-7 absolute. x: [N, T, D]; scale and shift (None: none): [N, D],
    broadcast over T, or [N, T, D], one for each token, which "torch" alone takes. stats: the caller's promise that they
    are `row_statistics(x)`, which saves a pass with either norm; "torch" takes its own. Returns [N, T, D] in out_dtype,
    by default x's: the dtype in which the next linear map runs spares it a cast. return_x: returns (x, that), for those
    who read x after this op: the gradients of both then become that of x in one pass; autograd would add them in one
    more.
    Raises UserError for shapes, dtypes or devices that do not fit, ConfigError for a backend that is unknown or cannot
    take these tensors.
    """
    given = MODULATE.check(backend, eps, x=x, **({} if shift is None else {"shift": shift}), scale=scale)
    check_norm(MODULATE.name, norm, "layer", "rms")
    mean, variance = known(MODULATE.name, "stats", stats, x) or (None, None)
    out_dtype = MODULATE.check_dtype(out_dtype) or x.dtype
    chosen = MODULATE.choose(backend, x.device, x, None, None, shift, scale, out_dtype, given=given)
    if chosen == "torch":
        out = _modulate(x, shift, scale, eps, out_dtype, norm)
        return (x, out) if return_x else out
    forms = (eps, norm == "rms", out_dtype, True, chosen, return_x)
    same, out, *_ = _fused(x, None, None, shift, scale, mean, variance, *forms)
    return (same, out) if return_x else out


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, backend: str = "auto", return_stats: bool = False) -> Any:
    """`x + gate * y`. x, y: [N, T, D], maybe of two dtypes; gate: [N, D], or [N, T, D] ("torch" alone).

    Returns [N, T, D] in x's dtype, and with return_stats the RowStatistics of that result as well. Raises as above.
    """
    given = RESIDUAL.check(backend, x=x, y=y, gate=gate)
    chosen = RESIDUAL.choose(backend, x.device, x, y, gate, None, None, x.dtype, given=given)
    if chosen == "torch":
        x_new = _residual(x, y, gate)
        return (x_new, row_statistics(x_new, "torch")) if return_stats else x_new
    x_new, _, *stats = _fused(x, y, gate, None, None, None, None, 0.0, False, x.dtype, return_stats, chosen, False)
    return (x_new, RowStatistics(*stats)) if return_stats else x_new


def gate_residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor | None, scale: Tensor, eps: float = 1e-6, backend: str = "auto",
    return_stats: bool = False, out_dtype: torch.dtype | None = None, norm: str = "layer",
) -> Any:  # fmt: skip
    """`x_new = x + gate * y` and `out = norm(x_new) * (1 + scale) + shift`.

    x, y: [N, T, D], maybe of two dtypes; gate, shift, scale and norm as above. Returns (x_new, out), [N, T, D], x_new
    in x's dtype, out in out_dtype (by default x's), and with return_stats the RowStatistics of x_new as a third, mean
    and variance with either norm. Raises as above.
    """
    moved = {} if shift is None else {"shift": shift}
    given = BOTH.check(backend, eps, x=x, y=y, gate=gate, **moved, scale=scale)
    check_norm(BOTH.name, norm, "layer", "rms")
    out_dtype = BOTH.check_dtype(out_dtype) or x.dtype
    chosen = BOTH.choose(backend, x.device, x, y, gate, shift, scale, out_dtype, given=given)
    if chosen == "torch":
        x_new = _residual(x, y, gate)
        out = _modulate(x_new, shift, scale, eps, out_dtype, norm)
        return (x_new, out, row_statistics(x_new, "torch")) if return_stats else (x_new, out)
    results = _fused(x, y, gate, shift, scale, None, None, eps, norm == "rms", out_dtype, True, chosen, False)
    x_new, out, *stats = results
    return (x_new, out, RowStatistics(*stats)) if return_stats else (x_new, out)


def returns_statistics(x: Tensor) -> bool:
    """Whether the ops that write the stream x return its row statistics for free; the reference takes another pass."""
    given = RESIDUAL.check("auto", x=x)
    return RESIDUAL.choose("auto", x.device, x, None, None, None, None, x.dtype, given=given) != "torch"


def _over_tokens(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.to(dtype).unsqueeze(1) if vector.dim() == 2 else vector.to(dtype)


def _modulate(x: Tensor, shift: Tensor | None, scale: Tensor, eps: float, out_dtype: torch.dtype, norm: str) -> Tensor:
    dtype = wide(x)
    normalised = (rms_norm if norm == "rms" else layer_norm)(x.to(dtype), eps)
    result = normalised * (1 + _over_tokens(scale, dtype))
    return (result if shift is None else result + _over_tokens(shift, dtype)).to(out_dtype)


def _residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    dtype = wide(x)
    return (x.to(dtype) + _over_tokens(gate, dtype) * y.to(dtype)).to(x.dtype)


@functools.cache
def _runner(backend: str) -> Any:
    """What has a forward and a backward; None: torch. Kept, for an import statement takes time at every call."""
    if backend == "torch":
        return None
    if backend == "triton":
        from dit_fast.kernels import adaln as kernel

        return kernel
    return adaln_cpp


def _normalised(x: Tensor, mean: Tensor, variance: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """n and r of the equations above, from a row's statistics."""
    if rms:
        rstd = (variance + mean.square() + eps).rsqrt().unsqueeze(-1)
        return x * rstd, rstd
    rstd = (variance + eps).rsqrt().unsqueeze(-1)
    return (x - mean.unsqueeze(-1)) * rstd, rstd


def _torch_forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    stats: tuple[Tensor, Tensor] | None, eps: float, rms: bool, out_dtype: torch.dtype, want_stats: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    dtype, x_new, out, mean, variance = wide(x), None, None, None, None
    if y is not None and gate is not None:
        x = x_new = _residual(x, y, gate)
    if stats is not None:
        mean, variance = stats
    elif want_stats:
        variance, mean = torch.var_mean(x.to(dtype), -1, correction=0)
    if scale is not None and mean is not None and variance is not None:
        normalised, _ = _normalised(x.to(dtype), mean, variance, eps, rms)
        out = normalised * (1 + _over_tokens(scale, dtype))
        out = (out if shift is None else out + _over_tokens(shift, dtype)).to(out_dtype)
    return x_new, out, mean, variance


def _torch_backward(
    grad_x_new: Tensor | None, grad_out: Tensor | None, x_new: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, mean: Tensor | None, variance: Tensor | None, eps: float, rms: bool, shifted: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    above = [grad for grad in (grad_x_new, grad_out) if grad is not None]
    dtype = wide(x_new if x_new is not None else above[0])
    grad_y = grad_gate = grad_shift = grad_scale = None
    total = torch.zeros((), dtype=dtype, device=above[0].device) if grad_x_new is None else grad_x_new.to(dtype)
    if grad_out is not None and x_new is not None and scale is not None and mean is not None and variance is not None:
        g = grad_out.to(dtype)
        normalised, rstd = _normalised(x_new.to(dtype), mean, variance, eps, rms)
        h = g * (1 + _over_tokens(scale, dtype))
        inner = (h * normalised).mean(-1, keepdim=True)
        total = total + rstd * ((h if rms else h - h.mean(-1, keepdim=True)) - normalised * inner)
        grad_scale, grad_shift = (g * normalised).sum(1), g.sum(1) if shifted else None
    if y is not None and gate is not None:
        grad_y, grad_gate = total * _over_tokens(gate, dtype), (total * y.to(dtype)).sum(1)
    return None if grad_out is None else total, grad_y, grad_gate, grad_shift, grad_scale


def _forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    mean: Tensor | None, variance: Tensor | None, eps: float, rms: bool, out_dtype: torch.dtype, want_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    runner = _runner(backend if x.numel() else "torch")
    stats = None if mean is None or variance is None else (mean, variance)
    want_stats = (want_stats or scale is not None) and stats is None
    if runner is None:
        results = _torch_forward(x, y, gate, shift, scale, stats, eps, rms, out_dtype, want_stats)
    else:
        results = runner.forward(x, y, gate, shift, scale, eps, rms, stats, out_dtype, want_stats)
    # Contiguous whatever the strides of x, as the fake promises the compiler.
    made = [x.new_empty(0) if each is None else each.contiguous() for each in results]
    if stats is not None:
        made[2:] = x.new_empty(0), x.new_empty(0)
    return tuple(made)  # type: ignore[return-value]


def _fake_forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    mean: Tensor | None, variance: Tensor | None, eps: float, rms: bool, out_dtype: torch.dtype, want_stats: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    new = lambda here, shape, dtype: x.new_empty(shape if here else (0,), dtype=dtype if here else x.dtype)  # noqa: E731
    measured = (want_stats or scale is not None) and mean is None
    rows = [new(measured, x.shape[:2], wide(x)) for _ in range(2)]
    return new(y is not None, x.shape, x.dtype), new(scale is not None, x.shape, out_dtype), rows[0], rows[1]


def _backward(
    grad_x_new: Tensor | None, grad_out: Tensor | None, x_new: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, mean: Tensor | None, variance: Tensor | None, eps: float, rms: bool, shifted: bool,
    x_dtype: torch.dtype, gate_dtype: torch.dtype, shift_dtype: torch.dtype, scale_dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = next(tensor for tensor in (grad_x_new, grad_out) if tensor is not None)
    runner = _runner(backend if like.numel() else "torch")
    inputs = (grad_x_new, grad_out, x_new, y, gate, scale, mean, variance, eps, rms, shifted)
    y_dtype, vectors = None if y is None else y.dtype, (gate_dtype, shift_dtype, scale_dtype)
    if runner is None:
        results: Sequence[Tensor | None] = _torch_backward(*inputs)
        dtypes = (x_dtype, y_dtype, *vectors)
        results = [None if t is None else t.to(dtype).contiguous() for t, dtype in zip(results, dtypes, strict=True)]
    else:
        results = runner.backward(*inputs, x_dtype, y_dtype, vectors)
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in results)  # type: ignore[return-value]


def _fake_backward(
    grad_x_new: Tensor | None, grad_out: Tensor | None, x_new: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, mean: Tensor | None, variance: Tensor | None, eps: float, rms: bool, shifted: bool,
    x_dtype: torch.dtype, gate_dtype: torch.dtype, shift_dtype: torch.dtype, scale_dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = next(tensor for tensor in (grad_x_new, grad_out) if tensor is not None)
    samples, _, width = like.shape
    present = (y is not None, grad_out is not None and shifted, grad_out is not None)
    streams = [like.new_empty(0) if grad_out is None else like.new_empty(like.shape, dtype=x_dtype)]
    streams.append(like.new_empty(like.shape, dtype=y.dtype) if y is not None else like.new_empty(0))
    vectors = [
        like.new_empty((samples, width), dtype=dtype) if here else like.new_empty(0)
        for here, dtype in zip(present, (gate_dtype, shift_dtype, scale_dtype), strict=True)
    ]
    return streams[0], streams[1], vectors[0], vectors[1], vectors[2]


forward_op = define(
    "adaln_forward(Tensor x, Tensor? y, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? mean, Tensor? variance, "
    "float eps, bool rms, ScalarType out_dtype, bool want_stats, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
backward_op = define(
    "adaln_backward(Tensor? grad_x_new, Tensor? grad_out, Tensor? x_new, Tensor? y, Tensor? gate, Tensor? scale, "
    "Tensor? mean, Tensor? variance, float eps, bool rms, bool shifted, ScalarType x_dtype, ScalarType gate_dtype, "
    "ScalarType shift_dtype, ScalarType scale_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _AdaLN(torch.autograd.Function):
    """Streams, vectors and statistics, some None -> x_new, out, mean, variance; what is absent has no elements.

    passes: without y, x_new is x, which the backward takes the gradient of along.
    """

    @staticmethod
    def forward(
        x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
        mean: Tensor | None, variance: Tensor | None, eps: float, rms: bool, out_dtype: torch.dtype, want_stats: bool,
        backend: str, passes: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        x_new, *rest = forward_op(x, y, gate, shift, scale, mean, variance, eps, rms, out_dtype, want_stats, backend)
        return x.view_as(x) if passes else x_new, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, y, gate, shift, scale, mean, variance, ctx.eps, ctx.rms, ctx.out_dtype, _, ctx.backend, ctx.passes = inputs
        x_new, out, *measured = output
        if mean is not None:
            measured = [mean, variance]
        ctx.x_dtype = x.dtype
        ctx.vector_dtypes = [x.dtype if vector is None else vector.dtype for vector in (gate, shift, scale)]
        ctx.shifted = shift is not None
        ctx.writes = y is not None or ctx.passes
        absent = [t for t, here in ((x_new, ctx.writes), (out, scale is not None)) if not here]
        ctx.mark_non_differentiable(*output[2:], *absent)
        ctx.set_materialize_grads(False)
        normalises = scale is not None
        if y is not None and not normalises:
            ctx.tap = None  # a tap on x_new sets it (diversity_taps.py): what a loss of that adds to its gradient
        stream = x if y is None else x_new  # never the view of x that passes
        ctx.save_for_backward(
            stream if normalises else None, y, gate, scale, *(measured if normalises else (None, None))
        )
        ctx.save_for_forward(x, y, gate, scale)

    @staticmethod
    def backward(ctx: Any, grad_x_new: Tensor | None, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        # Under the compiler, gradients of outputs that are absent come as empty tensors.
        saved = ctx.saved_tensors
        y_given, normalises = saved[1] is not None, saved[3] is not None
        grad_x_new, grad_out = grad_x_new if ctx.writes else None, grad_out if normalises else None
        tap = getattr(ctx, "tap", None)
        if tap is not None and tap.active:
            added, grad_x_new = tap.parts(grad_x_new, ctx.backend)
            if added is not None:
                found = tap_backward_op(added, grad_x_new, *saved[1:3], ctx.backend)
                pairs = zip(found, ctx.needs_input_grad[:3], strict=True)
                return *(grad if needed else None for grad, needed in pairs), *(None,) * 10
        if grad_out is None and (grad_x_new is None or not y_given):
            return grad_x_new, *(None,) * 12
        forms = (ctx.eps, ctx.rms, ctx.shifted)
        made = backward_op(grad_x_new, grad_out, *saved, *forms, ctx.x_dtype, *ctx.vector_dtypes, ctx.backend)
        grads = (made[0] if grad_out is not None else grad_x_new, *made[1:])
        present = (True, y_given, y_given, grad_out is not None and ctx.shifted, grad_out is not None)
        wanted = zip(grads, present, ctx.needs_input_grad[:5], strict=True)
        return *(grad if here and needed else None for grad, here, needed in wanted), *(None,) * 8

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, y, gate, scale = ctx.saved_tensors
        dx, dy, dgate, dshift, dscale = tangents[:5]
        dtype = wide(x)
        change = torch.zeros_like(x, dtype=dtype) if dx is None else dx.to(dtype)
        stream = x.to(dtype)
        if y is not None:
            wide_y, wide_gate = y.to(dtype), _over_tokens(gate, dtype)
            stream = stream + wide_gate * wide_y
            change = change if dy is None else change + wide_gate * dy.to(dtype)
            change = change if dgate is None else change + _over_tokens(dgate, dtype) * wide_y
        d_x_new = change.to(x.dtype) if y is not None else None
        if ctx.passes:
            d_x_new = torch.zeros_like(x) if dx is None else dx.view_as(dx)
        if scale is None:
            return d_x_new, None, None, None
        centred = stream if ctx.rms else stream - stream.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        normalised = centred * rstd
        along = (change * normalised).mean(-1, keepdim=True)
        change = change if ctx.rms else change - change.mean(-1, keepdim=True)
        d_out = rstd * (change - normalised * along) * (1 + _over_tokens(scale, dtype))
        d_out = d_out if dscale is None else d_out + normalised * _over_tokens(dscale, dtype)
        d_out = d_out if dshift is None else d_out + _over_tokens(dshift, dtype)
        return d_x_new, d_out.to(ctx.out_dtype), None, None


_fused = differentiable(_AdaLN, "adaLN")
