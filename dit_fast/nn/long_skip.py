"""The two halves of a long residual connection, under the published parameter names.

`skip_norms.{k}` holds the LayerNorm and `skip_linears.{k}.linear` the map, in separate lists. The op needs the
parameters of both at once. Each module is therefore called, and calls the next inside its own forward: engines that
gather parameters when their owner is called (ZeRO-3) then hold all of them at that moment.
"""

from torch import Tensor, nn

from dit_fast.nn.linear import linear_flops
from dit_fast.ops import RowStatistics, long_skip


class SkipNorm(nn.LayerNorm):
    """Affine LayerNorm over the concatenation [..., 2D], eps 1e-6; applies the whole fusion."""

    def __init__(self, hidden_size: int):
        super().__init__(2 * hidden_size, eps=1e-6)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        skip: Tensor,
        projection: "SkipLinear",
        x_stats: RowStatistics | None = None,
        skip_stats: RowStatistics | None = None,
    ) -> Tensor:
        """x, skip: [N, T, D], with their row statistics if known; returns what replaces x, [N, T, D]."""
        return projection(x, skip, self.weight, self.bias, self.eps, x_stats, skip_stats)


class SkipLinear(nn.Module):
    """Linear map [..., 2D] to [..., D] of a long residual connection."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = _FusedLinear(2 * hidden_size, hidden_size)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(
        self,
        x: Tensor,
        skip: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        x_stats: RowStatistics | None = None,
        skip_stats: RowStatistics | None = None,
    ) -> Tensor:
        return self.linear(x, skip, norm_weight, norm_bias, eps, x_stats, skip_stats)

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs of one sample, multiply-add = 2."""
        return linear_flops(self.linear, num_tokens)


class _FusedLinear(nn.Linear):
    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        skip: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        x_stats: RowStatistics | None,
        skip_stats: RowStatistics | None,
    ) -> Tensor:
        parameters = (norm_weight, norm_bias, self.weight, self.bias)
        return long_skip(x, skip, *parameters, eps, x_stats=x_stats, skip_stats=skip_stats)
