"""The transformer block with adaLN-Zero conditioning (DiT, arXiv 2212.09748, Sec. 3.2)."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dit_fast import _C
from dit_fast.nn.attention import Attention, AttentionKind, Heads
from dit_fast.nn.linear import Linear, Reads, linear_flops
from dit_fast.nn.mlp import Mlp
from dit_fast.nn.norm import NormKind, RMSNorm, folded, zero_modulation
from dit_fast.nn.rotary import Rotary
from dit_fast.ops import RowStatistics, branches, gate_residual, gate_residual_modulate, layer_norm_modulate
from dit_fast.ops.adaln import returns_statistics
from dit_fast.ops.autocast import linear_dtype
from dit_fast.ops.linear import renew_shadows


class Block(nn.Module):
    """Attention and MLP, each behind a modulated norm and a gate; the identity when newly made.

    x: tokens [N, T, D]; c: conditioning [N, D], or [N, T, D], one vector for each token. The six parts of the
    modulation are, in order, shift, scale and gate of the attention branch and shift, scale and gate of the MLP branch.
    norm: before both branches, LayerNorm without parameters, or RMSNorm with a weight. shift: False leaves four parts,
    without the shifts. mlp, modulation: what makes these modules, of the width, and of the width and number of parts.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        qk_norm: bool = False,
        attention: AttentionKind = "auto",
        norm: NormKind = "layer",
        mlp: Callable[[int], nn.Module] = Mlp,
        shift: bool = True,
        qkv_bias: bool = True,
        modulation: Callable[[int, int], nn.Sequential] = zero_modulation,
    ):
        super().__init__()
        self.norm, self.shift = norm, shift
        self.norm1 = RMSNorm(hidden_size) if norm == "rms" else None
        self.norm2 = RMSNorm(hidden_size) if norm == "rms" else None
        self.attn = Attention(hidden_size, num_heads, qk_norm, attention, norm, qkv_bias)
        self.mlp = mlp(hidden_size)
        self.adaLN_modulation = modulation(hidden_size, 6 if shift else 4)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        stats: RowStatistics | None = None,
        rotary: Rotary | None = None,
        heads: bool = False,
        modulation: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, RowStatistics | None] | tuple[Tensor, RowStatistics | None, Heads]:
        """The tokens that replace x, with their row statistics where those come free.

        stats: of x, if known. rotary: tables that turn queries and keys. heads: whether those are returned too.
        modulation: the parts of what `adaLN_modulation` makes of c, if known.
        """
        shift_a = shift_m = None
        if modulation is None:
            modulation = self.adaLN_modulation(c).chunk(6 if self.shift else 4, dim=-1)
        if self.shift:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        else:
            scale_a, gate_a, scale_m, gate_m = modulation
        parts = (shift_a, folded(self.norm1, scale_a), gate_a, shift_m, folded(self.norm2, scale_m), gate_m)
        layers = self._layers()
        plan = None if layers is None else branches.plan(x, parts, layers, self.norm)
        if plan is None or layers is None:
            return self._op_by_op(x, parts, stats, rotary, heads)
        attn, home = self.attn, branches.home_of(plan, modulation, parts)
        after = home and (home[0], home[1] + 1 + self.shift)
        # Taken apart inside of the node, but where the CPU's own attention takes the projection as it is.
        if attn.is_plain(rotary) and (x.device.type != "cpu" or _C.unavailable()):
            x, query, key, value = branches.reads(plan, x, *parts[:2], stats, layers[0], attn.num_heads, home)
            attended, kept = attn.mixed(query, key, value), Heads(query, key) if heads else None
        else:
            x, qkv = branches.reads(plan, x, *parts[:2], stats, layers[0], 0, home)
            attended, kept = attn.attended(qkv, rotary, heads)
        x, *measured = branches.joins(plan, x, attended, *parts[2:], *layers[1:], home=after)
        return x, RowStatistics(*measured), *(() if kept is None else (kept,))

    def _op_by_op(
        self, x: Tensor, parts: Sequence[Any], stats: RowStatistics | None, rotary: Rotary | None, heads: bool
    ) -> tuple[Tensor, RowStatistics | None] | tuple[Tensor, RowStatistics | None, Heads]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        dtype = linear_dtype(x, x.dtype)
        x, modulated = layer_norm_modulate(
            x, shift_a, scale_a, stats=stats, out_dtype=dtype, norm=self.norm, return_x=True
        )
        attended, *kept = self.attn(modulated, rotary, heads=True) if heads else (self.attn(modulated, rotary),)
        x, modulated = gate_residual_modulate(x, attended, gate_a, shift_m, scale_m, out_dtype=dtype, norm=self.norm)
        mixed = self.mlp(modulated)
        if gate_m.dim() == 2 and returns_statistics(x):
            return *gate_residual(x, mixed, gate_m, return_stats=True), *kept
        return gate_residual(x, mixed, gate_m), None, *kept

    def _layers(self) -> list[branches.Layer] | None:
        """Those that `branches` reads in the place of their modules; None where a module is another one, has no shadow,
        or where something hangs on its call."""
        if torch.compiler.is_compiling():
            return None
        attn, mlp = self._modules["attn"], self._modules["mlp"]
        if type(attn) is not Attention or type(mlp) is not Mlp or _has_any_global_hook():
            return None
        found = []
        inner = attn._modules, mlp._modules
        for module in (inner[0]["qkv"], inner[0]["proj"], inner[1]["fc1"], inner[1]["fc2"]):
            if type(module) is not Linear or _hangs_on(module):
                return None
            weight, bias = module._parameters["weight"], module._parameters["bias"]
            shadow, bias_shadow = getattr(weight, "shadow", None), getattr(bias, "shadow", None)
            if weight is None or bias is None or shadow is None or bias_shadow is None:
                return None
            if shadow.of_version != weight._version or bias_shadow.of_version != bias._version:
                renew_shadows((weight, bias))
            found.append(branches.Layer(weight, bias, shadow, bias_shadow))
        return None if _hangs_on(attn) or _hangs_on(mlp) else found

    def reads(self) -> Reads:
        return [(self, norm) for norm in (self.norm1, self.norm2) if norm is not None]

    def flops(self, num_tokens: int, conditions: int = 1) -> int:
        """Forward FLOPs of one sample, multiply-add = 2. conditions: vectors that modulate it, 1 or one per token."""
        modulation = linear_flops(self.adaLN_modulation[-1], rows=conditions)
        return self.attn.flops(num_tokens) + cast(Any, self.mlp).flops(num_tokens) + modulation


def _hangs_on(module: nn.Module) -> bool:
    """Whether a module's call does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
