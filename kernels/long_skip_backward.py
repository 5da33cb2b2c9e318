"""Backward of the long skip: sums over the gradient's rows, then one GEMM that ends in dx and dskip, and, behind the
library product P, one pass for the parameters. Derivation in long_skip.py.

Bits. CHUNK rows make one partial sum of the bias gradient, in steps of STEP rows, and CHUNK rows of P, in steps of
UNROLL, one of the norm's parameters; ordered_sum adds the chunks.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import long_skip_tiles
from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.launch import Kept, launcher, signature
from dit_fast.kernels.long_skip_tiles import CONFIGS, GROUP, Tiles, load_tile, operand_type, tile_place
from dit_fast.kernels.ordered_sum import ordered_sum
from dit_fast.kernels.rows import store_rounded, to_bfloat16
from dit_fast.kernels.tables import is_aligned

CHUNK = 32  # rows per partial sum: 256 programs for 8,192 rows
STEP = 4  # rows whose loads are in flight together
UNROLL, BLOCK = 8, 256  # rows, as above, and columns of a program behind P


@triton.jit(do_not_specialize=("rows",))
def row_products(grad_y, y, row_sums, folded_bias, c1, c2, partials, rounded, rows, grad_stride, y_stride,
                 WIDTH: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
                 COPY: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """c1, c2 [rows], partials [chunks, WIDTH]; one program per chunk of rows. COPY: of grad_y as it is multiplied, too,
    rounded [rows, WIDTH]; all sums are of that."""
    chunk = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, PADDED)
    within = channel < WIDTH
    u = tl.load(row_sums + channel, mask=within, other=0.0)
    shift = tl.load(folded_bias + channel, mask=within, other=0.0)
    total = tl.zeros([PADDED], tl.float32)
    for start in range(0, CHUNK, STEP):
        row = chunk * CHUNK + start + tl.arange(0, STEP)
        present = row < rows
        inside = present[:, None] & within[None, :]
        g = tl.load(grad_y + row[:, None] * grad_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        if COPY:
            copy = to_bfloat16(g, UPCAST) if rounded.dtype.element_ty == tl.bfloat16 else g.to(tl.float16)
            tl.store(rounded + row[:, None] * WIDTH + channel[None, :], copy, mask=inside)
            g = copy.to(tl.float32)
        out = tl.load(y + row[:, None] * y_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(c1 + row, tl.sum(g * (out - shift[None, :]), axis=1) / (2 * WIDTH), mask=present)
        tl.store(c2 + row, tl.sum(g * u[None, :], axis=1) / (2 * WIDTH), mask=present)
        total += tl.sum(g, axis=0)
    tl.store(partials + chunk * WIDTH + channel, total, mask=within)


@triton.jit
def _finish(acc, rows_in, grad_out, unit, stride, mean, rstd, c1, c2, m, n, half, rows, width,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """r (g W' - c2 - zhat c1) for one tile of one half, and with UNIT zhat."""
    i, j = m.to(tl.int64) + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    present = i < rows
    inside = present[:, None] & (j < width)[None, :]
    mu, r = tl.load(mean + i, mask=present, other=0.0), tl.load(rstd + i, mask=present, other=0.0)
    first, second = tl.load(c1 + i, mask=present, other=0.0), tl.load(c2 + i, mask=present, other=0.0)
    place = tl.multiple_of(rows_in + i[:, None] * stride + j[None, :], [16, 16])
    z = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    z = (z - mu[:, None]) * r[:, None]
    if UNIT:
        store_rounded(unit + (2 * i[:, None] + half) * width + j[None, :], z, inside, UPCAST)
    value = r[:, None] * (acc - second[:, None] - z * first[:, None])
    store_rounded(grad_out + i[:, None] * width + j[None, :], value, inside, UPCAST)


@triton.jit(do_not_specialize=("rows", "first_half", "halves"))
def input_gradients(grad_y, folded, x, skip, mean, rstd, c1, c2, grad_x, grad_skip, unit, rows, width, grad_stride,
                    x_stride, skip_stride, first_half, halves, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, UNIT: tl.constexpr,
                    BULK: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """grad_x, grad_skip [rows, width]: half 0 and half 1 of the columns of W', `halves` of them from first_half on.
    UNIT: these halves of the normalised rows, too, unit [rows, 2 width].
    """
    row_tiles, half_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(width, BLOCK_N)
    column_tiles = half_tiles * halves
    first, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for tile in range(first, row_tiles * column_tiles, programs):
        m, n = tile_place(tile, row_tiles, column_tiles, GROUP)
        half = (first_half + n // half_tiles).to(tl.int32)
        m, n = (m * BLOCK_M).to(tl.int32), (n % half_tiles * BLOCK_N).to(tl.int32)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, width, BLOCK_K):
            a = load_tile(grad_y, grad_stride, m, k, rows, width, BLOCK_M, BLOCK_K, BULK)
            b = load_tile(folded, 2 * width, k, half * width + n, width, 2 * width, BLOCK_K, BLOCK_N, BULK)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc)
        # Of many sums for each thread one half of the columns is finished after the other: rows and addresses of all
        # of them would not fit into registers.
        parts = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1])) if SPLIT else (acc,)
        COLUMNS: tl.constexpr = BLOCK_N // 2 if SPLIT else BLOCK_N
        for part in tl.static_range(2 if SPLIT else 1):
            at = n + part * COLUMNS
            # After the loop, a condition costs nothing: the two halves may differ in type.
            if half == 0:
                _finish(parts[part], x, grad_x, unit, x_stride, mean, rstd, c1, c2, m, at, 0, rows, width, BLOCK_M,
                        COLUMNS, UNIT, UPCAST)  # fmt: skip
            else:
                _finish(parts[part], skip, grad_skip, unit, skip_stride, mean, rstd, c1, c2, m, at, 1, rows, width,
                        BLOCK_M, COLUMNS, UNIT, UPCAST)  # fmt: skip


