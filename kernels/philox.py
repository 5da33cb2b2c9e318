"""The counter-based generator of dit_fast/philox.py inside kernels: same integers, same uniforms, bit for bit.

Key = seed (64 bits), counter words = (block, stream, position_lo, position_hi); element e of a draw is word e % 4 of
block e // 4. Normals are Box-Muller on the word pairs (0, 1) and (2, 3): `rounded_normal_pair` gives the same bits too,
`normal_pair` is cheaper and within 1e-5.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.launch import Kept, launcher
from dit_fast.kernels.rows import MAX_CHUNKS

_BLOCK = 256  # counters per program, four elements each
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
_KEPT = Kept()


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
def _turned(turn, sine, cosine):
    """Cosine and sine of an angle of `turn` quarters, 0 to 3, and a rest of which these are sine and cosine."""
    swapped = (turn & 1) == 1
    horizontal = tl.where(swapped, sine, cosine)
    vertical = tl.where(swapped, cosine, sine)
    horizontal = tl.where((turn == 1) | (turn == 2), -horizontal, horizontal)
    vertical = tl.where(turn >= 2, -vertical, vertical)
    return horizontal, vertical


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
    horizontal, vertical = _turned(quarter.to(tl.int32) & 3, sine, cosine)
    return radius * horizontal, radius * vertical


@triton.jit
def _log(u):
    """Natural logarithm, float64, of normal float32 u > 0, to two units in the last place: that of a power of two, and
    2 atanh((m - 1) / (m + 1)) of what is left, sqrt(1/2) <= m < sqrt(2), by its series."""
    bits = u.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True).to(tl.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = 1 / 21 + z * (1 / 23)
    series = 1 / 15 + z * (1 / 17 + z * (1 / 19 + z * series))
    series = 1 / 9 + z * (1 / 11 + z * (1 / 13 + z * series))
    series = 1 / 3 + z * (1 / 5 + z * (1 / 7 + z * series))
    power = ((bits >> 23) - 127).to(tl.float64)  # times log(2) in two parts, of which the first has 33 bits
    return power * 0.6931471803691238 + (power * 1.9082149292705877e-10 + 2.0 * s * z * series + 2.0 * s)


@triton.jit
def rounded_normal_pair(u, v):
    """The normals of dit_fast/philox.py, bit for bit: logarithm, sine and cosine by series in float64, then rounded.

    Each equals numpy's after rounding for every float32 that a uniform can be.
    """
    logarithm = _log(tl.maximum(u, 1.0e-7)).to(tl.float32)
    radius = tl.sqrt((-2.0 * logarithm).to(tl.float64)).to(tl.float32)  # float32's own root is approximate
    angle = (6.283185307179586 * v).to(tl.float64)
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    # pi / 2 in two parts, of which the first has 33 bits, so that its multiples are exact.
    x = (angle - quarter * 1.5707963267341256) - quarter * 6.077100506506192e-11
    z = x * x
    sine = -1 / 1307674368000 + z * (1 / 355687428096000)
    sine = 1 / 362880 + z * (-1 / 39916800 + z * (1 / 6227020800 + z * sine))
    sine = x + x * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * sine)))
    cosine = 1 / 20922789888000 + z * (-1 / 6402373705728000)
    cosine = -1 / 3628800 + z * (1 / 479001600 + z * (-1 / 87178291200 + z * cosine))
    cosine = 1.0 + z * (-0.5 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * cosine))))
    horizontal, vertical = _turned(quarter.to(tl.int32) & 3, sine.to(tl.float32), cosine.to(tl.float32))
    return radius * horizontal, radius * vertical


@triton.jit(do_not_specialize=("seed", "samples", "streams", "counts", "normals"))
def fill(out, positions, seed, samples, streams, counts, normals, DRAWS: tl.constexpr, BLOCK: tl.constexpr):
    """Draws one after the other in `out`, each [samples, count] from a multiple of four elements on.

    One program per position and 4 * BLOCK elements of one draw; streams, counts and normals (0: uniform) by draw.
    """
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1).to(tl.int64)
    stream, count, normal = streams[0], counts[0], normals[0]
    first, place = piece * 0, row * 0  # piece and element in `out` with which this program's draw begins
    next_first, next_place = first, place
    for draw in tl.static_range(1, DRAWS):
        next_first += (counts[draw - 1] + 4 * BLOCK - 1) // (4 * BLOCK)
        next_place += (samples.to(tl.int64) * counts[draw - 1] + 3) // 4 * 4
        there = piece >= next_first
        stream = tl.where(there, streams[draw], stream)
        count = tl.where(there, counts[draw], count)
        normal = tl.where(there, normals[draw], normal)
        first = tl.where(there, next_first, first)
        place = tl.where(there, next_place, place)
    start = (piece - first) * BLOCK
    block = (start + tl.arange(0, BLOCK)).to(tl.int32)
    a, b, c, d = words(seed, tl.load(positions + row), stream.to(tl.int32), block)
    a, b = tl.random.uint_to_uniform_float(a), tl.random.uint_to_uniform_float(b)
    c, d = tl.random.uint_to_uniform_float(c), tl.random.uint_to_uniform_float(d)
    if normal != 0:
        a, b = rounded_normal_pair(a, b)
        c, d = rounded_normal_pair(c, d)
    numbers = interleave(a, b, c, d)
    element = 4 * start + tl.arange(0, 4 * BLOCK)
    whole = count // 4 * 4  # known to be a multiple: 16 bytes at once
    if count == whole:
        tl.store(out + place + row * whole + element, numbers, mask=element < whole)
    else:
        tl.store(out + place + row * count + element, numbers, mask=element < count)


def supports(positions: Tensor, counts: Sequence[int]) -> list[str]:
    """Why draws of so many elements per position cannot go through the kernel; empty if they can."""
    if not len(positions):
        return ["there is no position"]
    pieces = sum(triton.cdiv(count, 4 * _BLOCK) for count in counts)
    return [] if 0 < pieces <= MAX_CHUNKS else [f"{pieces} pieces of a position are none, or more than {MAX_CHUNKS}"]


def draws(
    positions: Tensor, seed: int, normals: Sequence[bool], streams: Sequence[int], counts: Sequence[int]
) -> Tensor:
    """Flat float32 with one draw [N, count] after the other, each from a multiple of four elements on.

    positions: int64 [N]; 0 <= seed < 2^64; of each draw whether it is normal, or uniform, its stream and its count.
    """
    samples = len(positions)
    length = sum(-(-samples * count // 4) * 4 for count in counts)
    out = torch.empty(length, dtype=torch.float32, device=positions.device)
    key = (positions.device, samples, seed, *normals, *streams, *counts)
    launch = _KEPT.get(key)
    if launch is None:
        signed = seed - (1 << 64) if seed >> 63 else seed  # one argument type for every seed, one for every stream
        table = [each - (1 << 32) if each >> 31 else each for each in streams], counts, [int(each) for each in normals]
        grid = (samples, sum(triton.cdiv(count, 4 * _BLOCK) for count in counts))
        constants = {"DRAWS": len(streams), "BLOCK": _BLOCK, **_OPTIONS}
        launch = _KEPT.keep(key, launcher(fill, grid, (signed, samples, *map(tuple, table)), constants))
    launch(out, positions.contiguous())
    return out


def aot_cases(arch: int) -> list[AotCase]:
    """One draw, and as many as a step of flow matching and of mean flow has."""
    return [
        AotCase(
            fill,
            f"{draws} draws",
            {"out": "*fp32", "positions": "*i64", "seed": "i32", "samples": "i32"}
            | dict.fromkeys(("streams", "counts", "normals"), ("i32",) * draws),
            {"DRAWS": draws, "BLOCK": _BLOCK},
            _OPTIONS,
            unaligned=("seed", "samples", "streams", "counts", "normals"),
            wide_loads=False,
            wide_stores=True,
        )
        for draws in (1, 3, 6)
    ]
