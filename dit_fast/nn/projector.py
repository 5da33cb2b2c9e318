"""Heads on a block's features: to those of an encoder (REPA, arXiv 2410.06940), of a block (SRA), or to patches."""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from dit_fast.nn.linear import xavier_linear


def projector(hidden_size: int, width: int, out_features: int, layers: int = 3) -> nn.Sequential:
    """[..., hidden_size] to [..., out_features] through `layers` linear maps, SiLU between, `width` in the middle."""
    widths = [hidden_size, *[width] * (layers - 1), out_features]
    maps = [xavier_linear(before, after) for before, after in pairwise(widths)]
    return nn.Sequential(maps[0], *(module for after in maps[1:] for module in (nn.SiLU(), after)))


class ConvProjector(nn.Module):
    """iREPA's (arXiv 2512.10794): tokens [N, T, hidden_size] to [N, T, out_features] by a convolution over their grid.

    grid: rows and columns of the tokens. kernel: its side, odd; the border is padded with zeros.
    """

    def __init__(self, hidden_size: int, out_features: int, grid: tuple[int, int], kernel: int = 3):
        super().__init__()
        self.grid = grid
        self.projection_layer = nn.Conv2d(hidden_size, out_features, kernel, padding=kernel // 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.projection_layer(tokens.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2)


class SelfProjector(nn.Module):
    """SRA's (arXiv 2505.02831): [..., width] to the same through a hidden layer of twice the width, SiLU between."""

    def __init__(self, width: int):
        super().__init__()
        self.linear1 = xavier_linear(width, 2 * width)
        self.linear2 = xavier_linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.silu(self.linear1(x)))


class LatentHead(nn.Module):
    """Tokens [N, T, D] to patches [N, T, size]: a LayerNorm without parameters and a linear layer.

    Source: stage 1 of Self-Transcendence (arXiv 2601.07773), behind a `projector`.
    """

    def __init__(self, hidden_size: int, size: int):
        super().__init__()
        self.linear = xavier_linear(hidden_size, size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6))