@triton.jit
def parameter_gradients(product, weight, norm_weight, norm_bias, grad_bias, partials, width, joined, weight_stride,
                        CHUNK: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dW [width, joined] in the place of P; partials [chunks, 2, joined] of W P and W db. Program (columns, chunk)."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1).to(tl.int64)
    within = column < joined
    gamma = tl.load(norm_weight + column, mask=within, other=0.0)[None, :]
    beta = tl.load(norm_bias + column, mask=within, other=0.0)[None, :]
    of_gamma = tl.zeros([BLOCK], tl.float32)
    of_beta = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CHUNK, UNROLL):
        row = chunk * CHUNK + start + tl.arange(0, UNROLL)[:, None]
        inside = (row < width) & within[None, :]
        place = product + row * joined + column[None, :]
        p = tl.load(place, mask=inside, other=0.0)
        w = tl.load(weight + row * weight_stride + column[None, :], mask=inside, other=0.0)
        b = tl.load(grad_bias + row, mask=row < width, other=0.0)
        tl.store(place, p * gamma + b * beta, mask=inside)
        of_gamma += tl.sum(w * p, 0)
        of_beta += tl.sum(w * b, 0)
    partials += chunk * 2 * joined + column
    tl.store(partials, of_gamma, mask=within)
    tl.store(partials + joined, of_beta, mask=within)


