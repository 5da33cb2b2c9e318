r"""The element-wise middle of the backward of fc2(gelu(fc1(x))): the gradient before the activation.

With h = fc1(x) as saved and g the gradient of a = gelu(h), tanh form,

    a = h s,   s = 1 / (1 + e^{-2u}),   u = sqrt(2 / pi) (h + 0.044715 h^3)
    dh = g (s + 2 h s (1 - s) du/dh),   du/dh = sqrt(2 / pi) (1 + 3 * 0.044715 h^2),   db = sum over rows of dh.

(1 + tanh u) / 2 is the logistic function of 2u, which keeps relative accuracy where tanh is close to -1; s and 1 - s
are 1 / (1 + e) and e / (1 + e) with e = e^{-2|u|} <= 1, in the order that the sign of u gives. db needs no read of
dh. g comes from the library's product: one of our own that ended in dh moved a quarter less and took longer.

Bits. Partial sums of db are over CHUNK rows in steps of UNROLL; ordered_sum adds them. These numbers, and WARPS, are
part of the definition.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.launch import Kept, launcher, signature
from dit_fast.kernels.ordered_sum import ordered_sum
from dit_fast.kernels.rows import MAX_CHUNKS, store_rounded

CHUNK = 64  # rows per partial sum
UNROLL = 4  # rows whose loads are in flight together
BLOCK = 512  # columns of a program: 8 per thread, a 128-bit access for 16-bit types
WARPS = 2
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_ROOT = tl.constexpr(math.sqrt(2 / math.pi))
_CUBIC = tl.constexpr(0.044715)
_KEPT = Kept()


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


def supports(hidden: Tensor) -> list[str]:
    """Why hidden [..., W] cannot go through `backward`; empty if it can."""
    reasons, rows = [], math.prod(hidden.shape[:-1])
    if hidden.dtype not in _TYPES:
        reasons.append(f"{hidden.dtype} is not float32, bfloat16 or float16")
    if rows > CHUNK * MAX_CHUNKS:
        reasons.append(f"{rows} rows are more than {CHUNK * MAX_CHUNKS}")
    return reasons


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
    launch = _KEPT.get(key)
    if launch is None:
        constants = {"WIDTH": width, "BIAS": want_bias, **_options()}
        grid = (triton.cdiv(width, BLOCK), chunks)
        launch = _KEPT.keep(key, launcher(gelu_gradient, grid, (rows,), constants | {"enable_fp_fusion": True}))
    launch(hidden, grad, out, out if partials is None else partials)
    return out, None if partials is None else ordered_sum(partials)


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
    return cases
