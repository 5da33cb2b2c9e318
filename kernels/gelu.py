r"""The element-wise middle of the backward of fc2(gelu(fc1(x))): the gradient before the activation.

With h = fc1(x) as saved and g the gradient of a = gelu(h), tanh form,

    a = h s,   s = 1 / (1 + e^{-2u}),   u = sqrt(2 / pi) (h + 0.044715 h^3)
    dh = g (s + 2 h s (1 - s) du/dh),   du/dh = sqrt(2 / pi) (1 + 3 * 0.044715 h^2),   db = sum over rows of dh.

(1 + tanh u) / 2 is the logistic function of 2u, which keeps relative accuracy where tanh is close to -1; s and 1 - s
are 1 / (1 + e) and e / (1 + e) with e = e^{-2|u|} <= 1, in the order that the sign of u gives. `product` is the GEMM
that makes g from the gradient of the result and ends in dh, so that g is never written; `backward` is a pass that reads
g from memory. The sum of dh needs no read of its own in either.

Bits. Partial sums of db are over ROWS rows (`product`) and over CHUNK rows in steps of UNROLL (`backward`);
ordered_sum adds them. These numbers, and the warps of a tile, are part of the definition.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.launch import Kept, launcher, signature
from dit_fast.kernels.long_skip_tiles import (
    GROUP,
    Tiles,
    family,
    load_tile,
    operand_type,
    processors,
    tile_place,
)
from dit_fast.kernels.ordered_sum import ordered_sum
from dit_fast.kernels.rows import MAX_CHUNKS, store_rounded
from dit_fast.kernels.tables import is_aligned

CHUNK = 64  # rows per partial sum
UNROLL = 4  # rows whose loads are in flight together
BLOCK = 512  # columns of a program: 8 per thread, a 128-bit access for 16-bit types
WARPS = 2
ROWS = 128  # of a tile of the product, and per partial sum
TILES = {90: Tiles(ROWS, 128, 64, 8, 4), 80: Tiles(ROWS, 128, 32, 8, 4)}  # by GPU family
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_ROOT = tl.constexpr(math.sqrt(2 / math.pi))
_CUBIC = tl.constexpr(0.044715)
_BACKWARD, _PRODUCT = Kept(), Kept()


@triton.jit
def _slope(h):
    """da/dh."""
    square = h * h
    u = _ROOT * h * (1 + _CUBIC * square)
    small = tl.exp(-2 * tl.abs(u))
    large = 1 / (1 + small)
    small = small * large
    s = tl.where(u >= 0, large, small)
    slope = _ROOT * (1 + 3 * _CUBIC * square)
    return s + 2 * h * large * small * slope


@triton.jit
def gelu_gradient(hidden, grad, out, partials, rows,
                  WIDTH: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
                  BIAS: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """out like hidden and grad [M, W], contiguous; partials [chunks, W]. Program (columns, chunk)."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CHUNK, UNROLL):
        # A tile, not a loop over rows: a load cannot pass the store of an earlier row, which might be to its address.
        row = chunk * CHUNK + start + tl.arange(0, UNROLL)[:, None]
        inside = (row < rows) & (column < WIDTH)[None, :]
        place = row * WIDTH + column[None, :]
        h = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        dh = g * _slope(h)
        store_rounded(out + place, dh, inside, UPCAST)
        if BIAS:
            total += tl.sum(dh, 0)
    if BIAS:
        tl.store(partials + chunk * WIDTH + column, total, mask=column < WIDTH)


@triton.jit(do_not_specialize=("rows",))
def gelu_product(grad, weight, hidden, out, partials, rows, inner, width, grad_stride, weight_stride,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
                 BIAS: tl.constexpr, BULK: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """out [rows, width] = (grad [rows, inner] @ weight [inner, width]) da/dh; partials [row tiles, width]."""
    width = tl.multiple_of(width, 8)
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(width, BLOCK_N)
    first, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for tile in range(first, row_tiles * column_tiles, programs):
        row_tile, n = tile_place(tile, row_tiles, column_tiles, GROUP)
        m, n = (row_tile * BLOCK_M).to(tl.int32), (n * BLOCK_N).to(tl.int32)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, inner, BLOCK_K):
            a = load_tile(grad, grad_stride, m, k, rows, inner, BLOCK_M, BLOCK_K, BULK)
            b = load_tile(weight, weight_stride, k, n, inner, width, BLOCK_K, BLOCK_N, BULK)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc)
        i, j = m.to(tl.int64) + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        inside = (i < rows)[:, None] & (j < width)[None, :]
        place = i[:, None] * width + j[None, :]
        h = tl.load(tl.multiple_of(hidden + place, [16, 16]), mask=inside, other=0.0).to(tl.float32)
        dh = acc * _slope(h)
        store_rounded(out + place, dh, inside, UPCAST)
        if BIAS:
            # Rows and columns past the end are zero: so are both factors there.
            tl.store(partials + row_tile * width + j, tl.sum(dh, 0), mask=j < width)


def supports(hidden: Tensor) -> list[str]:
    """Why hidden [..., W] cannot go through `backward`; empty if it can."""
    reasons, rows = [], math.prod(hidden.shape[:-1])
    if hidden.dtype not in _TYPES:
        reasons.append(f"{hidden.dtype} is not float32, bfloat16 or float16")
    if rows > CHUNK * MAX_CHUNKS:
        reasons.append(f"{rows} rows are more than {CHUNK * MAX_CHUNKS}")
    return reasons


