"""The adaLN family on the CPU in C++ (csrc/adaln_cpu.cpp): the two functions behind backend "cpp".

Both take streams [N, T, D] and vectors [N, D] in float32, bfloat16 or float16, in any mixture; all arithmetic is in
float32 and every result is rounded once. Last strides other than 1 are copied, all other strides are read in place.
Results have the same bits for any number of threads. `dit_fast.ops` checks shapes before it calls; RuntimeError from
C++ names what else does not fit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_fast.ops._op import rows

_BEST_LEVEL = -1


def forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    rms: bool,
    stats: tuple[Tensor, Tensor] | None,
    out_dtype: torch.dtype,
    want_stats: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`x_new = x + gate * y`, `out = norm(x_new) * (1 + scale) + shift` -> (x_new, out, mean, variance).

    y and gate None: x_new is x itself and None is returned for it. scale None: out is None; shift may be None alone.
    rms: the norm is RMSNorm, else LayerNorm. stats: (mean, variance) [N, T] float32 of x, where known (only without y).
    mean, variance [N, T] float32 of x_new as stored are returned with want_stats. x_new has x's dtype, out has
    out_dtype.
    """
    known = (None, None) if stats is None else tuple(s.contiguous() for s in stats)
    x_new = None if y is None else torch.empty(x.shape, dtype=x.dtype)
    out = None if scale is None else torch.empty(x.shape, dtype=out_dtype)
    measured = stats is None and want_stats
    mean, variance = (torch.empty(x.shape[:2], dtype=torch.float32) if measured else None for _ in range(2))
    inputs = [None if each is None else rows(each) for each in (x, y, gate, shift, scale)]
    if out is not None or x_new is not None or measured:
        torch.ops.dit_fast_native.adaln_forward(*inputs, *known, eps, rms, x_new, out, mean, variance, _BEST_LEVEL)
    return (x_new, out, *known) if want_stats and stats is not None else (x_new, out, mean, variance)


def backward(
    grad_x_new: Tensor | None,
    grad_out: Tensor | None,
    x_new: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    rms: bool,
    shifted: bool,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype | None,
    vector_dtypes: Sequence[torch.dtype | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, y, gate, shift and scale, given those of x_new and out (either may be None).

    Without grad_out that of x is grad_x_new, and None here, as are those of shift and scale. Without y those of y and
    gate are None, and that of shift where there was none (shifted). x_new, scale, mean and variance are only read with
    grad_out. vector_dtypes: dtypes of the gradients of gate, shift and scale.
    """
    above = grad_out if grad_out is not None else grad_x_new
    if above is None:
        raise ValueError("grad_x_new and grad_out are both None")
    samples, _, width = above.shape
    grad_x = None if grad_out is None else torch.empty(above.shape, dtype=x_dtype)
    grad_y = None if y is None else torch.empty(above.shape, dtype=y_dtype)
    present = (y is not None, grad_out is not None and shifted, grad_out is not None)
    grad_gate, grad_shift, grad_scale = (
        torch.empty(samples, width, dtype=dtype) if here else None
        for dtype, here in zip(vector_dtypes, present, strict=True)
    )
    inputs = [None if each is None else rows(each) for each in (grad_x_new, grad_out, x_new, y, gate, scale)]
    statistics = (None if s is None else s.contiguous() for s in (mean, variance))
    outputs = (grad_x, grad_y, grad_gate, grad_shift, grad_scale)
    torch.ops.dit_fast_native.adaln_backward(*inputs, *statistics, eps, rms, *outputs, _BEST_LEVEL)
    return outputs
