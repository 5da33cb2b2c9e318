"""The adaLN-Zero family: LayerNorm without affine parameters, modulated per sample, and the gated residual before it.

DiT (arXiv 2212.09748) Sec. 3.2. All arithmetic is done in fp32 (fp64 for fp64 input) and rounded once; results of the
residual stream keep the stream's dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fast.backend import choose, register
from dit_fast.errors import UserError

register("layer_norm_modulate")
register("gate_residual")
register("gate_residual_modulate")


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """`layer_norm(x) * (1 + scale) + shift`.

    x: [N, T, D]; shift, scale: [N, D], broadcast over T. Returns [N, T, D] in x's dtype.
    Raises UserError for shapes, dtypes or devices that do not fit, ConfigError for an unknown backend.
    """
    _check("layer_norm_modulate", x, {"shift": shift, "scale": scale})
    choose("layer_norm_modulate", backend, x.device.type)
    return _modulate(x, shift, scale, eps)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, backend: str = "auto") -> Tensor:
    """`x + gate * y`. x, y: [N, T, D]; gate: [N, D]. Returns [N, T, D] in x's dtype; raises as above."""
    _check("gate_residual", x, {"gate": gate}, y)
    choose("gate_residual", backend, x.device.type)
    return _residual(x, y, gate)


def gate_residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`x_new = x + gate * y` and `layer_norm(x_new) * (1 + scale) + shift`.

    x, y: [N, T, D]; gate, shift, scale: [N, D]. Returns both, [N, T, D], in x's dtype; raises as above.
    """
    _check("gate_residual_modulate", x, {"gate": gate, "shift": shift, "scale": scale}, y)
    choose("gate_residual_modulate", backend, x.device.type)
    x_new = _residual(x, y, gate)
    return x_new, _modulate(x_new, shift, scale, eps)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    normalised = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    return (normalised * (1 + scale.to(wide).unsqueeze(1)) + shift.to(wide).unsqueeze(1)).to(x.dtype)


def _residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) + gate.to(wide).unsqueeze(1) * y.to(wide)).to(x.dtype)


def _check(op: str, x: Tensor, per_sample: dict[str, Tensor], y: Tensor | None = None) -> None:
    if x.dim() != 3:
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
        if not tensor.is_floating_point():
            raise UserError(f"{op}: {name} must be floating point, not {tensor.dtype}")
        if tensor.device != x.device:
            raise UserError(f"{op}: {name} is on {tensor.device}, x on {x.device}; move them to one device")
