"""Long residual connection: the later stream and the stored one, normalised together and projected back to one width.

DiverseDiT (arXiv 2603.04239) Sec. 3.1, Eq. 8, with the details of the released code: concatenation order (x, skip),
affine LayerNorm over both, linear map with bias; the result replaces x. Backends: "torch" is this file's reference,
plain autograd; "gemm" and "triton" are those of `long_skip_op`, with an analytic gradient that keeps no more than the
inputs, the result and two numbers per row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fast.errors import UserError
from dit_fast.ops import long_skip_op
from dit_fast.ops._arguments import require_settings, require_statistics, require_tensors
from dit_fast.ops.autocast import autocast_dtype
from dit_fast.ops.layer_norm import layer_norm
from dit_fast.ops.row_statistics import RowStatistics


def long_skip(
    x: Tensor,
    skip: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    backend: str = "auto",
    x_stats: RowStatistics | None = None,
    skip_stats: RowStatistics | None = None,
) -> Tensor:
    """`linear(layer_norm(concat(x, skip)))`.

    x, skip: [..., D], floating point, possibly of two dtypes (fp32 stream, half-precision skip or the reverse);
    norm_weight, norm_bias: [2D]; weight: [D, 2D]; bias: [D]. x_stats, skip_stats: what `row_statistics` says of x and
    of skip, where the caller knows it ("torch" ignores it); gradients are the same with and without.
    Statistics are taken in fp32 (fp64 for fp64 input). Returns [..., D] in the dtype of the linear map: autocast's
    where autocast is on, else that of `weight`. Every backend differentiates in forward mode and, once, in reverse
    mode, of the result or of its forward-mode derivative; "torch" twice in any combination of the modes. fp64 takes
    "torch" unless told otherwise. x, skip and the result must not be changed in place before the backward pass
    (autograd raises).
    Raises UserError for shapes, dtypes or devices that do not fit, ConfigError for a backend that is unknown or cannot
    take these tensors.
    """
    named = {"x": x, "skip": skip, "norm_weight": norm_weight, "norm_bias": norm_bias, "weight": weight, "bias": bias}
    require_tensors("long_skip", **named)
    require_settings("long_skip", backend, eps)
    require_statistics("long_skip", "x_stats", x_stats)
    require_statistics("long_skip", "skip_stats", skip_stats)
    _check(x, skip, norm_weight, norm_bias, weight, bias)
    parameters = (norm_weight, norm_bias, weight, bias)
    if long_skip_op.takes_reference(backend, x, skip, *parameters):
        return _reference(x, skip, *parameters, eps)
    stats = [*_flat("x_stats", x_stats, x), *_flat("skip_stats", skip_stats, skip)]
    rows = (x.reshape(-1, x.shape[-1]), skip.reshape(-1, x.shape[-1]))
    return long_skip_op.apply(*rows, *parameters, eps, _map_dtype(x, weight), backend, stats).view(x.shape)


def _map_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return weight.dtype if weight.dtype == torch.float64 else autocast_dtype(x) or weight.dtype


def _reference(
    x: Tensor, skip: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """As released: the normalised value is rounded to the wider dtype of the two inputs before the map."""
    joined = torch.cat([x, skip], dim=-1)
    statistics = torch.promote_types(joined.dtype, torch.float32)
    affine = norm_weight.to(statistics), norm_bias.to(statistics)
    normalised = layer_norm(joined.to(statistics), eps, *affine).to(joined.dtype)
    if autocast_dtype(x) is None:
        normalised = normalised.to(weight.dtype)
    return F.linear(normalised, weight, bias)


def _flat(name: str, stats: RowStatistics | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if stats is None:
        return None, None
    wide = torch.promote_types(x.dtype, torch.float32)
    for field, tensor in zip(("mean", "variance"), stats, strict=True):
        if tensor.shape != x.shape[:-1] or tensor.dtype != wide or tensor.device != x.device:
            raise UserError(
                f"long_skip: {name}.{field} must be {wide} {tuple(x.shape[:-1])} on {x.device}, "
                f"not {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    return stats[0].detach().reshape(-1), stats[1].detach().reshape(-1)


def _check(x: Tensor, skip: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() == 0 or x.shape != skip.shape or not x.shape[-1]:
        raise UserError(f"long_skip: x {tuple(x.shape)} and skip {tuple(skip.shape)} must be of one shape [..., D]")
    width = x.shape[-1]
    expected = {
        "norm_weight": (norm_weight, (2 * width,)),
        "norm_bias": (norm_bias, (2 * width,)),
        "weight": (weight, (width, 2 * width)),
        "bias": (bias, (width,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise UserError(f"long_skip: {name} must be {shape} for D = {width}, not {tuple(tensor.shape)}")
    for name, tensor in {"x": x, "skip": skip, **{name: pair[0] for name, pair in expected.items()}}.items():
        if not tensor.is_floating_point():
            raise UserError(f"long_skip: {name} must be floating point, not {tensor.dtype}")
        if tensor.device != x.device:
            raise UserError(f"long_skip: {name} is on {tensor.device}, x on {x.device}; move them to one device")
