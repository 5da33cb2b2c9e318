"""The vision transformer of pretrained encoders, with the parameter names that DINO, DINOv2, MAE and timm give it.

Tokens are the class token, if there is one, then registers, then patches row by row. All blocks are pre-norm.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QueryKey = tuple[Tensor, Tensor]  # [N, H, T, d] each


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one network. patch: pixels a side. grid: tokens a side of the stored position embedding. hidden: width inside
    the MLP. registers: number of further tokens. norm, pre_norm: whether a LayerNorm follows the last block, or
    precedes the first (the patches then have no bias). layer_scale: whether branches are scaled by channel. swiglu:
    SiLU gate in place of GELU. quick_gelu: x sigmoid(1.702 x) in place of GELU. eps: of every LayerNorm.
    """

    width: int
    depth: int
    heads: int
    patch: int
    grid: int
    hidden: int
    class_token: bool = True
    registers: int = 0
    norm: bool = True
    pre_norm: bool = False
    layer_scale: bool = False
    swiglu: bool = False
    quick_gelu: bool = False
    eps: float = 1e-6


class ViT(nn.Module):
    """`forward(x)`: pixels [N, 3, S, S], S a multiple of the patch, to tokens [N, 1 + registers + (S/patch)^2, width].

    Its position embedding is that of the patches alone (the class token's is in the token). For another grid than the
    stored one it is resampled (bicubic, antialiased, in float32), as REPA's trainer does for every encoder.
    """

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        self.prefix = sizes.class_token + sizes.registers
        width = sizes.width
        if sizes.class_token:
            self.cls_token = _empty(1, 1, width)
        if sizes.registers:
            self.register_tokens = _empty(1, sizes.registers, width)
        self.pos_embed = _empty(1, sizes.grid**2, width)
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, width, sizes.patch, sizes.patch, bias=not sizes.pre_norm)}
        )
        self.norm_pre = nn.LayerNorm(width, sizes.eps) if sizes.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(_Block(sizes) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(width, sizes.eps) if sizes.norm else nn.Identity()

    def forward(
        self, x: Tensor, layers: Collection[int] = (), stop: int | None = None
    ) -> tuple[Tensor, dict[int, QueryKey]]:
        """Tokens after the norm, and queries and keys of `layers` (from 0).

        stop: no more of the network runs than the queries and keys of this block; the tokens are then its input.
        """
        tokens = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        tokens = tokens + self._positions(x.shape[-1] // self.sizes.patch)
        ahead = [self.cls_token] if self.sizes.class_token else []
        if self.sizes.registers:
            ahead.append(self.register_tokens)
        tokens = self.norm_pre(torch.cat([*(each.expand(len(x), -1, -1) for each in ahead), tokens], 1))
        seen: dict[int, QueryKey] = {}
        for index in range(len(self.blocks)):
            block = cast(_Block, self.blocks[index])
            query, key, value = block.heads(tokens)
            if index in layers:
                seen[index] = query, key
            if index == stop:
                return tokens, seen
            tokens = block(tokens, query, key, value)
        return self.norm(tokens), seen

    def _positions(self, grid: int) -> Tensor:
        if grid == self.sizes.grid:
            return self.pos_embed
        maps = self.pos_embed.float().unflatten(1, (self.sizes.grid, self.sizes.grid)).permute(0, 3, 1, 2)
        resampled = F.interpolate(maps, (grid, grid), mode="bicubic", antialias=True)
        return resampled.flatten(2).transpose(1, 2)


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32))


class _Scale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = _empty(width)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.width
        self.num_heads = sizes.heads
        self.norm1 = nn.LayerNorm(width, sizes.eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.ls1 = _Scale(width) if sizes.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, sizes.eps)
        self.mlp = _MLP(sizes)
        self.ls2 = _Scale(width) if sizes.layer_scale else nn.Identity()

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """query, key, value [N, H, T, d] of the block's input."""
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.ls1(self.attn["proj"](mixed))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _MLP(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.swiglu, self.quick = sizes.swiglu, sizes.quick_gelu
        self.fc1 = nn.Linear(sizes.width, sizes.hidden * (1 + sizes.swiglu))
        self.fc2 = nn.Linear(sizes.hidden, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.swiglu:
            gate, value = x.chunk(2, -1)
            return self.fc2(F.silu(gate) * value)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


def side(count: int) -> int | None:
    """The side of a square of so many tokens, None where they make none."""
    root = math.isqrt(count)
    return root if root * root == count else None
