"""The long skip as a torch op, with an analytic gradient for all six inputs and a forward-mode rule.

With z = [x, skip] in R^{M x 2D}, mean m and r = 1/sqrt(variance + eps) per row, zn = r (z - m), weight W, gamma, beta:

    W' = round(gamma * W), u = W' 1 (row sums of the rounded W'), b' = b + W beta          y = zn W'^T + b'

and for dY, with c1 = dY . (y - b') / 2D and c2 = dY . u / 2D per row (the means of zn dzn and dzn, without dzn):

    dz = r (dY W' - c2 - zn c1)       P = dY^T zn       dW = P diag(gamma) + db beta^T, db = sum of dY
    dgamma = column sums of W * P     dbeta = W^T db

"gemm": statistics, then the normalised rows in the map's dtype, then one library GEMM. Folding the mean out of a
library GEMM instead (y = r (x W1'^T + s W2'^T) - r m u^T + b') needs its sums in fp32 outside the GEMM: between them
and y lie 42 bytes per element of traffic against 18, and in the map's own dtype a mean of 100 deviations would cost
two digits; fp32 inputs would lose them in any case. The normalised rows live only inside the call, in the backward one
half at a time. "triton" (kernels/long_skip.py) does the fold in its epilogues, where the sums are in registers.

Saved for the backward: the inputs, y, m and r. W', u and b' are made again from the parameters, so nothing of size D^2
is kept and engines that free parameters between the passes can.
"""

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dit_fast import kernels
from dit_fast.backend import Implementation, choose, register, resolve
from dit_fast.ops import _library, long_skip_table
from dit_fast.ops.autocast import without_autocast
from dit_fast.ops.row_statistics import join, of_rows

logger = logging.getLogger("dit_fast")

# On the CPU, at M = 4096, D = 768 in float32 on one core, forward and backward took 0.23 s with the reference and
# 0.26 s with "gemm", whose GEMMs are the same.
_AUTOMATIC = ("cuda",)
# In this order: the fallback of the measured table leads, and the table calls for Triton case by case.
register(
    "long_skip",
    Implementation("gemm", (), lambda: None, _AUTOMATIC),
    Implementation("triton", kernels.devices(), kernels.unavailable, _AUTOMATIC),
    remarks={"cuda": "long_skip_table.json names the shapes that take triton"},
)


def takes_reference(backend: str, *tensors: Tensor) -> bool:
    """Whether plain autograd of the reference runs; else the op decides when it is called, with the number of rows.

    "auto" takes it for float64, and where no other implementation is automatic.
    """
    backend = resolve("long_skip", backend)
    if backend == "auto":
        return tensors[0].device.type not in _AUTOMATIC or any(x.dtype == torch.float64 for x in tensors)
    return backend == "torch"


def supports(x: Tensor, skip: Tensor, parameters: tuple[Tensor, ...], dtype: torch.dtype, backend: str) -> list[str]:
    """Reasons why "gemm" or "triton" cannot take rows x, skip [M, D] with a map in `dtype`; empty if it can."""
    tensors = (x, skip, *parameters)
    if backend == "gemm":
        mixed = len({tensor.dtype == torch.float64 for tensor in tensors}) > 1
        return ["float64 and other dtypes are mixed"] if mixed else []
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return ["some inputs are float64"]
    reasons = []
    if kernels.unavailable() is None:
        from dit_fast.kernels import long_skip as kernel

        reasons += kernel.supports(x, skip, dtype)
    return reasons


def _choose(backend: str, x: Tensor, skip: Tensor, parameters: tuple[Tensor, ...], dtype: torch.dtype) -> str:
    refusals = functools.partial(supports, x, skip, parameters, dtype)
    if resolve("long_skip", backend) == "auto" and x.is_cuda:
        arch = long_skip_table.arch_of(x.device)
        if long_skip_table.preferred(arch, x.shape[1], x.shape[0], dtype) == "triton":
            reason = kernels.unavailable() or "; ".join(refusals("triton"))
            if not reason:
                return "triton"
            _say_once(reason)
    return choose("long_skip", backend, x.device.type, refusals)


