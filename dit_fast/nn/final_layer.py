"""The head: a modulated LayerNorm and a linear map to patches (DiT, arXiv 2212.09748, Sec. 3.2)."""

from torch import Tensor, nn

from dit_fast.nn.linear import linear_flops, zero_linear
from dit_fast.ops import RowStatistics, layer_norm_modulate
from dit_fast.ops.autocast import linear_dtype
from dit_fast.tree import Tree


class FinalLayer(nn.Module):
    """Tokens [N, T, D] and conditioning [N, D] to patches [N, T, p * p * C], channel fastest; zero when newly made.

    class_token: width Z of a further output for the token that stands before the T patches (REG, arXiv 2507.01467); the
    result is then {"image": patches, "class_token": [N, Z]}.
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, class_token: int = 0):
        super().__init__()
        self.linear = zero_linear(hidden_size, patch_size**2 * out_channels)
        if class_token:
            self.linear_cls = zero_linear(hidden_size, class_token)
        self.class_token = class_token
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero_linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, stats: RowStatistics | None = None) -> Tree:
        """stats: row statistics of x, if known."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        modulated = layer_norm_modulate(x, shift, scale, stats=stats, out_dtype=linear_dtype(x, x.dtype))
        if not self.class_token:
            return self.linear(modulated)
        return {"image": self.linear(modulated[:, 1:]), "class_token": self.linear_cls(modulated[:, 0])}

    def flops(self, num_patches: int) -> int:
        """Forward FLOPs of one sample, multiply-add = 2."""
        heads = linear_flops(self.linear, num_patches)
        if self.class_token:
            heads += linear_flops(self.linear_cls, rows=1)
        return heads + linear_flops(self.adaLN_modulation[1], rows=1)
