"""Shared by the long skip's two GEMMs: block sizes per GPU family, the order of tiles, how a program loads a tile."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import tuning
from dit_fast.kernels.rows import TYPES

GROUP = 8  # row tiles that pass over all column tiles together, so that both operands are found in L2


class Tiles(NamedTuple):
    """Blocks and launch options. None of them changes what is computed; block_k orders a sum."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return f"{self.block_m}x{self.block_n}"


# (GPU family, dtypes, rows). No width: 128 columns divide 768, 1024 and 1152, and any other width loses part of one
# tile. "float32 out": the backward's epilogue reads and writes float32, which spilled with 128 rows on sm_80. "few":
# tiles of 128 rows would leave multiprocessors idle.
CONFIGS = {
    (90, "16-bit", "many"): Tiles(128, 128, 64, 8, 4),
    (90, "16-bit", "few"): Tiles(64, 128, 64, 4, 4),
    (90, "16-bit, float32 out", "many"): Tiles(128, 128, 64, 8, 4),
    (90, "16-bit, float32 out", "few"): Tiles(128, 128, 64, 8, 4),
    (80, "16-bit, float32 out", "many"): Tiles(64, 128, 32, 8, 4),
    (80, "16-bit, float32 out", "few"): Tiles(64, 128, 32, 8, 4),
    (80, "16-bit", "many"): Tiles(128, 128, 32, 8, 4),
    (80, "16-bit", "few"): Tiles(64, 128, 32, 8, 4),
}
# Further ones for tuned tables (tuning.py), by part. The backward has no registers left for larger tiles.
CANDIDATES: dict[tuple[int, str, str], tuple[Tiles, ...]] = {
    (90, "forward", "16-bit"): (Tiles(128, 256, 64, 8, 3), Tiles(64, 256, 64, 8, 3)),
    (80, "forward", "16-bit"): (Tiles(128, 256, 32, 8, 3), Tiles(64, 256, 32, 8, 3)),
}


@triton.jit
def tile_place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a tile: down GROUP rows, then to the next column."""
    group = tile // (GROUP * column_tiles)
    first = group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = tile - first * column_tiles
    return first + within % height, within // height


@triton.jit
def load_tile(source, stride, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              BULK: tl.constexpr):  # fmt: skip
    """source[row : row + ROWS, column : column + COLUMNS], zero outside of [rows, columns]."""
    if BULK:
        tile = source.load([row, column])
    else:
        i = row + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        place = source + i.to(tl.int64)[:, None] * stride + j[None, :]
        inside = (i < rows)[:, None] & (j < columns)[None, :]
        tile = tl.load(tl.multiple_of(place, [16, 16]), mask=inside, other=0.0)
    return tile


def family(device: torch.device) -> int:
    """90 where bulk copies exist and a block can have the shared memory that their tiles take (sm_120 has 99 KB), else
    80. Interpreted, 90: the interpreter is faster on descriptors."""
    if device.type == "cuda":
        gpu: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the last of these
        return 90 if gpu.major >= 9 and gpu.shared_memory_per_block_optin >= 128 << 10 else 80
    return 90 if triton.knobs.runtime.interpret else 80


def processors(device: torch.device) -> int:
    """Multiprocessors, one persistent program each; a few where there is no GPU, so that a program takes many tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def tiles_for(part: str, kind: str, x: Tensor, skip: Tensor, compute: torch.dtype, halves: int) -> Tiles:
    """Of the GEMM of `part` ("forward", "backward") of rows x, skip [M, D], whose result is `halves` times D wide."""
    (rows, width), device = x.shape, x.device
    arch, streams = family(device), {TYPES[half.dtype] for half in (x, skip)}
    tuned = tuning.tuned(
        f"long_skip {part}", device, rows, configurations(arch, part, kind), width=width,
        stream="fp32" if "fp32" in streams else "+".join(sorted(streams)), compute=TYPES[compute],
    )  # fmt: skip
    tiles = triton.cdiv(rows, 128) * triton.cdiv(halves * width, 128)
    return tuned or CONFIGS[arch, kind, "many" if tiles >= processors(device) else "few"]


def configurations(arch: int, part: str, kind: str) -> tuple[Tiles, ...]:
    """All that are compiled for a part and kind; any two give the same bits."""
    usual = (CONFIGS[arch, kind, rows] for rows in ("many", "few"))
    return tuple(dict.fromkeys((*usual, *CANDIDATES.get((arch, part, kind), ()))))


def operand_type(dtype: str, block: tuple[int, int], bulk: bool) -> str:
    """Type of an operand in an ahead-of-time signature."""
    return f"tensordesc<{dtype}[{block[0]}, {block[1]}]>" if bulk else f"*{dtype}"
