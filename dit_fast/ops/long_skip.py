"""Long residual connection: the later stream and the stored one, normalised together and projected back to one width.

DiverseDiT (arXiv 2603.04239) Sec. 3.1, Eq. 8, with the details of the released code: concatenation order (x, skip),
affine LayerNorm over both, linear map with bias; the result replaces x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fast.backend import choose, register
from dit_fast.errors import UserError

register("long_skip")


def long_skip(
    x: Tensor,
    skip: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """`linear(layer_norm(concat(x, skip)))`.

    x, skip: [..., D], floating point, possibly of two dtypes (fp32 stream, half-precision skip or the reverse);
    norm_weight, norm_bias: [2D]; weight: [D, 2D]; bias: [D]. Statistics are taken in fp32 (fp64 for fp64 input) and the
    normalised value is rounded to the wider dtype of the two inputs, as in the released code.
    Returns [..., D] in the dtype of the linear map: autocast's where autocast is on, else that of `weight`.
    Raises UserError for shapes, dtypes or devices that do not fit, ConfigError for an unknown backend.
    """
    _check(x, skip, norm_weight, norm_bias, weight, bias)
    choose("long_skip", backend, x.device.type)
    return _reference(x, skip, norm_weight, norm_bias, weight, bias, eps)


def _reference(
    x: Tensor, skip: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    joined = torch.cat([x, skip], dim=-1)
    statistics = torch.promote_types(joined.dtype, torch.float32)
    normalised = F.layer_norm(
        joined.to(statistics), joined.shape[-1:], norm_weight.to(statistics), norm_bias.to(statistics), eps
    ).to(joined.dtype)
    if not torch.is_autocast_enabled(x.device.type):
        normalised = normalised.to(weight.dtype)
    return F.linear(normalised, weight, bias)


def _check(x: Tensor, skip: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() == 0 or x.shape != skip.shape:
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
