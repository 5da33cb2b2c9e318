"""The long skip's passes over rows around library GEMMs: normalise both halves, and finish their gradient.

With z = [x, s], mean m and reciprocal deviation r of a row, zhat = (z - m) r and dz' = round(g W'), [M, 2D],

    dz = r (dz' - mean dz' - zhat mean(zhat dz')).

Before the GEMM of the forward, that of "triton" too where a half is not stored as it is multiplied, `normalise_halves`
reads x and s once and writes round(zhat). In the backward `finish_halves` reads dz', x and s once, writes both
gradients, and round(zhat) again for the gradient of W: it is not kept between the passes, since it is as large as both
streams.

Bits. Padded width, rows of a tile and warps are functions of the width alone, because they order the sums over a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.launch import Kept, launcher, signature
from dit_fast.kernels.rows import store_rounded

MAX_WIDTH = 4096
TILE = 2048  # elements of one half in flight where rows are short
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_NORMALISED = Kept()


@triton.jit
def _half(source, row, stride, channel, inside, mu, r):
    """Rows of one half, normalised."""
    z = tl.load(source + row * stride + channel, mask=inside, other=0.0).to(tl.float32)
    return (z - mu) * r


@triton.jit(do_not_specialize=("rows",))
def normalise_halves(x, skip, mean, rstd, unit, rows, x_stride, skip_stride,
                     WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
                     UPCAST: tl.constexpr):  # fmt: skip
    """unit [rows, 2 WIDTH]; ROWS rows per program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, PADDED)[None, :]
    inside = (row < rows) & (channel < WIDTH)
    mu, r = tl.load(mean + row, mask=row < rows, other=0.0), tl.load(rstd + row, mask=row < rows, other=0.0)
    out = unit + row * (2 * WIDTH) + channel
    store_rounded(out, _half(x, row, x_stride, channel, inside, mu, r), inside, UPCAST)
    store_rounded(out + WIDTH, _half(skip, row, skip_stride, channel, inside, mu, r), inside, UPCAST)


@triton.jit(do_not_specialize=("rows",))
def finish_halves(turned, x, skip, mean, rstd, grad_x, grad_skip, unit, rows, x_stride, skip_stride,
                  WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """grad_x, grad_skip [rows, WIDTH] and unit [rows, 2 WIDTH], from turned [rows, 2 WIDTH]; ROWS rows per program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, PADDED)[None, :]
    present = row < rows
    inside = present & (channel < WIDTH)
    mu, r = tl.load(mean + row, mask=present, other=0.0), tl.load(rstd + row, mask=present, other=0.0)
    place = row * (2 * WIDTH) + channel
    first = _half(x, row, x_stride, channel, inside, mu, r)
    second = _half(skip, row, skip_stride, channel, inside, mu, r)
    above = tl.load(turned + place, mask=inside, other=0.0).to(tl.float32)
    beside = tl.load(turned + place + WIDTH, mask=inside, other=0.0).to(tl.float32)
    # Outside of the row `above` and `beside` are zero, which is enough for the sums.
    level = (tl.sum(above, 1) + tl.sum(beside, 1))[:, None] / (2 * WIDTH)
    along = (tl.sum(above * first, 1) + tl.sum(beside * second, 1))[:, None] / (2 * WIDTH)
    store_rounded(unit + place, first, inside, UPCAST)
    store_rounded(unit + place + WIDTH, second, inside, UPCAST)
    store_rounded(grad_x + row * WIDTH + channel, r * (above - level - first * along), inside, UPCAST)
    store_rounded(grad_skip + row * WIDTH + channel, r * (beside - level - second * along), inside, UPCAST)


def supports(x: Tensor, skip: Tensor, dtype: torch.dtype) -> bool:
    """Whether rows x, skip [M, D] can go through the kernels, with products in dtype."""
    return x.shape[1] <= MAX_WIDTH and all(each in TYPES for each in (x.dtype, skip.dtype, dtype))


def _options(width: int) -> dict[str, int]:
    padded = max(128, triton.next_power_of_2(width))
    rows = max(1, TILE // padded)
    return {"WIDTH": width, "PADDED": padded, "ROWS": rows, "num_warps": max(4, padded // 256), "num_stages": 1}


def normalise(x: Tensor, skip: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """round((z - mean) rstd) [M, 2D] in dtype of z = [x, skip]; x, skip: [M, D], rows contiguous; mean, rstd: [M]."""
    rows, width = x.shape
    unit = torch.empty(rows, 2 * width, dtype=dtype, device=x.device)
    if rows == 0:
        return unit
    key = signature(x, skip, unit)
    launch = _NORMALISED.get(key)
    if launch is None:
        constants = _options(width) | {"UPCAST": triton.knobs.runtime.interpret, "enable_fp_fusion": True}
        grid, numbers = (triton.cdiv(rows, constants["ROWS"]),), (rows, x.stride(0), skip.stride(0))
        launch = _NORMALISED.keep(key, launcher(normalise_halves, grid, numbers, constants))
    launch(x, skip, mean, rstd, unit)
    return unit


def finish(turned: Tensor, x: Tensor, skip: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dskip [M, D] in the dtypes of x and skip, what `normalise` returns in turned's dtype).

    turned: g W' [M, 2D], contiguous; the others as for `normalise`.
    """
    rows, width = x.shape
    grads = [torch.empty(rows, width, dtype=half.dtype, device=half.device) for half in (x, skip)]
    unit = torch.empty_like(turned)
    if rows:
        options = _options(width)
        finish_halves[(triton.cdiv(rows, options["ROWS"]),)](
            turned, x, skip, mean, rstd, *grads, unit, rows, x.stride(0), skip.stride(0),
            UPCAST=triton.knobs.runtime.interpret, **options, enable_fp_fusion=True,
        )  # fmt: skip
    return grads[0], grads[1], unit


def aot_cases(arch: int) -> list[AotCase]:
    """Widths of SiT-B, L and XL in a 16-bit stream, and XL in the released model's float32 stream."""
    cases = []
    for width, stream, kind in ((768, "bf16", "bf16"), (1024, "fp16", "fp16"), (1152, "bf16", "bf16"),
                                (1152, "fp32", "bf16")):  # fmt: skip
        options = _options(width)
        constants = {name: value for name, value in options.items() if name.isupper()} | {"UPCAST": False}
        launch = {name: value for name, value in options.items() if name.islower()}
        types = dict.fromkeys(("turned", "unit"), f"*{kind}")
        types |= dict.fromkeys(("x", "skip", "grad_x", "grad_skip"), f"*{stream}")
        types |= dict.fromkeys(("rows", "x_stride", "skip_stride"), "i32")
        for kernel in (normalise_halves, finish_halves):
            signature = {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
            name = f"D={width} {stream} {kind}"
            cases.append(AotCase(kernel, name, signature, constants, launch, ("rows",), wide_stores=True))
    return cases
