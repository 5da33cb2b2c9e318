"""Forward of the long skip: weights with gamma and beta folded in, and the GEMM. Derivation in long_skip.py."""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import long_skip_tiles
from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.launch import Kept, launcher, signature
from dit_fast.kernels.long_skip_tiles import (
    CANDIDATES,
    CONFIGS,
    GROUP,
    Tiles,
    load_tile,
    operand_type,
    tile_place,
)
from dit_fast.kernels.rows import store_rounded, to_bfloat16

FOLD_ROWS = 4
FOLD_BLOCK = 1024  # orders the row sums


@triton.jit
def fold_rows(norm_weight, norm_bias, weight, bias, folded, row_sums, folded_bias, weight_stride, width, joined,
              ROWS: tl.constexpr, BLOCK: tl.constexpr, BFLOAT: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """ROWS rows of W' = round(gamma W), their sums, and elements of b + W beta; joined = 2 width."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = row < width
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    shift = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, joined, BLOCK):
        column = start + tl.arange(0, BLOCK)
        within = column < joined
        inside = present[:, None] & within[None, :]
        w = tl.load(weight + row[:, None] * weight_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        gamma = tl.load(norm_weight + column, mask=within, other=0.0).to(tl.float32)
        beta = tl.load(norm_bias + column, mask=within, other=0.0).to(tl.float32)
        product = gamma[None, :] * w
        rounded = to_bfloat16(product, UPCAST) if BFLOAT else product.to(tl.float16)
        tl.store(folded + row[:, None] * joined + column[None, :], rounded, mask=inside)
        total += rounded.to(tl.float32)
        shift += w * beta[None, :]
    tl.store(row_sums + row, tl.sum(total, axis=1), mask=present)
    start = tl.load(bias + row, mask=present, other=0.0).to(tl.float32)
    tl.store(folded_bias + row, start + tl.sum(shift, axis=1), mask=present)


@triton.jit
def _product(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b), acc)


@triton.jit(do_not_specialize=("rows",))
def skip_projection(x, skip, folded, mean, rstd, row_sums, folded_bias, out, rows, width, x_stride, skip_stride,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
                    BULK: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """out [rows, width]. x, skip, folded: descriptors of tiles (BULK) or pointers."""
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(width, BLOCK_N)
    first, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for tile in range(first, row_tiles * column_tiles, programs):
        m, n = tile_place(tile, row_tiles, column_tiles, GROUP)
        m, n = (m * BLOCK_M).to(tl.int32), (n * BLOCK_N).to(tl.int32)
        i, j = m.to(tl.int64) + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        mu = tl.load(mean + i, mask=i < rows, other=0.0)
        r = tl.load(rstd + i, mask=i < rows, other=0.0)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # Two loops: a condition around the loads of one loop would switch the pipeline off.
        for k in range(0, width, BLOCK_K):
            a = load_tile(x, x_stride, m, k, rows, width, BLOCK_M, BLOCK_K, BULK)
            b = load_tile(folded, 2 * width, n, k, width, 2 * width, BLOCK_N, BLOCK_K, BULK)
            acc = _product(a, b, acc, UPCAST)
        for k in range(0, width, BLOCK_K):
            a = load_tile(skip, skip_stride, m, k, rows, width, BLOCK_M, BLOCK_K, BULK)
            b = load_tile(folded, 2 * width, n, width + k, width, 2 * width, BLOCK_N, BLOCK_K, BULK)
            acc = _product(a, b, acc, UPCAST)
        u = tl.load(row_sums + j, mask=j < width, other=0.0)
        acc = r[:, None] * (acc - mu[:, None] * u[None, :])
        acc += tl.load(folded_bias + j, mask=j < width, other=0.0)[None, :]
        inside = (i < rows)[:, None] & (j < width)[None, :]
        store_rounded(out + i[:, None] * width + j[None, :], acc, inside, UPCAST)


_FOLDS, _PROJECTIONS = Kept(), Kept()


def fold(
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(W' [D, 2D] in dtype, its row sums [D], b' [D] float32) with W' = round(gamma W), b' = b + W beta.

    norm_weight, norm_bias [2D]; weight [D, 2D], rows contiguous; bias [D]: float32, bfloat16 or float16 each.
    dtype: bfloat16 or float16. The sums are of the rounded W', which the GEMM multiplies with. into: three tensors that
    an earlier call gave.
    """
    width, joined = weight.shape
    if into is None:
        folded = torch.empty(width, joined, dtype=dtype, device=weight.device)
        row_sums, folded_bias = (torch.empty(width, dtype=torch.float32, device=weight.device) for _ in range(2))
    else:
        folded, row_sums, folded_bias = into
    given = (norm_weight.contiguous(), norm_bias.contiguous(), weight, bias.contiguous())
    key = (signature(*given), dtype)
    launch = _FOLDS.get(key)
    if launch is None:
        constants = {"ROWS": FOLD_ROWS, "BLOCK": FOLD_BLOCK, "BFLOAT": dtype == torch.bfloat16}
        constants |= {"UPCAST": triton.knobs.runtime.interpret, "num_warps": 8, "num_stages": 1}
        grid, numbers = (triton.cdiv(width, FOLD_ROWS),), (weight.stride(0), width, joined)
        launch = _FOLDS.keep(key, launcher(fold_rows, grid, numbers, constants | {"enable_fp_fusion": True}))
    launch(*given, folded, row_sums, folded_bias)
    return folded, row_sums, folded_bias


def _constants(tiles: Tiles, arch: int) -> dict[str, int]:
    blocks = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k}
    return blocks | {"GROUP": GROUP, "BULK": arch >= 90}


