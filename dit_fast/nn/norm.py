"""Norms and what adaLN makes of them: the modulated norm of the tokens, and the gated residual before it."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_fast.nn.linear import zero_linear
from dit_fast.ops import RowStatistics, gate_residual, gate_residual_modulate, layer_norm_modulate

NormKind = Literal["layer", "rms"]  # LayerNorm, or RMSNorm with a weight
EPS = 1e-6


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + 1e-6)` over the last dimension, times a weight (arXiv 1910.07467); fp32 inside."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width], in x's dtype; rounded once."""
        return (_unit(_wide(x), self) * self.weight.to(_wide(x).dtype)).to(x.dtype)


def zero_modulation(hidden_size: int, parts: int) -> nn.Sequential:
    """Conditioning [..., D] to `parts` vectors of that width side by side, through a SiLU; zero when newly made."""
    return nn.Sequential(nn.SiLU(), zero_linear(hidden_size, parts * hidden_size))


def modulate(
    x: Tensor,
    norm: RMSNorm | None,
    shift: Tensor | None,
    scale: Tensor,
    stats: RowStatistics | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`norm(x) * (1 + scale) + shift`, [N, T, D] in out_dtype, by default x's.

    norm: None is LayerNorm without parameters. shift (None: none), scale: [N, D], or [N, T, D], one for each token.
    stats: row statistics of x, if known.
    """
    if norm is None and shift is not None and scale.dim() == 2:
        return layer_norm_modulate(x, shift, scale, stats=stats, out_dtype=out_dtype)
    wide = _wide(x)
    factor = 1 + scale.to(wide.dtype)
    if norm is not None:
        factor = factor * norm.weight.to(wide.dtype)
    result = _unit(wide, norm) * _per_token(factor)
    if shift is not None:
        result = result + _per_token(shift.to(wide.dtype))
    return result.to(out_dtype or x.dtype)


def residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x + gate * y`, [N, T, D] in x's dtype; gate [N, D], or [N, T, D]."""
    if gate.dim() == 2:
        return gate_residual(x, y, gate)
    wide = _wide(x)
    return (wide + gate.to(wide.dtype) * y.to(wide.dtype)).to(x.dtype)


def residual_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    norm: RMSNorm | None,
    shift: Tensor | None,
    scale: Tensor,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`x + gate * y`, and that modulated; arguments as above."""
    if norm is None and shift is not None and scale.dim() == 2:
        return gate_residual_modulate(x, y, gate, shift, scale, out_dtype=out_dtype)
    x = residual(x, y, gate)
    return x, modulate(x, norm, shift, scale, out_dtype=out_dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(x: Tensor, norm: RMSNorm | None) -> Tensor:
    if norm is None:
        return F.layer_norm(x, x.shape[-1:], eps=EPS)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def _per_token(vectors: Tensor) -> Tensor:
    return vectors.unsqueeze(1) if vectors.dim() == 2 else vectors
