"""Linear layers with the initial values of the DiT family (arXiv 2212.09748), and what they cost.

An engine may keep a weight's shadow: its copy in autocast's dtype, `weight.shadow`, which the optimizer writes with the
weight. Layers then read it where autocast would make that copy anew in every step; values and gradients are the same.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_fast.ops.autocast import autocast_dtype

# What a module's `reads()` gives: (reader, owner) where the reader's forward uses the owner's parameters, not its call.
# Engines that hold parameters only while their owner runs (ZeRO-3) need to know.
Reads = Iterable[tuple[nn.Module, nn.Module]]


class Linear(nn.Linear):
    """torch's, which reads the weight's shadow where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, shadow_of(self.weight, x), self.bias)


def shadow_of(weight: Tensor, x: Tensor) -> Tensor:
    """What a product of x with the weight reads: its shadow, through which gradients reach it, or the weight."""
    shadow = getattr(weight, "shadow", None)
    if shadow is None or autocast_dtype(x) is not shadow.dtype or torch._C._are_functorch_transforms_active():
        return weight
    return _Shadow.apply(weight, shadow) if torch.is_grad_enabled() else shadow


class _Shadow(torch.autograd.Function):
    """(weight, shadow) -> the shadow, with the gradient of the weight's cast."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shadow: Tensor) -> Tensor:
        return shadow.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.float(), None


def xavier_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """Xavier-uniform weight, zero bias."""
    return initialised(Linear(in_features, out_features, bias))


def initialised(layer: nn.Linear) -> nn.Linear:
    """The layer with Xavier-uniform weight and zero bias."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def linear_flops(layer: nn.Module, rows: int) -> int:
    """Forward FLOPs for `rows` input vectors, multiply-add = 2. Counts by widths: engines may hold no weight here."""
    linear = cast(nn.Linear, layer)
    return 2 * rows * linear.in_features * linear.out_features


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """Zero weight and bias: what it feeds starts as if it were absent."""
    layer = Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
