"""The two implementations of the long skip and of its gradient, on rows [M, D]; long_skip.py has the formulas.

"gemm": the normalised rows in the map's dtype, then one library GEMM. Folding the mean out of a library GEMM instead
(y = r (x W1'^T + s W2'^T) - r m u^T + b') needs its sums in fp32 outside the GEMM: between them and y lie 42 bytes per
element of traffic against 18, and in the map's own dtype a mean of 100 deviations would cost two digits; fp32 inputs
would lose them in any case. The normalised rows live only inside the call. Where Triton runs, each pass over the rows
is one kernel (kernels/long_skip_rows.py); torch's operators, on a CPU, take one half at a time. "triton"
(kernels/long_skip.py) does the fold in its epilogues, where the sums are in registers, and leaves the normalised rows
for the gradient of W on the way. Its forward does so of halves that are stored as they are multiplied; of others, as of
an fp32 stream, it makes the normalised rows, too, and adds b' to the library's sums, in fp32 where y is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fast.kernels import devices as triton_devices
from dit_fast.kernels import unavailable
from dit_fast.ops._op import rows
from dit_fast.ops.autocast import without_autocast
from dit_fast.ops.row_statistics import join, of_rows


def forward(
    x: Tensor,
    skip: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_mean: Tensor | None,
    x_variance: Tensor | None,
    skip_mean: Tensor | None,
    skip_variance: Tensor | None,
    folded: Tensor | None,
    row_sums: Tensor | None,
    folded_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [M, D] in out_dtype from products in dtype, and mean and rstd [M] of the joined rows.

    Statistics may be known, and W', u and b' as `fold` gives them.
    """
    x, skip, parameters = rows(x), rows(skip), (norm_weight, norm_bias, weight, bias)
    folds: Any = () if folded is None else (folded, row_sums, folded_bias)
    with without_autocast(x):
        pair = (_statistics(x, x_mean, x_variance), _statistics(skip, skip_mean, skip_variance))
        if backend == "triton":
            from dit_fast.kernels import long_skip as kernel
            from dit_fast.kernels.row_statistics import join as join_in_one_launch

            mean, rstd = join_in_one_launch(*pair, eps)
            weights, sums, shift = folds or kernel.fold(*_for_kernel(parameters), dtype)
            return project(x, skip, mean, rstd, weights, sums, shift, out_dtype), mean, rstd
        mean, rstd = join(*pair, eps)
        if weight.dtype.itemsize > 2 and (kernels := _row_kernels(x, skip, dtype)) is not None:
            folded, folded_bias = folds[::2] or _fold(*parameters, dtype)
            normalised = kernels.normalise(x, skip, mean, rstd, dtype)
            return torch.addmm(folded_bias.to(dtype), normalised, folded.T).to(out_dtype), mean, rstd
        normalised = x.new_empty((len(x), weight.shape[1]), dtype=dtype)
        if weight.dtype.itemsize == 2:
            # These weights are exact as they are: folding would round once more than LayerNorm before the map does.
            affine = zip(norm_weight.chunk(2), norm_bias.chunk(2), strict=True)
            for half, out, (scale, shift) in zip((x, skip), normalised.chunk(2, 1), affine, strict=True):
                wide = _normalise(half, mean, rstd, torch.empty_like(half, dtype=mean.dtype))
                torch.addcmul(shift, wide, scale, out=out)
            return torch.addmm(bias.to(dtype), normalised, weight.to(dtype).T).to(out_dtype), mean, rstd
        for half, out in zip((x, skip), normalised.chunk(2, 1), strict=True):
            _normalise(half, mean, rstd, out)
        folded, folded_bias = folds[::2] or _fold(*parameters, dtype)
        return torch.addmm(folded_bias.to(dtype), normalised, folded.T).to(out_dtype), mean, rstd


