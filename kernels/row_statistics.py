"""Mean and population variance of every row, in float32, from one read of the row.

    mean = sum x / D,   variance = sum (x - mean)^2 / D

The deviations are squared and added after the mean is known: E[x^2] - mean^2 would lose (mean / sigma)^2 roundings.
A row up to SINGLE wide stays in registers between the two sums; a wider one is read a second time, from the cache.

Bits. Padded width, tile and warps are functions of the width alone, because they order the sum over a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.launch import Kept, launcher, signature

SINGLE = 4096  # widest row of one tile
PROGRAM = 4096  # elements of a program where rows are short
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

JOINED = 512  # rows of a program that joins

_KEPT, _JOINS = Kept(), Kept()


@triton.jit(do_not_specialize=("rows",))
def row_moments(source, mean, variance, rows, stride,
                WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """mean, variance [rows] of source [rows, WIDTH] with any row stride; ROWS rows per program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)
    present = row < rows
    start = source + row[:, None] * stride
    if WIDTH <= PADDED:
        inside = present[:, None] & (channel < WIDTH)[None, :]
        x = tl.load(start + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        centre = tl.sum(x, axis=1) / WIDTH
        deviation = tl.where(inside, x - centre[:, None], 0.0)
        spread = tl.sum(deviation * deviation, axis=1)
    else:
        total = tl.zeros([ROWS, PADDED], tl.float32)
        for first in range(0, WIDTH, PADDED):
            inside = present[:, None] & (first + channel < WIDTH)[None, :]
            total += tl.load(start + first + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        centre = tl.sum(total, axis=1) / WIDTH
        total = tl.zeros([ROWS, PADDED], tl.float32)
        for first in range(0, WIDTH, PADDED):
            inside = present[:, None] & (first + channel < WIDTH)[None, :]
            x = tl.load(start + first + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            deviation = tl.where(inside, x - centre[:, None], 0.0)
            total += deviation * deviation
        spread = tl.sum(total, axis=1)
    tl.store(mean + row, centre, mask=present)
    tl.store(variance + row, spread / WIDTH, mask=present)


def supports(x: Tensor) -> list[str]:
    """Why the rows of x [M, D] cannot go through the kernel; empty if they can."""
    reasons = []
    if x.dtype not in _TYPES:
        reasons.append(f"{x.dtype} is not float32, bfloat16 or float16")
    if x.shape[-1] == 0:
        reasons.append("the rows are empty")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        reasons.append("the last dimension is not contiguous")
    return reasons


def _options(width: int) -> dict[str, int]:
    padded = min(SINGLE, max(128, triton.next_power_of_2(width)))
    rows = PROGRAM // padded
    return {"WIDTH": width, "PADDED": padded, "ROWS": rows, "num_warps": 4, "num_stages": 1}


def row_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, variance) float32 [M] of x [M, D]; x: float32, bfloat16 or float16, rows contiguous with any stride."""
    rows, width = x.shape
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    variance = torch.empty_like(mean)
    if rows:
        key = signature(x)
        launch = _KEPT.get(key)
        if launch is None:
            options = _options(width)
            grid = (triton.cdiv(rows, options["ROWS"]),)
            made = launcher(row_moments, grid, (rows, x.stride(0)), options | {"enable_fp_fusion": True})
            launch = _KEPT.keep(key, made)
        launch(x, mean, variance)
    return mean, variance


@triton.jit(do_not_specialize=("rows",))
def join_moments(mean_x, variance_x, mean_skip, variance_skip, mean, rstd, rows, eps, BLOCK: tl.constexpr):
    """mean and 1 / sqrt(variance + eps) [rows] of two rows of one width side by side, from those of each."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = row < rows
    first = tl.load(mean_skip + row, mask=present, other=0.0)
    half_gap = (tl.load(mean_x + row, mask=present, other=0.0) - first) / 2
    spread = tl.load(variance_x + row, mask=present, other=0.0) + tl.load(variance_skip + row, mask=present, other=0.0)
    tl.store(mean + row, first + half_gap, mask=present)
    tl.store(rstd + row, tl.rsqrt(spread / 2 + half_gap * half_gap + eps), mask=present)


def join(x: tuple[Tensor, Tensor], skip: tuple[Tensor, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """`dit_fast.ops.row_statistics.join` of float32 [M], contiguous."""
    mean, rstd = torch.empty_like(x[0]), torch.empty_like(x[0])
    rows = len(mean)
    if rows:
        key = (signature(mean), eps)
        launch = _JOINS.get(key)
        if launch is None:
            options = {"BLOCK": JOINED, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
            launch = _JOINS.keep(key, launcher(join_moments, (triton.cdiv(rows, JOINED),), (rows, eps), options))
        launch(*x, *skip, mean, rstd)
    return mean, rstd


def aot_cases(arch: int) -> list[AotCase]:
    """The widths of SiT-B, L, XL, of a joined XL row, and one past a single tile; joining knows no width."""
    shapes = [(768, "bf16"), (1024, "fp16"), (1152, "bf16"), (1152, "fp32"), (2304, "bf16"), (4608, "bf16")]
    vectors = dict.fromkeys(("mean_x", "variance_x", "mean_skip", "variance_skip", "mean", "rstd"), "*fp32")
    kinds = vectors | {"rows": "i32", "eps": "fp32"}
    launch: dict[str, int] = {"num_warps": 4, "num_stages": 1}
    cases = [AotCase(join_moments, "rows", kinds, {"BLOCK": JOINED}, launch, unaligned=("rows",), wide_loads=False)]
    for width, kind in shapes:
        options = _options(width)
        constants = {name: value for name, value in options.items() if name.isupper()}
        launch = {name: value for name, value in options.items() if name.islower()}
        signature = {"source": f"*{kind}", "mean": "*fp32", "variance": "*fp32", "rows": "i32", "stride": "i32"}
        cases.append(AotCase(row_moments, f"D={width} {kind}", signature, constants, launch, unaligned=("rows",)))
    return cases