def takes_product(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `product` takes a hidden tensor and the weight [E, W] behind it: 16 bits, rows of whole 16 bytes."""
    return hidden.dtype.itemsize == 2 and not (weight.shape[0] % 8 or weight.shape[1] % 8)


def _options() -> dict[str, object]:
    return {
        "CHUNK": CHUNK,
        "UNROLL": UNROLL,
        "BLOCK": BLOCK,
        "UPCAST": triton.knobs.runtime.interpret,
        "num_warps": WARPS,
        "num_stages": 1,
    }


def backward(hidden: Tensor, grad: Tensor, want_bias: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The gradient of hidden, and fp32 [W], its sum over rows, or None where that is not wanted.

    hidden, grad: [M, W], contiguous, not empty, of one dtype (fp32, bf16 or fp16), which the result has too. grad: of
    gelu(hidden). out: where the gradient of hidden goes; grad itself will do, since a program reads a tile of it before
    it writes that tile, and no program touches another's.
    """
    rows, width = hidden.shape
    chunks = triton.cdiv(rows, CHUNK)
    out = torch.empty_like(hidden) if out is None else out
    partials = torch.empty(chunks, width, dtype=torch.float32, device=hidden.device) if want_bias else None
    key = (signature(hidden), want_bias)
    launch = _BACKWARD.get(key)
    if launch is None:
        constants = {"WIDTH": width, "BIAS": want_bias, **_options()}
        grid = (triton.cdiv(width, BLOCK), chunks)
        launch = _BACKWARD.keep(key, launcher(gelu_gradient, grid, (rows,), constants | {"enable_fp_fusion": True}))
    launch(hidden, grad, out, out if partials is None else partials)
    return out, None if partials is None else ordered_sum(partials)


def product(hidden: Tensor, grad: Tensor, weight: Tensor, want_bias: bool) -> tuple[Tensor, Tensor | None]:
    """As `backward` of `grad @ weight`, which is not formed: grad [M, E], of the MLP's result; weight [E, W].

    All of one 16-bit dtype, E and W multiples of 8; hidden [M, W] contiguous, not empty. grad and weight are copied
    where their rows do not start at multiples of 16 bytes.
    """
    (rows, width), inner = hidden.shape, grad.shape[1]
    grad, weight = (_aligned(each) for each in (grad, weight))
    out = torch.empty_like(hidden)
    partials = None
    if want_bias:
        partials = torch.empty(-(-rows // ROWS), width, dtype=torch.float32, device=hidden.device)
    key = (signature(hidden, grad, weight), want_bias)
    launch = _PRODUCT.get(key)
    if launch is None:
        arch = family(hidden.device)
        tiles, bulk = TILES[arch], arch >= 90
        constants = {
            **_blocks(tiles), "BIAS": want_bias, "BULK": bulk, "UPCAST": triton.knobs.runtime.interpret,
            "num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": True,
        }  # fmt: skip
        numbers = (rows, inner, width, grad.stride(0), weight.stride(0))
        count = triton.cdiv(rows, tiles.block_m) * triton.cdiv(width, tiles.block_n)
        blocks = ((tiles.block_m, tiles.block_k), (tiles.block_k, tiles.block_n)) if bulk else ()
        grid = (min(count, processors(hidden.device)),)
        launch = _PRODUCT.keep(key, launcher(gelu_product, grid, numbers, constants, tiles=blocks))
    launch(grad, weight, hidden, out, out if partials is None else partials)
    return out, None if partials is None else ordered_sum(partials)


def _aligned(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 and is_aligned([x]) else x.clone(memory_format=torch.contiguous_format)


def _blocks(tiles: Tiles) -> dict[str, int]:
    return {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "GROUP": GROUP}


def aot_cases(arch: int) -> list[AotCase]:
    """Hidden widths of SiT-B, L and XL."""
    cases = []
    for width, kind, bias in ((3072, "bf16", True), (4096, "fp16", True), (4608, "fp32", True), (4608, "bf16", False)):
        options = _options()
        launch = {name: value for name, value in options.items() if name.islower()}
        constants = {name: value for name, value in options.items() if name.isupper()}
        constants |= {"WIDTH": width, "BIAS": bias}
        signature = dict.fromkeys(("hidden", "grad", "out"), f"*{kind}")
        signature |= {"partials": "*fp32" if bias else f"*{kind}", "rows": "i32"}
        name = f"W={width} {kind}{'' if bias else ' no bias'}"
        cases.append(AotCase(gelu_gradient, name, signature, constants, launch, unaligned=("rows",), wide_stores=True))
    return cases + [_product_case(arch, kind, bias) for kind, bias in (("bf16", True), ("fp16", True), ("bf16", False))]


def _product_case(arch: int, kind: str, bias: bool) -> AotCase:
    tiles, bulk = TILES[90 if arch >= 90 else 80], arch >= 90
    signature = {"grad": operand_type(kind, (tiles.block_m, tiles.block_k), bulk)}
    signature |= {"weight": operand_type(kind, (tiles.block_k, tiles.block_n), bulk)}
    signature |= {"hidden": f"*{kind}", "out": f"*{kind}", "partials": "*fp32" if bias else f"*{kind}"}
    signature |= dict.fromkeys(("rows", "inner", "width", "grad_stride", "weight_stride"), "i32")
    constants = {**_blocks(tiles), "BIAS": bias, "BULK": bulk, "UPCAST": False}
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return AotCase(
        gelu_product, f"product {kind}{'' if bias else ' no bias'}", signature, constants, options,
        unaligned=("rows", "grad", "weight") if bulk else ("rows",), wide_stores=True, dots=True, bulk_loads=True,
    )  # fmt: skip