def project(
    x: Tensor,
    skip: Tensor,
    mean: Tensor,
    rstd: Tensor,
    folded: Tensor,
    row_sums: Tensor,
    folded_bias: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """y [M, D] by "triton", from what `fold` gives: one kernel where both halves are stored as they are multiplied."""
    from dit_fast.kernels import long_skip as kernel
    from dit_fast.kernels import long_skip_rows as passes

    if x.dtype == skip.dtype == folded.dtype:
        return kernel.forward(_aligned(x), _aligned(skip), mean, rstd, folded, row_sums, folded_bias, out_dtype)
    normalised = passes.normalise(x, skip, mean, rstd, folded.dtype)
    if out_dtype == folded.dtype:
        return torch.addmm(folded_bias.to(out_dtype), normalised, folded.T)
    return _matmul_wide(normalised, folded.T, folded_bias.dtype).add_(folded_bias).to(out_dtype)


def _row_kernels(x: Tensor, skip: Tensor, dtype: torch.dtype) -> Any:
    """The module with one kernel for each pass of "gemm" over the rows; None where torch's operators make them."""
    if x.device.type not in triton_devices() or unavailable() or not x.numel():
        return None
    from dit_fast.kernels import long_skip_rows as kernels

    return kernels if kernels.supports(x, skip, dtype) else None


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy, with every row at a multiple of 16 bytes, as bulk copies want it."""
    from dit_fast.kernels.tables import is_aligned

    return x if is_aligned([x]) else x.clone(memory_format=torch.contiguous_format)


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


def fold(folds: list[Tensor], parameters: list[Tensor], backend: str) -> None:
    """Writes W', u and b' of several long skips into `folds`, three of each; parameters: four of each."""
    for index in range(len(folds) // 3):
        into: Any = folds[3 * index : 3 * index + 3]
        norm_weight, norm_bias, weight, bias = parameters[4 * index : 4 * index + 4]
        if backend == "triton":
            from dit_fast.kernels import long_skip as kernel

            kernel.fold(*_for_kernel((norm_weight, norm_bias, weight, bias)), into[0].dtype, into)
        else:
            folded, folded_bias = _fold(norm_weight, norm_bias, weight, bias, into[0].dtype)
            torch._foreach_copy_(into, [folded, folded.sum(1, dtype=folded_bias.dtype), folded_bias])


def backward(
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
    folded: Tensor | None,
    row_sums: Tensor | None,
    folded_bias: Tensor | None,
    dtype: torch.dtype,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of those of the six inputs that are needed; products in dtype, that of the forward's; W', u and b':
    its."""
    grad, x, skip, parameters = rows(grad), rows(x), rows(skip), (norm_weight, norm_bias, weight, bias)
    folds: Any = () if folded is None else (folded, row_sums, folded_bias)
    wide, wanted = mean.dtype, (needs[0], needs[1])
    if not (backend == "triton" and any(wanted)):  # whose first kernel converts what it reads
        grad = grad.to(dtype)
    grads: list[Tensor | None] = [None] * 6
    unit: Tensor | None = None  # the normalised rows [M, 2D] and the sum of grad over rows, where a kernel made them
    grad_bias: Tensor | None = None
    product: Tensor | None = None
    want_product = needs[2] or needs[4]
    with without_autocast(x):
        if backend == "triton" and any(wanted):
            from dit_fast.kernels import long_skip as kernel

            folded, sums, folded_bias = folds or kernel.fold(*_for_kernel(parameters), dtype)
            c1, c2, grad_bias, grad = kernel.prepare_backward(grad, y, sums, folded_bias, dtype)
            pair, want_unit = (_aligned(x), _aligned(skip)), want_product and all(wanted)
            *grads[:2], unit = kernel.backward_input(grad, *pair, mean, rstd, folded, c1, c2, wanted, want_unit)
        elif (
            backend == "gemm" and all(wanted) and weight.dtype.itemsize > 2 and (passes := _row_kernels(x, skip, dtype))
        ):
            folded, _ = folds[::2] or _fold(*parameters, dtype)
            *grads[:2], unit = passes.finish(grad @ folded, x, skip, mean, rstd)
        if unit is not None and want_product:
            product = _matmul_wide(grad.T, unit, wide)
        elif unit is None and (want_product or (backend == "gemm" and any(wanted))):
            product = _by_halves(grad, y, mean, rstd, x, skip, parameters, backend, needs, grads, folds)
        if unit is not None and product is not None and grad_bias is not None and _in_one_pass(parameters, needs):
            grads[2:] = *kernel.backward_parameters(product, grad_bias, *_for_kernel(parameters)[:3]), grad_bias
        else:
            grads[2:] = _parameter_gradients(grad, product, grad_bias, parameters, wide, needs[2:])
    return [g for g, needed in zip(grads, needs, strict=True) if needed and g is not None]


def _by_halves(
    grad: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    skip: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    backend: str,
    needs: Sequence[bool],
    grads: list[Tensor | None],
    folds: Sequence[Tensor],
) -> Tensor | None:
    """P [D, 2D] = dY^T zn if it is needed, and with "gemm" the gradients of the halves into `grads`, by torch's
    operators and with one half's normalised rows at a time."""
    norm_weight, _, weight, _ = parameters
    width, wide = x.shape[1], mean.dtype
    product = torch.empty_like(weight, dtype=wide) if needs[2] or needs[4] else None
    if backend == "gemm" and any(needs[:2]):
        folded, folded_bias = folds[::2] or _fold(*parameters, grad.dtype)
        if weight.dtype.itemsize == 2:
            factor, sums = weight.to(grad.dtype), torch.mv(weight.to(wide), norm_weight.to(wide))
        else:
            factor, sums = folded, folds[1] if folds else folded.sum(1, dtype=wide)
        upstream = grad.to(wide)
        c2 = torch.mv(upstream, sums) / (2 * width)
        c1 = ((upstream * y).sum(1) - torch.mv(upstream, folded_bias)) / (2 * width)
        del upstream
    for index, half in enumerate((x, skip)):
        columns, by_gemm = slice(index * width, (index + 1) * width), needs[index] and backend == "gemm"
        if product is None and not by_gemm:
            continue
        normalised = _normalise(half, mean, rstd, grad.new_empty(half.shape))
        if product is not None:
            product[:, columns] = _matmul_wide(grad.T, normalised, wide)
        if by_gemm:
            rest = torch.addcmul((-rstd * c2)[:, None], normalised, (-rstd * c1)[:, None])
            turned = grad @ factor[:, columns]
            if factor is not folded:
                turned = turned * norm_weight[columns].to(wide)
            grads[index] = torch.addcmul(rest, turned, rstd[:, None], out=half.new_empty(half.shape))
    return product


def _in_one_pass(parameters: tuple[Tensor, Tensor, Tensor, Tensor], needs: Sequence[bool]) -> bool:
    return all(needs) and all(parameter.dtype is torch.float32 for parameter in parameters)


def _parameter_gradients(
    grad: Tensor,
    product: Tensor | None,
    grad_bias: Tensor | None,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    wide: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """From P [D, 2D] = dY^T zn, which is overwritten: D^2 work and one sum over the rows."""
    norm_weight, norm_bias, weight, _ = parameters  # grad_bias: where it is known, the sum of grad over the rows
    grads: list[Tensor | None] = [None] * 4
    if any(needs):
        grad_bias = grad.sum(0, dtype=wide) if grad_bias is None else grad_bias
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


def _for_kernel(parameters: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm_weight, norm_bias, weight, bias = parameters
    return norm_weight.contiguous(), norm_bias.contiguous(), rows(weight), bias.contiguous()
