"""The transformer block with adaLN-Zero conditioning (DiT, arXiv 2212.09748, Sec. 3.2)."""

from torch import Tensor, nn

from dit_fast.nn.attention import Attention, AttentionKind
from dit_fast.nn.linear import linear_flops, zero_linear
from dit_fast.nn.mlp import Mlp
from dit_fast.ops import RowStatistics, gate_residual, gate_residual_modulate, layer_norm_modulate
from dit_fast.ops.adaln import returns_statistics
from dit_fast.ops.autocast import linear_dtype


class Block(nn.Module):
    """Attention and MLP, each behind a modulated LayerNorm and a gate; the identity when newly made.

    x: tokens [N, T, D]; c: conditioning [N, D]. The six parts of the modulation are, in order, shift, scale and gate of
    the attention branch and shift, scale and gate of the MLP branch.
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False, attention: AttentionKind = "auto"):
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, qk_norm, attention)
        self.mlp = Mlp(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero_linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, stats: RowStatistics | None = None) -> tuple[Tensor, RowStatistics | None]:
        """The tokens that replace x, with their row statistics where those come free. stats: of x, if known."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        dtype = linear_dtype(x, x.dtype)
        attended = self.attn(layer_norm_modulate(x, shift_a, scale_a, stats=stats, out_dtype=dtype))
        x, modulated = gate_residual_modulate(x, attended, gate_a, shift_m, scale_m, out_dtype=dtype)
        mixed = self.mlp(modulated)
        if returns_statistics(x):
            return gate_residual(x, mixed, gate_m, return_stats=True)
        return gate_residual(x, mixed, gate_m), None

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs of one sample, multiply-add = 2."""
        modulation = linear_flops(self.adaLN_modulation[1], rows=1)
        return self.attn.flops(num_tokens) + self.mlp.flops(num_tokens) + modulation
