"""RMSNorm and the modulation by a condition (adaLN)."""

from typing import Literal

import torch
from torch import Tensor, nn

from dit_fast.nn.linear import zero_linear
from dit_fast.ops.layer_norm import rms_norm

NormKind = Literal["layer", "rms"]  # LayerNorm, or RMSNorm with a weight
EPS = 1e-6


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + 1e-6)` over the last dimension, times a weight (arXiv 1910.07467); fp32 inside."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width], in x's dtype; rounded once."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x.to(wide), EPS, self.weight.to(wide)).to(x.dtype)


def folded(norm: RMSNorm | None, scale: Tensor) -> Tensor:
    """The scale for the ops, whose norm has no weight: w (1 + scale) - 1, in at least fp32; None has none."""
    if norm is None:
        return scale
    wide = torch.promote_types(scale.dtype, torch.float32)
    weight = norm.weight.to(wide)
    return (weight - 1) + weight * scale.to(wide)


def zero_modulation(hidden_size: int, parts: int) -> nn.Sequential:
    """Conditioning [..., D] to `parts` vectors of that width side by side, through a SiLU; zero when newly made."""
    return nn.Sequential(nn.SiLU(), zero_linear(hidden_size, parts * hidden_size))
