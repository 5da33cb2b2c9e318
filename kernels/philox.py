"""The counter-based generator of dit_fast/philox.py inside kernels: same integers, same uniforms, bit for bit.

Key = seed (64 bits), counter words = (block, stream, position_lo, position_hi); element e of a draw is word e % 4 of
block e // 4. Normals are Box-Muller on the word pairs (0, 1) and (2, 3).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.aot import AotCase

_BLOCK = 256  # counters per program, four elements each
_KINDS = {"words": (torch.int64, "i64"), "uniform": (torch.float32, "fp32"), "normal": (torch.float32, "fp32")}


@triton.jit
def words(seed, position, stream, block):
    """Four uint32 words of counters (block, stream, position); block and stream int32, position int64, any shapes."""
    low = position.to(tl.int32) + tl.zeros_like(block)
    high = (position >> 32).to(tl.int32) + tl.zeros_like(block)
    return tl.philox(seed, block, stream + tl.zeros_like(block), low, high)


@triton.jit
def interleave(a, b, c, d):
    """a[0], b[0], c[0], d[0], a[1], ...: the elements of a draw in order."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [4 * a.shape[0]])


@triton.jit
def normal_pair(u, v):
    """Two normals from two uniforms: Box-Muller as in tl.random, without its sine and cosine.

    Those bring a range reduction for huge angles, which costs a stack frame. Here the angle is below 2 pi: quarter
    turns are taken off with pi / 2 in three parts, of which the first two multiply exactly, and Taylor's series
    does the rest to 3e-8 on [-pi/4, pi/4].
    """
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(u, 1.0e-7)))
    angle = 6.283185307179586 * v
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    x = ((angle - quarter * 1.5703125) - quarter * 0.0004837512969970703) - quarter * 7.549789948768648e-08
    z = x * x
    sine = x + x * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z / 362880)))
    cosine = 1.0 + z * (-0.5 + z * (1 / 24 + z * (-1 / 720 + z / 40320)))
    turn = quarter.to(tl.int32) & 3
    swapped = (turn & 1) == 1
    horizontal = tl.where(swapped, sine, cosine)
    vertical = tl.where(swapped, cosine, sine)
    horizontal = tl.where((turn == 1) | (turn == 2), -horizontal, horizontal)
    vertical = tl.where(turn >= 2, -vertical, vertical)
    return radius * horizontal, radius * vertical


@triton.jit(do_not_specialize=("seed", "stream"))
def fill(out, positions, seed, stream, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """out [N, count]: one draw per position; one program per position and 4 * BLOCK elements."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * BLOCK
    block = (start + tl.arange(0, BLOCK)).to(tl.int32)
    a, b, c, d = words(seed, tl.load(positions + row), stream.to(tl.int32), block)
    if KIND == "words":
        draw = interleave(a, b, c, d).to(tl.int64)
    else:
        a, b = tl.random.uint_to_uniform_float(a), tl.random.uint_to_uniform_float(b)
        c, d = tl.random.uint_to_uniform_float(c), tl.random.uint_to_uniform_float(d)
        if KIND == "normal":
            a, b = normal_pair(a, b)
            c, d = normal_pair(c, d)
        draw = interleave(a, b, c, d)
    element = 4 * start + tl.arange(0, 4 * BLOCK)
    tl.store(out + row * count + element, draw, mask=element < count)


def numbers(kind: str, seed: int, positions: Tensor, stream: int, count: int) -> Tensor:
    """[N, count] for positions int64 [N]: kind "words" (int64 in [0, 2^32)), "uniform" or "normal" (float32)."""
    out = torch.empty(len(positions), count, dtype=_KINDS[kind][0], device=positions.device)
    grid = (len(positions), triton.cdiv(count, 4 * _BLOCK))
    signed = seed - (1 << 64) if seed >> 63 else seed  # one argument type for every seed
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
    fill[grid](out, positions.contiguous(), signed, int(stream), count, KIND=kind, BLOCK=_BLOCK, **options)
    return out


def aot_cases(arch: int) -> list[AotCase]:
    return [
        AotCase(
            fill,
            kind,
            {"out": f"*{pointer}", "positions": "*i64", "seed": "i64", "stream": "i32", "count": "i32"},
            {"KIND": kind, "BLOCK": _BLOCK},
            {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False},
            unaligned=("seed", "stream"),
            wide_loads=False,
            wide_stores=True,
        )
        for kind, (_, pointer) in _KINDS.items()
    ]
