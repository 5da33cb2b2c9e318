"""Embeddings of patches, positions, time and class label."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from dit_fast.errors import ConfigError, UserError
from dit_fast.nn.linear import linear_flops

TIME_FREQUENCIES = 256


def sincos_position_embedding(hidden_size: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine positions, float32 [1, h * w, hidden_size] for a grid (h, w) of tokens, row-major.

    The first half of the channels encodes the column, the second half the row; each half is sin, then cos, of
    `p * 10000 ** (-k / (D / 4))`, k = 0 .. D/4 - 1. Computed in float64 (DiT, arXiv 2212.09748; ViT's scheme).
    Raises ConfigError if hidden_size is not a multiple of 4.
    """
    if hidden_size % 4:
        raise ConfigError(f"hidden_size {hidden_size} must be a multiple of 4 (2-D sine-cosine positions)")
    quarter = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(max(grid), dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = line[None, : grid[1]].expand(grid[0], -1, -1)
    rows = line[: grid[0], None].expand(-1, grid[1], -1)
    return torch.cat([columns, rows], dim=2).reshape(1, -1, hidden_size).float()


def patches(x: Tensor, size: int) -> Tensor:
    """The patches of x [N, C, H, W], [N, T, p * p * C], row by row, channel fastest, as a head gives them; p = size.

    Raises UserError where they do not cover x.
    """
    if x.dim() != 4 or size < 1 or x.shape[2] % size or x.shape[3] % size:
        raise UserError(f"patches of {size} x {size} do not cover {list(x.shape)}, which must be [N, C, H, W]")
    rows = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [N, C, rows, p, columns, p]
    return rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class PatchEmbed(nn.Module):
    """Latents [N, C, H, W] to tokens [N, (H/p)(W/p), D], row-major, by a convolution whose stride is its kernel."""

    def __init__(self, in_channels: int, patch_size: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(hidden_size, -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs of one sample, multiply-add = 2."""
        return 2 * num_tokens * self.proj.in_channels * self.proj.kernel_size[0] ** 2 * self.proj.out_channels


class BottleneckPatchEmbed(nn.Module):
    """As `PatchEmbed`, through a narrower layer: a convolution to `bottleneck` channels without bias, and a linear map
    of each patch, held as a 1 x 1 convolution (JiT, arXiv 2511.13720).
    """

    def __init__(self, in_channels: int, patch_size: int, bottleneck: int, hidden_size: int):
        super().__init__()
        self.proj1 = nn.Conv2d(in_channels, bottleneck, kernel_size=patch_size, stride=patch_size, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, hidden_size, kernel_size=1)
        for layer in (self.proj1, self.proj2):
            nn.init.xavier_uniform_(layer.weight.view(layer.out_channels, -1))
        nn.init.zeros_(self.proj2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2)

    def flops(self, num_tokens: int) -> int:
        """Forward FLOPs of one sample, multiply-add = 2."""
        width = self.proj1.in_channels * self.proj1.kernel_size[0] ** 2 + self.proj2.out_channels
        return 2 * num_tokens * self.proj1.out_channels * width


class TimestepEmbedder(nn.Module):
    """Time t [N], fed as it is, to a vector [N, D]: 256 cosines and sines, then Linear, SiLU, Linear.

    base: ratio of the largest to (nearly) the smallest frequency.
    """

    def __init__(self, hidden_size: int, base: float = 10000.0):
        super().__init__()
        self.base = base
        first, second = nn.Linear(TIME_FREQUENCIES, hidden_size), nn.Linear(hidden_size, hidden_size)
        for layer in (first, second):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    @staticmethod
    def frequencies(t: Tensor, base: float = 10000.0) -> Tensor:
        """[N] to [N, 256]: `cos(t f_k)`, then `sin(t f_k)`, f_k = base ** (-k / 128) rounded to fp32.

        Returns at least fp32 (fp64 for fp64 t), whatever the model's dtype: half precision cannot hold the phases.
        """
        half = TIME_FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        wide = torch.promote_types(t.dtype, torch.float32)
        angles = t.to(wide)[:, None] * torch.exp(-math.log(base) * steps / half).to(wide)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.frequencies(t, self.base).to(cast(nn.Linear, self.mlp[0]).weight.dtype))

    def flops(self) -> int:
        """Forward FLOPs of one sample, multiply-add = 2."""
        return linear_flops(self.mlp[0], rows=1) + linear_flops(self.mlp[2], rows=1)


class LabelEmbedder(nn.Module):
    """Class label [N] to a vector [N, D]; a further row of the table is the null label of classifier-free guidance.

    null_row=False: there is no such row.
    """

    def __init__(self, num_classes: int, hidden_size: int, null_row: bool = True):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_row, hidden_size)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)
