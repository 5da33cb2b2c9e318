"""The head: a modulated norm and a linear map to patches (DiT, arXiv 2212.09748, Sec. 3.2)."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from dit_fast.nn.linear import Reads, linear_flops, zero_linear
from dit_fast.nn.norm import NormKind, RMSNorm, folded, zero_modulation
from dit_fast.ops import RowStatistics, layer_norm_modulate
from dit_fast.ops.autocast import linear_dtype
from dit_fast.tree import Tree


class FinalLayer(nn.Module):
    """Tokens [N, T, D] and conditioning to patches [N, T, p * p * C], channel fastest; zero when newly made.

    Conditioning and the arguments norm and modulation (of two parts, shift and scale) are as in `Block`.

    class_token: width Z of a further output for the token that stands before the T patches (REG, arXiv 2507.01467); the
    result is then {"image": patches, "class_token": [N, Z]}.
    """

    def __init__(
        self,
        hidden_size: int,
        patch_size: int,
        out_channels: int,
        class_token: int = 0,
        norm: NormKind = "layer",
        modulation: Callable[[int, int], nn.Sequential] = zero_modulation,
    ):
        super().__init__()
        self.norm = norm
        self.norm_final = RMSNorm(hidden_size) if norm == "rms" else None
        self.linear = zero_linear(hidden_size, patch_size**2 * out_channels)
        if class_token:
            self.linear_cls = zero_linear(hidden_size, class_token)
        self.class_token = class_token
        self.adaLN_modulation = modulation(hidden_size, 2)

    def forward(
        self, x: Tensor, c: Tensor, stats: RowStatistics | None = None, modulation: Sequence[Tensor] | None = None
    ) -> Tree:
        """stats: row statistics of x, if known. modulation: as in `Block`."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1) if modulation is None else modulation
        scale, dtype = folded(self.norm_final, scale), linear_dtype(x, x.dtype)
        modulated = layer_norm_modulate(x, shift, scale, stats=stats, out_dtype=dtype, norm=self.norm)
        if not self.class_token:
            return self.linear(modulated)
        return {"image": self.linear(modulated[:, 1:]), "class_token": self.linear_cls(modulated[:, 0])}

    def reads(self) -> Reads:
        return [] if self.norm_final is None else [(self, self.norm_final)]

    def flops(self, num_patches: int, conditions: int = 1) -> int:
        """Forward FLOPs of one sample, multiply-add = 2. conditions: as in `Block`."""
        heads = linear_flops(self.linear, num_patches)
        if self.class_token:
            heads += linear_flops(self.linear_cls, rows=1)
        return heads + linear_flops(self.adaLN_modulation[-1], rows=conditions)
