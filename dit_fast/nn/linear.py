"""Linear layers with the initial values of the DiT family (arXiv 2212.09748), and what they cost."""

from collections.abc import Iterable
from typing import cast

from torch import nn

# What a module's `reads()` gives: (reader, owner) where the reader's forward uses the owner's parameters, not its call.
# Engines that hold parameters only while their owner runs (ZeRO-3) need to know.
Reads = Iterable[tuple[nn.Module, nn.Module]]


def xavier_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """Xavier-uniform weight, zero bias."""
    layer = nn.Linear(in_features, out_features, bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
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
