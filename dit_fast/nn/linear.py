"""Linear layers with the initial values of the DiT family (arXiv 2212.09748), their shadows, and what they cost."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dit_fast.ops.linear import linear, shadows_written

# What a module's `reads()` gives: (reader, owner) where the reader's forward uses the owner's parameters, not its call.
# Engines that hold parameters only while their owner runs (ZeRO-3) need to know.
Reads = Iterable[tuple[nn.Module, nn.Module]]


class Linear(nn.Linear):
    """torch's, which reads its parameters' shadows where there are some (`dit_fast.ops.linear`)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def make_shadows(model: nn.Module, trained: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Gives linear layers' trained parameters their shadows for autocast to bfloat16; (shadow, parameter) of each.

    To be called when the parameters are in place. Those of the layers of `model.side_by_side()`, where the model has
    that, lie in one buffer, the others each in its own.
    """
    known = {id(parameter) for parameter in trained}
    joined: Sequence[nn.Linear] = getattr(model, "side_by_side", list)()
    found: list[tuple[Tensor, Tensor]] = []
    if all(id(parameter) in known for layer in joined for parameter in (layer.weight, layer.bias)):
        for parameters in ([layer.weight for layer in joined], [layer.bias for layer in joined]) if joined else ():
            copies = torch.cat([parameter.detach() for parameter in parameters]).bfloat16()
            found += zip(copies.split([len(parameter) for parameter in parameters]), parameters, strict=True)
            known -= {id(parameter) for parameter in parameters}
    for layer in model.modules():
        if isinstance(layer, Linear):
            own = [parameter for parameter in (layer.weight, layer.bias) if id(parameter) in known]
            found += [(parameter.detach().bfloat16(), parameter) for parameter in own]
    for shadow, parameter in found:
        cast(Any, parameter).shadow = shadow
    shadows_written(parameter for _, parameter in found)
    return found


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
