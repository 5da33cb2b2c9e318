"""The adaLN-Zero family: LayerNorm without affine parameters, modulated per sample, and the gated residual before it.

DiT (arXiv 2212.09748) Sec. 3.2. All arithmetic is done in fp32 (fp64 for fp64 input), under autocast too, and rounded
once; results of the residual stream keep the stream's dtype. Differentiable in forward mode and, once, in reverse mode,
of the result or of its forward-mode derivative; backend="torch", the reference, twice in any combination of the modes.
"""

from typing import Any

import torch
from torch import Tensor

from dit_fast.errors import UserError
from dit_fast.ops import adaln_op
from dit_fast.ops._arguments import require_settings, require_statistics, require_tensors
from dit_fast.ops.layer_norm import layer_norm
from dit_fast.ops.row_statistics import RowStatistics, row_statistics

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    backend: str = "auto",
    stats: RowStatistics | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`layer_norm(x) * (1 + scale) + shift`.

    x: [N, T, D]; shift, scale: [N, D], broadcast over T. stats: the caller's promise that they are
    `row_statistics(x)`, which saves a pass; "torch" takes its own. Returns [N, T, D] in out_dtype, by default x's:
    the dtype in which the next linear map runs spares it a cast.
    Raises UserError for shapes, dtypes or devices that do not fit, ConfigError for a backend that is unknown or cannot
    take these tensors.
    """
    name = "layer_norm_modulate"
    require_tensors(name, x=x, shift=shift, scale=scale)
    require_settings(name, backend, eps)
    require_statistics(name, "stats", stats)
    _check(name, x, {"shift": shift, "scale": scale}, out_dtype=out_dtype, stats=stats)
    out_dtype = out_dtype or x.dtype
    if _takes_reference(name, backend, x, None, None, shift, scale):
        return _modulate(x, shift, scale, eps, out_dtype)
    return adaln_op.apply(name, x, None, None, shift, scale, stats, eps, out_dtype, True, backend)[1]


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, backend: str = "auto", return_stats: bool = False) -> Any:
    """`x + gate * y`. x, y: [N, T, D], maybe of two dtypes; gate: [N, D].

    Returns [N, T, D] in x's dtype, and with return_stats the RowStatistics of that result as well. Raises as above.
    """
    name = "gate_residual"
    require_tensors(name, x=x, y=y, gate=gate)
    require_settings(name, backend)
    _check(name, x, {"gate": gate}, y)
    if _takes_reference(name, backend, x, y, gate):
        x_new = _residual(x, y, gate)
        return (x_new, row_statistics(x_new, "torch")) if return_stats else x_new
    x_new, _, *stats = adaln_op.apply(name, x, y, gate, None, None, None, 0.0, x.dtype, return_stats, backend)
    return (x_new, RowStatistics(*stats)) if return_stats else x_new


def gate_residual_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    backend: str = "auto",
    return_stats: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """`x_new = x + gate * y` and `out = layer_norm(x_new) * (1 + scale) + shift`.

    x, y: [N, T, D], maybe of two dtypes; gate, shift, scale: [N, D]. Returns (x_new, out), [N, T, D], x_new in x's
    dtype, out in out_dtype (by default x's), and with return_stats the RowStatistics of x_new as a third. Raises as
    above.
    """
    name = "gate_residual_modulate"
    require_tensors(name, x=x, y=y, gate=gate, shift=shift, scale=scale)
    require_settings(name, backend, eps)
    _check(name, x, {"gate": gate, "shift": shift, "scale": scale}, y, out_dtype=out_dtype)
    out_dtype = out_dtype or x.dtype
    if _takes_reference(name, backend, x, y, gate, shift, scale):
        x_new = _residual(x, y, gate)
        out = _modulate(x_new, shift, scale, eps, out_dtype)
        return (x_new, out, row_statistics(x_new, "torch")) if return_stats else (x_new, out)
    x_new, out, *stats = adaln_op.apply(name, x, y, gate, shift, scale, None, eps, out_dtype, True, backend)
    return (x_new, out, RowStatistics(*stats)) if return_stats else (x_new, out)


def _takes_reference(name: str, backend: str, *tensors: Tensor | None) -> bool:
    if backend == "torch":
        return True
    return not torch.compiler.is_compiling() and adaln_op.choose_backend(name, backend, *tensors) == "torch"


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    normalised = layer_norm(x.to(wide), eps)
    return (normalised * (1 + scale.to(wide).unsqueeze(1)) + shift.to(wide).unsqueeze(1)).to(out_dtype)


def _residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) + gate.to(wide).unsqueeze(1) * y.to(wide)).to(x.dtype)


def _check(
    op: str,
    x: Tensor,
    per_sample: dict[str, Tensor],
    y: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    stats: RowStatistics | None = None,
) -> None:
    if x.dim() != 3 or not x.shape[2]:
        raise UserError(f"{op}: x must be [N, T, D], not {tuple(x.shape)}")
    if y is not None and y.shape != x.shape:
        raise UserError(f"{op}: y {tuple(y.shape)} must have the shape of x {tuple(x.shape)}")
    for name, tensor in per_sample.items():
        if tensor.shape != (x.shape[0], x.shape[2]):
            expected = (x.shape[0], x.shape[2])
            raise UserError(
                f"{op}: {name} must be [N, D] = {expected} for x {tuple(x.shape)}, not {tuple(tensor.shape)}"
            )
    for name, tensor in {"x": x, **({} if y is None else {"y": y}), **per_sample}.items():
        if tensor.dtype not in _FLOATS:
            raise UserError(f"{op}: {name} must be floating point (fp32, bf16, fp16 or fp64), not {tensor.dtype}")
        if tensor.device != x.device:
            raise UserError(f"{op}: {name} is on {tensor.device}, x on {x.device}; move them to one device")
    if out_dtype is not None and out_dtype not in _FLOATS:
        raise UserError(f"{op}: out_dtype must be fp32, bf16, fp16 or fp64, not {out_dtype}")
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, tensor in () if stats is None else zip(("mean", "variance"), stats, strict=True):
        if tensor.shape != x.shape[:2] or tensor.dtype != wide or tensor.device != x.device:
            raise UserError(
                f"{op}: stats.{name} must be {wide} {tuple(x.shape[:2])} on {x.device}, not {tensor.dtype} "
                f"{tuple(tensor.shape)} on {tensor.device}; take them from row_statistics(x)"
            )