@functools.cache
def _say_once(reason: str) -> None:
    logger.info("long_skip: triton is not used: %s", reason)


def _forward(
    x: Tensor,
    skip: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    stats: list[Tensor | None],
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    x, skip, parameters = _rows(x), _rows(skip), (norm_weight, norm_bias, weight, bias)
    backend = _choose(backend, x, skip, parameters, dtype)
    with without_autocast(x):
        mean, rstd = join(_statistics(x, *stats[:2]), _statistics(skip, *stats[2:]), eps)
        if backend == "triton":
            from dit_fast.kernels import long_skip as kernel

            folds = kernel.fold(*_for_kernel(parameters), dtype)
            return kernel.forward(x, skip, mean, rstd, *folds, dtype), mean, rstd
        normalised = x.new_empty((len(x), weight.shape[1]), dtype=dtype)
        if weight.dtype.itemsize == 2:
            # These weights are exact as they are: folding would round once more than LayerNorm before the map does.
            affine = zip(norm_weight.chunk(2), norm_bias.chunk(2), strict=True)
            for half, out, (scale, shift) in zip((x, skip), normalised.chunk(2, 1), affine, strict=True):
                wide = _normalise(half, mean, rstd, torch.empty_like(half, dtype=mean.dtype))
                torch.addcmul(shift, wide, scale, out=out)
            return torch.addmm(bias.to(dtype), normalised, weight.to(dtype).T), mean, rstd
        for half, out in zip((x, skip), normalised.chunk(2, 1), strict=True):
            _normalise(half, mean, rstd, out)
        folded, folded_bias = _fold(*parameters, dtype)
        return torch.addmm(folded_bias.to(dtype), normalised, folded.T), mean, rstd


def _statistics(x: Tensor, mean: Tensor | None, variance: Tensor | None) -> tuple[Tensor, Tensor]:
    return of_rows(x) if mean is None or variance is None else (mean, variance)


def _normalise(x: Tensor, mean: Tensor, rstd: Tensor, out: Tensor) -> Tensor:
    """rstd * (x - mean), in fp32 or wider, rounded once into `out`."""
    if out.dtype.itemsize == 2:
        # One pass. A mean of 1000 deviations costs 1e-4 this way, far below the rounding to 16 bits.
        return torch.addcmul((-mean * rstd)[:, None], x, rstd[:, None], out=out)
    return torch.sub(x, mean[:, None], out=out).mul_(rstd[:, None])


def _fold(
    norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """W' [D, 2D] in `dtype`, b' [D] in fp32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    folded = (weight.to(wide) * norm_weight.to(wide)).to(dtype)
    return folded, torch.addmv(bias.to(wide), weight.to(wide), norm_bias.to(wide))


def _backward(
    grad: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    skip: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    grad, x, skip, parameters = _rows(grad), _rows(x), _rows(skip), (norm_weight, norm_bias, weight, bias)
    chosen, width, wide = _choose(backend, x, skip, parameters, y.dtype), x.shape[1], mean.dtype
    grads: list[Tensor | None] = [None] * 6
    with without_autocast(x):
        product = torch.empty_like(weight, dtype=wide) if needs[2] or needs[4] else None
        if chosen == "triton":
            if any(needs[:2]):
                from dit_fast.kernels import long_skip as kernel

                if not grad.is_contiguous() or grad.data_ptr() % 16:
                    grad = grad.clone(memory_format=torch.contiguous_format)
                folded, *sums = kernel.fold(*_for_kernel(parameters), y.dtype)
                _, c1, c2, _ = kernel.prepare_backward(grad, y, rstd, *sums)
                wanted = (needs[0], needs[1])
                grads[:2] = kernel.backward_input(grad, x, skip, mean, rstd, folded, c1, c2, needs=wanted)
        elif any(needs[:2]):
            folded, folded_bias = _fold(*parameters, y.dtype)
            if weight.dtype.itemsize == 2:
                factor, sums = weight.to(y.dtype), torch.mv(weight.to(wide), norm_weight.to(wide))
            else:
                factor, sums = folded, folded.sum(1, dtype=wide)
            upstream = grad.to(wide)
            c2 = torch.mv(upstream, sums) / (2 * width)
            c1 = ((upstream * y).sum(1) - torch.mv(upstream, folded_bias)) / (2 * width)
            del upstream
        for index, half in enumerate((x, skip)):
            columns, by_gemm = slice(index * width, (index + 1) * width), needs[index] and chosen == "gemm"
            if product is None and not by_gemm:
                continue
            normalised = _normalise(half, mean, rstd, y.new_empty(half.shape))
            if product is not None:
                product[:, columns] = _matmul_wide(grad.T, normalised, wide)
            if by_gemm:
                rest = torch.addcmul((-rstd * c2)[:, None], normalised, (-rstd * c1)[:, None])
                turned = grad @ factor[:, columns]
                if factor is not folded:
                    turned = turned * norm_weight[columns].to(wide)
                grads[index] = torch.addcmul(rest, turned, rstd[:, None], out=half.new_empty(half.shape))
        grads[2:] = _parameter_gradients(grad, product, parameters, wide, needs[2:])
    return [g for g, needed in zip(grads, needs, strict=True) if needed and g is not None]


def _parameter_gradients(
    grad: Tensor,
    product: Tensor | None,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    wide: torch.dtype,
    needs: list[bool],
) -> list[Tensor | None]:
    """From P [D, 2D] = dY^T zn, which is overwritten: D^2 work and one sum over the rows."""
    norm_weight, norm_bias, weight, _ = parameters
    grads: list[Tensor | None] = [None] * 4
    if any(needs):
        grad_bias = grad.sum(0, dtype=wide)
        grads[3] = grad_bias
        if needs[1]:
            grads[1] = torch.mv(weight.to(wide).T, grad_bias)
        if needs[0] and product is not None:
            grads[0] = (weight * product).sum(0)
        if needs[2] and product is not None:
            grads[2] = product.mul_(norm_weight).addr_(grad_bias, norm_bias.to(wide))
    return [None if g is None else g.to(p.dtype) for g, p in zip(grads, parameters, strict=True)]


def _matmul_wide(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a @ b with sums handed out in `wide`, unrounded: gamma's gradient is a sum over D of them."""
    if a.is_cuda and a.dtype != wide:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _for_kernel(parameters: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm_weight, norm_bias, weight, bias = parameters
    return norm_weight.contiguous(), norm_bias.contiguous(), _rows(weight), bias.contiguous()


def _fake_forward(
    x: Tensor, skip: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor,
    stats: list[Tensor | None], eps: float, dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(torch.promote_types(x.dtype, skip.dtype), torch.float32)
    rows = x.shape[:1]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(rows, dtype=wide), x.new_empty(rows, dtype=wide)


def _fake_backward(
    grad: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, skip: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, weight: Tensor, bias: Tensor, backend: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    inputs = (x, skip, norm_weight, norm_bias, weight, bias)
    return [tensor.new_empty(tensor.shape) for tensor, needed in zip(inputs, needs, strict=True) if needed]


forward_op = _library.define(
    "long_skip_forward(Tensor x, Tensor skip, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, "
    "Tensor?[] stats, float eps, ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
backward_op = _library.define(
    "long_skip_backward(Tensor grad, Tensor y, Tensor mean, Tensor rstd, Tensor x, Tensor skip, Tensor norm_weight, "
    "Tensor norm_bias, Tensor weight, Tensor bias, str backend, bool[] needs) -> Tensor[]",
    _backward,
    _fake_backward,
)


@register_flop_formula(torch.ops.dit_fast.long_skip_forward)
def _forward_flops(x: torch.Size, *rest: Any, **options: Any) -> int:
    """Of the GEMM, multiply-add = 2, as torch's counter counts a linear layer."""
    return 4 * x[0] * x[1] ** 2


@register_flop_formula(torch.ops.dit_fast.long_skip_backward)
def _backward_flops(grad: torch.Size, *rest: Any, **options: Any) -> int:
    needs = rest[10]
    halves = int(needs[0]) + int(needs[1]) + 2 * int(needs[2] or needs[4])
    return 2 * grad[0] * grad[1] ** 2 * halves


class LongSkip(torch.autograd.Function):
    """(x, skip [M, D], four parameters, four statistics [M] or None, eps, dtype, backend) -> y [M, D], mean, rstd."""

    @staticmethod
    def forward(
        x: Tensor, skip: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor,
        x_mean: Tensor | None, x_variance: Tensor | None, skip_mean: Tensor | None, skip_variance: Tensor | None,
        eps: float, dtype: torch.dtype, backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        # No *arguments: where nothing requires a gradient, the compiler tells by their number whether there is a ctx.
        stats = [x_mean, x_variance, skip_mean, skip_variance]
        return forward_op(x, skip, norm_weight, norm_bias, weight, bias, stats, eps, dtype, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.eps, ctx.backend = inputs[10], inputs[12]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *inputs[:6])
        ctx.save_for_forward(*output, *inputs[:6])

    @staticmethod
    @_library.once_differentiable("long_skip")
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 13
        needs = list(ctx.needs_input_grad[:6])
        grads = iter(backward_op(grad, *ctx.saved_tensors, ctx.backend, needs))
        return *(next(grads) if needed else None for needed in needs), *(None,) * 7


class LongSkipWithTangent(LongSkip):
    """The same with a forward-mode rule in plain tensor operations; the compiler refuses functions that have one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None, None]:
        _library.once_in_forward_mode("long_skip")
        y, _, _, *inputs = ctx.saved_tensors
        return tangent(inputs, tangents[:6], ctx.eps, y.dtype), None, None


def tangent(inputs: list[Tensor], tangents: tuple[Tensor | None, ...], eps: float, dtype: torch.dtype) -> Tensor:
    """Directional derivative of y [M, D] along tangents of the six inputs (None: zero), in `dtype`."""
    x, skip, norm_weight, norm_bias, weight, _ = inputs
    with without_autocast(x):
        z = torch.cat([x, skip], 1)
        wide = torch.promote_types(z.dtype, torch.float32)
        variance, mean = torch.var_mean(z.to(wide), 1, correction=0, keepdim=True)
        rstd = (variance + eps).rsqrt()
        normalised = (z - mean) * rstd
        dx, dskip, dgamma, dbeta, dweight, dbias = (
            torch.zeros_like(value, dtype=wide) if change is None else change.to(wide)
            for value, change in zip(inputs, tangents, strict=True)
        )
        dz = torch.cat([dx, dskip], 1)
        turned = rstd * (dz - dz.mean(1, keepdim=True) - normalised * (normalised * dz).mean(1, keepdim=True))
        affine = normalised * norm_weight + norm_bias
        change = (turned * norm_weight + normalised * dgamma + dbeta) @ weight.to(wide).T
        return (change + affine @ dweight.T + dbias).to(dtype)


def apply(
    x: Tensor,
    skip: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
    stats: list[Tensor | None],
) -> Tensor:
    """y [M, D] in `dtype`, differentiable; stats: (mean, variance) of x, then of skip, each [M] or None."""
    function = LongSkip if torch.compiler.is_compiling() else LongSkipWithTangent
    result = function.apply(x, skip, norm_weight, norm_bias, weight, bias, *stats, eps, dtype, backend)
    return result[0]
