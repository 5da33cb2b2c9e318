"""The head: a modulated LayerNorm and a linear map to patches (DiT, arXiv 2212.09748, Sec. 3.2)."""

from torch import Tensor, nn

from dit_fast.nn.linear import linear_flops, zero_linear
from dit_fast.nn.row_statistics import linear_dtype
from dit_fast.ops import RowStatistics, layer_norm_modulate


class FinalLayer(nn.Module):
    """Tokens [N, T, D] and conditioning [N, D] to patches [N, T, p * p * C], channel fastest; zero when newly made."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.linear = zero_linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero_linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, stats: RowStatistics | None = None) -> Tensor:
        """stats: row statistics of x, if known."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(layer_norm_modulate(x, shift, scale, stats=stats, out_dtype=linear_dtype(x)))

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs of one sample, multiply-add = 2."""
        return linear_flops(self.linear, num_tokens) + linear_flops(self.adaLN_modulation[1], rows=1)