def _row_options(width: int) -> dict[str, int]:
    padded = max(128, triton.next_power_of_2(width))
    options = {"WIDTH": width, "PADDED": padded, "CHUNK": CHUNK, "STEP": STEP}
    return options | {"num_warps": min(16, max(1, padded // 256)), "num_stages": 1}


_PRODUCTS, _GRADIENTS, _PARAMETERS = Kept(), Kept(), Kept()


def prepare_backward(
    grad_y: Tensor, y: Tensor, row_sums: Tensor, folded_bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c1 [M], c2 [M], sum of grad_y over rows [D], float32; grad_y in dtype, contiguous, at a multiple of 16 bytes).

    grad_y, y: [M, D], rows contiguous with any stride, float32, bfloat16 or float16; row_sums, folded_bias: from
    `fold`. One read of grad_y and y; grad_y is copied where it is not like that, and the sums are of the copy.
    """
    rows, width = grad_y.shape
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=grad_y.device)  # noqa: E731
    c1, c2 = new(rows), new(rows)
    copied = grad_y.dtype != dtype or not grad_y.is_contiguous() or not is_aligned([grad_y])
    rounded = torch.empty(rows, width, dtype=dtype, device=grad_y.device) if copied else grad_y
    if rows == 0:
        return c1, c2, torch.zeros(width, dtype=torch.float32, device=grad_y.device), rounded
    partials = new(triton.cdiv(rows, CHUNK), width)
    key = (signature(grad_y, y), copied, dtype)
    launch = _PRODUCTS.get(key)
    if launch is None:
        constants = _row_options(width) | {"COPY": copied, "UPCAST": triton.knobs.runtime.interpret}
        grid, numbers = (len(partials),), (rows, grad_y.stride(0), y.stride(0))
        launch = _PRODUCTS.keep(key, launcher(row_products, grid, numbers, constants | {"enable_fp_fusion": True}))
    launch(grad_y, y, row_sums, folded_bias, c1, c2, partials, rounded)
    return c1, c2, ordered_sum(partials), rounded


def _kind(*halves: torch.dtype) -> str:
    return "16-bit, float32 out" if torch.float32 in halves else "16-bit"


def _constants(tiles: Tiles, arch: int, unit: bool) -> dict[str, int]:
    blocks = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k}
    split = tiles.block_m * tiles.block_n > 32 * 32 * tiles.num_warps
    return blocks | {"GROUP": GROUP, "SPLIT": split, "UNIT": unit, "BULK": arch >= 90}


def backward_input(
    grad_y: Tensor,
    x: Tensor,
    skip: Tensor,
    mean: Tensor,
    rstd: Tensor,
    folded: Tensor,
    c1: Tensor,
    c2: Tensor,
    needs: tuple[bool, bool] = (True, True),
    want_unit: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dskip, unit): [M, D], contiguous, in the dtypes of x and skip, None where `needs` is False; the normalised
    rows [M, 2D] in folded's dtype, both halves if both are needed, None where they are not wanted.

    grad_y [M, D], c1, c2: from `prepare_backward`, in folded's dtype; x, skip as in `forward`.
    """
    rows, width = x.shape
    grads = [
        torch.empty(rows, width, dtype=half.dtype, device=half.device) if needed else None
        for half, needed in zip((x, skip), needs, strict=True)
    ]
    unit = torch.empty(rows, 2 * width, dtype=folded.dtype, device=x.device) if want_unit else None
    if rows == 0 or not any(needs):
        return grads[0], grads[1], unit
    # A gradient that is not needed is not written; any pointer of its type stands in.
    places = [half if grad is None else grad for half, grad in zip((x, skip), grads, strict=True)]
    key = (signature(x, skip, grad_y, folded), needs, want_unit)
    launch = _GRADIENTS.get(key)
    if launch is None:
        launch = _GRADIENTS.keep(key, _gradient_launcher(grad_y, x, skip, folded.dtype, needs, want_unit))
    launch(grad_y, folded, x, skip, mean, rstd, c1, c2, *places, folded if unit is None else unit)
    return grads[0], grads[1], unit


def _gradient_launcher(
    grad_y: Tensor, x: Tensor, skip: Tensor, compute: torch.dtype, needs: tuple[bool, bool], want_unit: bool
) -> Callable[..., None]:
    (rows, width), arch, halves = x.shape, long_skip_tiles.family(x.device), sum(needs)
    tiles = long_skip_tiles.tiles_for("backward", _kind(x.dtype, skip.dtype), x, skip, compute, halves)
    count = triton.cdiv(rows, tiles.block_m) * triton.cdiv(width, tiles.block_n) * halves
    constants = {
        **_constants(tiles, arch, want_unit), "UPCAST": triton.knobs.runtime.interpret,
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
    numbers = (rows, width, grad_y.stride(0), x.stride(0), skip.stride(0), 0 if needs[0] else 1, halves)
    blocks = ((tiles.block_m, tiles.block_k), (tiles.block_k, tiles.block_n)) if arch >= 90 else ()
    grid = (min(count, long_skip_tiles.processors(x.device)),)
    return launcher(input_gradients, grid, numbers, constants, tiles=blocks)


def backward_parameters(
    product: Tensor, grad_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dgamma [2D], dbeta [2D], dW [D, 2D], which is `product` overwritten); product: P = g^T zhat, contiguous.

    weight: rows contiguous with any stride; the others contiguous; all float32.
    """
    width, joined = product.shape
    partials = torch.empty(-(-width // CHUNK), 2 * joined, dtype=torch.float32, device=product.device)
    key = signature(product, weight)
    launch = _PARAMETERS.get(key)
    if launch is None:
        constants = {"CHUNK": CHUNK, "UNROLL": UNROLL, "BLOCK": BLOCK, **_PARAMETER_OPTIONS, "enable_fp_fusion": True}
        grid, numbers = (triton.cdiv(joined, BLOCK), len(partials)), (width, joined, weight.stride(0))
        launch = _PARAMETERS.keep(key, launcher(parameter_gradients, grid, numbers, constants))
    launch(product, weight, norm_weight, norm_bias, grad_bias, partials)
    of_gamma, of_beta = ordered_sum(partials).split(joined)
    return of_gamma, of_beta.clone(), product  # results of an op share no memory


_PARAMETER_OPTIONS = {"num_warps": 2, "num_stages": 1}


def aot_cases(arch: int) -> list[AotCase]:
    """Widths of SiT-B, L and XL for the row sums, which parameters' gradients do not know; every configuration of the
    GEMM."""
    kinds = dict.fromkeys(("product", "weight", "norm_weight", "norm_bias", "grad_bias", "partials"), "*fp32")
    kinds |= dict.fromkeys(("width", "joined", "weight_stride"), "i32")
    sizes = {"CHUNK": CHUNK, "UNROLL": UNROLL, "BLOCK": BLOCK}
    cases = [AotCase(parameter_gradients, "fp32", kinds, sizes, _PARAMETER_OPTIONS, wide_stores=True)]
    for width, kind, copied in ((768, "bf16", False), (1024, "fp16", False), (1152, "bf16", False),
                                (1152, "fp32", True)):  # fmt: skip
        options = _row_options(width) | {"COPY": copied, "UPCAST": False}
        constants = {name: value for name, value in options.items() if name.isupper()}
        launch = {name: value for name, value in options.items() if name.islower()}
        types = dict.fromkeys(("grad_y", "y"), f"*{kind}")
        types |= {"rounded": "*bf16" if copied else f"*{kind}"}
        types |= dict.fromkeys(("rows", "grad_stride", "y_stride"), "i32")
        signature = {name: types.get(name, "*fp32") for name in row_products.arg_names if name not in constants}
        name = f"D={width} {kind}" + " copied" * copied
        cases.append(AotCase(row_products, name, signature, constants, launch, ("rows",), wide_stores=True))
    plans = [("many", "bf16", "bf16"), ("many", "fp32", "bf16"), ("few", "fp16", "fp16")]
    return cases + [_case(arch, *plan, unit) for plan in plans for unit in (True, False)]


def _case(arch: int, rows: str, x: str, skip: str, unit: bool) -> AotCase:
    kind = "16-bit, float32 out" if x == "fp32" else "16-bit"
    tiles, compute, bulk = CONFIGS[arch, kind, rows], skip, arch >= 90
    types = {"grad_y": operand_type(compute, (tiles.block_m, tiles.block_k), bulk)}
    types |= {"folded": operand_type(compute, (tiles.block_k, tiles.block_n), bulk)}
    types |= {"x": f"*{x}", "grad_x": f"*{x}", "skip": f"*{skip}", "grad_skip": f"*{skip}", "unit": f"*{compute}"}
    types |= dict.fromkeys(("rows", "width", "grad_stride", "x_stride", "skip_stride", "first_half", "halves"), "i32")
    constants = _constants(tiles, arch, unit) | {"UPCAST": False}
    signature = {name: types.get(name, "*fp32") for name in input_gradients.arg_names if name not in constants}
    launch = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    unaligned = ("rows", "first_half", "halves", *(("grad_y", "folded") if bulk else ()))
    name = f"{rows} {x} {skip}{' unit' if unit else ''}"
    return AotCase(
        input_gradients, name, signature, constants, launch, unaligned, wide_stores=True, dots=True, bulk_loads=True
    )
