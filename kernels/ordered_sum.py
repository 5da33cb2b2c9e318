"""Sum over the rows of a matrix in one fixed order: the second half of every reduction over tokens, and a first one.

Kernels write one row of partial sums per fixed range of tokens. Rows are added here, in float64, by groups of GROUP
rows, then groups of groups, in the order of a tile of one size. No atomics, and nothing depends on how many programs
ran at once, so a sum has the same bits on every run and under every configuration.

`sums_of` is for matrices that no other kernel passes over: gradients of which a layer's bias takes the sum. What lies
in parts that the layer's products read as one matrix is put together in that pass. Its tiles, too, are part of the
definition.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.launch import Kept, launcher, signature
from dit_fast.kernels.rows import MAX_CHUNKS, TYPES

GROUP = 128  # rows of a tile; part of the definition, as are its columns and warps
_BLOCK = 32
_WARPS = 8
CHUNK = 128  # rows per partial sum; of 64, a step of SiT-XL/2 at 32 samples took 0.2 ms longer on an H200
COLUMNS = 128  # of a tile of so many rows
MOST_PARTS = 3
_SUMS, _CHUNKS = Kept(), Kept()


@triton.jit
def sum_rows(source, out, rows, columns, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """out[g, c] = sum of source[r, c] over r in [g GROUP, (g + 1) GROUP)."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1).to(tl.int64)
    row = group * GROUP + tl.arange(0, GROUP)[:, None]
    inside = (row < rows) & (column < columns)[None, :]
    # One tile, whose rows lie in many threads: one thread has no more than some six loads in flight.
    total = tl.sum(tl.load(source + row * columns + column[None, :], mask=inside, other=0.0).to(tl.float64), 0)
    tl.store(out + group * columns + column, total.to(out.dtype.element_ty), mask=column < columns)


def ordered_sum(partials: torch.Tensor) -> torch.Tensor:
    """float32 [C] from float32 partial sums [R, C]."""
    rows, columns = partials.shape
    while True:
        groups = -(-rows // GROUP)  # triton.cdiv takes 5 us
        dtype = torch.float32 if groups == 1 else torch.float64
        out = torch.empty(groups, columns, dtype=dtype, device=partials.device)
        key = signature(partials)
        launch = _SUMS.get(key)
        if launch is None:
            constants = {"GROUP": GROUP, "BLOCK": _BLOCK}
            constants |= {"num_warps": _WARPS, "num_stages": 1, "enable_fp_fusion": True}
            grid = (triton.cdiv(columns, _BLOCK), groups)
            launch = _SUMS.keep(key, launcher(sum_rows, grid, (rows, columns), constants))
        launch(partials, out)
        if groups == 1:
            return out[0]
        partials, rows = out, groups


@triton.jit(do_not_specialize=("rows",))
def sum_chunks(first, second, third, out, partials, rows,
               WIDTH: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """partials [chunks, PARTS, W] of parts [M, W], contiguous; of several, out [M, PARTS, W] takes the values."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    source = first
    if PARTS > 1:
        if part == 1:
            source = second
        if part == 2:
            source = third
    row = chunk * CHUNK + tl.arange(0, CHUNK)[:, None]
    inside = (row < rows) & (column < WIDTH)[None, :]
    x = tl.load(source + row * WIDTH + column[None, :], mask=inside, other=0.0)
    if PARTS > 1:
        tl.store(out + (row * PARTS + part) * WIDTH + column[None, :], x, mask=inside)
    tl.store(partials + (chunk * PARTS + part) * WIDTH + column, tl.sum(x.to(tl.float32), 0), mask=column < WIDTH)


def takes(parts: Sequence[Tensor]) -> bool:
    """Whether `sums_of` takes them: one, two or three of one shape [M, W], dtype and device, contiguous, not empty."""
    x = parts[0]
    alike = all(each.is_contiguous() and each.shape == x.shape and each.dtype is x.dtype for each in parts)
    return alike and len(parts) <= MOST_PARTS and x.dtype in TYPES and x.numel() > 0 and len(x) <= CHUNK * MAX_CHUNKS


def sums_of(*parts: Tensor) -> tuple[Tensor, Tensor]:
    """The parts as one matrix [M, parts * W], and the fp32 sum over its rows. A part alone is that matrix itself."""
    x, count = parts[0], len(parts)
    rows, width = x.shape
    chunks = triton.cdiv(rows, CHUNK)
    out = x if count == 1 else torch.empty(rows, count * width, dtype=x.dtype, device=x.device)
    partials = torch.empty(chunks, count * width, dtype=torch.float32, device=x.device)
    key = (signature(x), count)
    launch = _CHUNKS.get(key)
    if launch is None:
        constants = {"WIDTH": width, "PARTS": count, "CHUNK": CHUNK, "COLUMNS": COLUMNS}
        constants |= {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
        grid = (triton.cdiv(width, COLUMNS), chunks, count)
        launch = _CHUNKS.keep(key, launcher(sum_chunks, grid, (rows,), constants))
    launch(x, parts[min(1, count - 1)], parts[-1], out, partials)
    return out, ordered_sum(partials)


def aot_cases(arch: int) -> list[AotCase]:
    cases = [
        AotCase(
            sum_rows,
            f"{source}-{out}",
            {"source": f"*{source}", "out": f"*{out}", "rows": "i32", "columns": "i32"},
            {"GROUP": GROUP, "BLOCK": _BLOCK},
            {"num_warps": _WARPS, "num_stages": 1},
            unaligned=("rows",),
        )
        for source, out in (("fp32", "fp32"), ("fp32", "fp64"), ("fp64", "fp32"))
    ]
    for kind, count in (("bf16", 1), ("bf16", 3), ("fp16", 2), ("fp32", 1)):
        signature = dict.fromkeys(("first", "second", "third", "out"), f"*{kind}") | {
            "partials": "*fp32",
            "rows": "i32",
        }
        constants = {"WIDTH": 1152, "PARTS": count, "CHUNK": CHUNK, "COLUMNS": COLUMNS}
        options = {"num_warps": 4, "num_stages": 1}
        name = f"{count} {kind}"
        case = AotCase(sum_chunks, name, signature, constants, options, unaligned=("rows",), wide_stores=count > 1)
        cases.append(case)
    return cases
