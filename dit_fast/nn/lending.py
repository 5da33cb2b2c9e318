"""Layers that can hand their parameters to an op which needs those of several layers at once.

Engines that gather parameters when their owner is called (ZeRO-3) hold a layer's parameters inside its forward and
nowhere else. So a layer is called with what to do, and does it there; that may call the next layer the same way.
Called without, a layer is the plain one.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Use = Callable[[Tensor, Tensor, Tensor], Any]  # (x, weight, bias) -> result


class LendingLinear(nn.Linear):
    def forward(self, x: Tensor, use: Use | None = None) -> Any:
        """linear(x), or use(x, weight, bias)."""
        return super().forward(x) if use is None else use(x, self.weight, self.bias)


class LendingNorm(nn.LayerNorm):
    def forward(self, x: Tensor, use: Use | None = None) -> Any:
        """layer_norm(x), or use(x, weight, bias)."""
        return super().forward(x) if use is None else use(x, self.weight, self.bias)
