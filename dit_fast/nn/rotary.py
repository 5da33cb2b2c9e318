"""Rotary positions in two dimensions (RoPE, arXiv 2104.09864): tables of angles, by which the op `qk_norm` turns.

Channels 2i and 2i + 1 of a head form a pair that turns by the angle position * frequency.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_fast.errors import ConfigError

Rotary = tuple[Tensor, Tensor]  # cosines and sines [T, d]
BASE = 10000.0
DDT_EXTENT = 16.0  # where the last row and the last column lie, whatever the grid


class RotaryTables(nn.Module):
    """Tables that `make` computes, as buffers under LightningDiT's names.

    persistent=False: no state_dict holds them, so that they have their values at once, on the meta device too.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, make: Callable[[], Rotary], persistent: bool = True):
        super().__init__()
        with torch.device(torch.get_default_device() if persistent else "cpu"):
            tables = make()
        for name, table in zip(("freqs_cos", "freqs_sin"), tables, strict=True):
            self.register_buffer(name, table, persistent)

    def forward(self) -> Rotary:
        return self.freqs_cos, self.freqs_sin


def axial_rotary(head_width: int, grid: tuple[int, int], leading: int = 0) -> Rotary:
    """Tables float32 [leading + h * w, d] for a grid (h, w) of tokens, row-major (LightningDiT, arXiv 2501.01423; JiT).

    The first half of the channels turns with the row, the second with the column, by p * 10000 ** (-2i / (d/2)), p from
    0, i = 0 .. d/4 - 1. leading: so many tokens before the patches are not turned. Computed in float64.
    Raises ConfigError if the width is not a multiple of 4.
    """
    frequencies = BASE ** (-torch.arange(_quarter(head_width), dtype=torch.float64) / (head_width // 4))
    rows, columns = (torch.arange(size, dtype=torch.float64)[:, None] * frequencies for size in grid)
    angles = torch.cat([rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)], dim=2)
    return _tables(F.pad(angles.flatten(0, 1), (0, 0, leading, 0)))


def interleaved_rotary(head_width: int, grid: tuple[int, int]) -> Rotary:
    """Tables float32 [h * w, d] for a grid (h, w) of tokens, row-major (DDT, arXiv 2504.05741).

    Even pairs turn with the column, odd ones with the row: pairs 2i and 2i + 1 by p * 10000 ** (-4i / d), i = 0 ..
    d/4 - 1, where the positions p are spaced evenly from 0 to 16 on either axis. Computed in float64.
    Raises ConfigError if the width is not a multiple of 4.
    """
    frequencies = BASE ** (-torch.arange(_quarter(head_width), dtype=torch.float64) / (head_width // 4))
    rows, columns = (torch.linspace(0, DDT_EXTENT, n, dtype=torch.float64)[:, None] * frequencies for n in grid)
    pair = torch.stack([columns[None].expand(grid[0], -1, -1), rows[:, None].expand(-1, grid[1], -1)], dim=3)
    return _tables(pair.flatten(2).flatten(0, 1))


def _quarter(head_width: int) -> int:
    if head_width % 4:
        raise ConfigError(f"heads of width {head_width}: rotary positions need a multiple of 4; change num_heads")
    return head_width // 4


def _tables(angles: Tensor) -> Rotary:
    """One angle for each pair, [T, d/2], as cosines and sines of each channel."""
    both = angles.repeat_interleave(2, dim=1)
    return both.cos().float(), both.sin().float()