def forward(
    x: Tensor,
    skip: Tensor,
    mean: Tensor,
    rstd: Tensor,
    folded: Tensor,
    row_sums: Tensor,
    folded_bias: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """y [M, D] in out_dtype: the linear map of the normalised [x, skip], which is never formed.

    x, skip: [M, D], in folded's dtype, rows contiguous with any stride of whole 16 bytes; mean, rstd: float32 [M] over
    both together; folded, row_sums, folded_bias: from `fold`.
    """
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=out_dtype, device=x.device)
    if rows == 0:
        return out
    key = (signature(x, skip, folded), out_dtype)
    launch = _PROJECTIONS.get(key)
    if launch is None:
        launch = _PROJECTIONS.keep(key, _projection_launcher(x, skip))
    launch(x, skip, folded, mean, rstd, row_sums, folded_bias, out)
    return out


def _projection_launcher(x: Tensor, skip: Tensor) -> Callable[..., None]:
    (rows, width), arch = x.shape, long_skip_tiles.family(x.device)
    tiles = long_skip_tiles.tiles_for("forward", "16-bit", x, skip, x.dtype, 1)
    half, weights = (tiles.block_m, tiles.block_k), (tiles.block_n, tiles.block_k)
    count = triton.cdiv(rows, tiles.block_m) * triton.cdiv(width, tiles.block_n)
    constants = {
        **_constants(tiles, arch), "UPCAST": triton.knobs.runtime.interpret,
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
    grid, numbers = (min(count, long_skip_tiles.processors(x.device)),), (rows, width, x.stride(0), skip.stride(0))
    return launcher(skip_projection, grid, numbers, constants, tiles=(half, half, weights) if arch >= 90 else ())


def aot_cases(arch: int) -> list[AotCase]:
    """Every configuration; the dtypes of autocast on a 16-bit stream, with results in both."""
    pointers = ("norm_weight", "norm_bias", "weight", "bias", "folded", "row_sums", "folded_bias")
    signature = dict.fromkeys(pointers, "*fp32")
    signature |= dict.fromkeys(("weight_stride", "width", "joined"), "i32")
    constants, launch = {"ROWS": FOLD_ROWS, "BLOCK": FOLD_BLOCK, "UPCAST": False}, {"num_warps": 8, "num_stages": 1}
    cases = [
        AotCase(fold_rows, kind, signature | {"folded": f"*{kind}"}, constants | {"BFLOAT": kind == "bf16"}, launch,
             wide_stores=True)
        for kind in ("bf16", "fp16")
    ]  # fmt: skip
    for plan in (("many", "bf16"), ("few", "fp16"), ("many", "bf16", "fp32")):
        cases.append(_case(arch, CONFIGS[arch, "16-bit", plan[0]], *plan))
    return cases + [_case(arch, each, each.name, "bf16") for each in CANDIDATES[arch, "forward", "16-bit"]]


def _case(arch: int, tiles: Tiles, rows: str, kind: str, out: str = "") -> AotCase:
    bulk, half, weights = arch >= 90, (tiles.block_m, tiles.block_k), (tiles.block_n, tiles.block_k)
    signature = dict.fromkeys(("x", "skip"), operand_type(kind, half, bulk))
    signature |= {"folded": operand_type(kind, weights, bulk), "out": f"*{out or kind}"}
    signature |= dict.fromkeys(("mean", "rstd", "row_sums", "folded_bias"), "*fp32")
    signature |= dict.fromkeys(("rows", "width", "x_stride", "skip_stride"), "i32")
    constants = _constants(tiles, arch) | {"UPCAST": False}
    launch = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    expected = {"wide_loads": not bulk, "wide_stores": True, "dots": True, "bulk_loads": True}
    unaligned = ("rows", "x", "skip", "folded") if bulk else ("rows",)
    name = f"{rows} {kind}{out and f' -> {out}'}"
    return AotCase(skip_projection, name, signature, constants, launch, unaligned=unaligned, **expected)
