"""Linear layers with the initial values of the DiT family (arXiv 2212.09748), and what they cost."""

from typing import cast

from torch import nn


def xavier_linear(in_features: int, out_features: int, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """Xavier-uniform weight, zero bias. kind: the class to make it of."""
    layer = kind(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def linear_flops(layer: nn.Module, rows: int) -> int:
    """Forward FLOPs for `rows` input vectors, multiply-add = 2. Counts by widths: engines may hold no weight here."""
    linear = cast(nn.Linear, layer)
    return 2 * rows * linear.in_features * linear.out_features


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """Zero weight and bias: what it feeds starts as if it were absent."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
