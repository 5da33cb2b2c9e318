"""Sum over the rows of a matrix in one fixed order: the second half of every reduction over tokens.

Kernels write one row of partial sums per fixed range of tokens. Rows are added here, in float64 and in index order,
by groups of GROUP rows, then groups of groups. No atomics, and nothing depends on how many programs ran at once, so a
sum has the same bits on every run and under every configuration.
"""

import torch
import triton
import triton.language as tl

from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.launch import Kept, launcher, signature

GROUP = 64  # part of the definition
_UNROLL = 8
_BLOCK = 512
_SUMS = Kept()


@triton.jit
def sum_rows(source, out, rows, columns, GROUP: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr):
    """out[g, c] = sum of source[r, c] over r in [g GROUP, (g + 1) GROUP), in that order."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1).to(tl.int64)
    last = tl.minimum((group + 1) * GROUP, rows)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(group * GROUP, last, UNROLL):
        # Loads of several rows in flight; the additions stay in index order.
        for step in tl.static_range(UNROLL):
            row = start + step
            inside = column < tl.where(row < last, columns, 0)
            total += tl.load(source + row * columns + column, mask=inside, other=0.0).to(tl.float64)
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
            constants = {"GROUP": GROUP, "UNROLL": _UNROLL, "BLOCK": _BLOCK}
            constants |= {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
            grid = (triton.cdiv(columns, _BLOCK), groups)
            launch = _SUMS.keep(key, launcher(sum_rows, grid, (rows, columns), constants))
        launch(partials, out)
        if groups == 1:
            return out[0]
        partials, rows = out, groups


def aot_cases(arch: int) -> list[AotCase]:
    return [
        AotCase(
            sum_rows,
            f"{source}-{out}",
            {"source": f"*{source}", "out": f"*{out}", "rows": "i32", "columns": "i32"},
            {"GROUP": GROUP, "UNROLL": _UNROLL, "BLOCK": _BLOCK},
            {"num_warps": 4, "num_stages": 1},
            unaligned=("rows",),
            wide_stores=True,
        )
        for source, out in (("fp32", "fp32"), ("fp32", "fp64"), ("fp64", "fp32"))
    ]
