"""The two halves of a long residual connection, under the published parameter names.

`skip_norms.{k}` holds the LayerNorm and `skip_linears.{k}.linear` the map, in separate lists of the model, whose
`reads()` says that the first uses the second's parameters.
"""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from dit_fast.nn.linear import initialised, linear_flops
from dit_fast.ops import RowStatistics, long_skip
from dit_fast.ops.long_skip import Folded
from dit_fast.ops.long_skip_node import fuses


def keep_folded(model: nn.Module, trained: Iterable[Tensor]) -> None:
    """Lets the long skips of these parameters keep their folded weights between steps (`dit_fast.ops.long_skip`)."""
    for parameters in foldable(model, trained):
        cast(Any, parameters[2]).folded = Folded(*parameters)


def foldable(model: nn.Module, trained: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Weight and bias of the norm, weight and bias of the map, of each long skip of these parameters."""
    known = {id(parameter) for parameter in trained}
    for module in model.modules():
        for reader, owner in getattr(module, "reads", list)():
            if isinstance(reader, SkipNorm) and isinstance(owner, SkipLinear):
                parameters = (reader.weight, reader.bias, owner.linear.weight, owner.linear.bias)
                if all(id(parameter) in known for parameter in parameters):
                    yield parameters


class SkipLinear(nn.Module):
    """Holds the linear map [..., 2D] to [..., D] of a long residual connection; `SkipNorm` applies it."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = initialised(nn.Linear(2 * hidden_size, hidden_size))  # without a shadow: the op folds the weight

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs of one sample, multiply-add = 2."""
        return linear_flops(self.linear, num_tokens)


class SkipNorm(nn.LayerNorm):
    """Affine LayerNorm over the concatenation [..., 2D], eps 1e-6; applies the whole fusion."""

    def __init__(self, hidden_size: int):
        super().__init__(2 * hidden_size, eps=1e-6)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        skip: Tensor,
        projection: SkipLinear,
        x_stats: RowStatistics | None = None,
        skip_stats: RowStatistics | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x, skip: [N, T, D], with their row statistics if known; returns what replaces x, [N, T, D], in out_dtype, by
        default that of the map."""
        parameters = (self.weight, self.bias, projection.linear.weight, projection.linear.bias)
        y = fuses(x, skip, parameters, self.eps, x_stats, skip_stats, out_dtype)
        if y is not None:
            return y
        return long_skip(x, skip, *parameters, self.eps, x_stats=x_stats, skip_stats=skip_stats, out_dtype=out_dtype)
