"""Rows of tensors that are known by address, in any of three types, maybe differing from row to row.

TYPE names the type of all rows, or is "mixed": then `wide` marks float32 rows, `half` float16 rows, the others are
bfloat16. UPCAST is true under the interpreter, which has no bfloat16 arithmetic and truncates where hardware rounds.
"""

import functools

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_CHUNKS = 65535  # programs along the second axis of a grid


@functools.cache
def types_of(dtypes: tuple[torch.dtype, ...]) -> tuple[str, tuple[int, int]]:
    """TYPE of tensors with these dtypes, and the masks of those that are float32 and of those that are float16."""
    kinds = [TYPES[dtype] for dtype in dtypes]
    masks = [sum(1 << k for k, kind in enumerate(kinds) if kind == each) for each in ("fp32", "fp16")]
    return kinds[0] if len(set(kinds)) == 1 else "mixed", (masks[0], masks[1])


@triton.jit
def to_bfloat16(x, INTERPRETED: tl.constexpr):
    """Round to nearest even. Triton 3.6 to 3.9 interpret the cast as truncation, twice the error of the hardware."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    return x.to(tl.bfloat16)


@triton.jit
def store_rounded(pointer, value, inside, INTERPRETED: tl.constexpr):
    """float32 `value` rounded once to the type that `pointer` points at."""
    if pointer.dtype.element_ty == tl.bfloat16:
        tl.store(pointer, to_bfloat16(value, INTERPRETED), mask=inside)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def inverse_or_floor(norm, FLOOR: tl.constexpr):
    """1 / max(norm, FLOOR), and exactly 1 / FLOOR at the floor: a division is approximate, and backward passes compare.

    NaN stays NaN.
    """
    return tl.where(norm <= FLOOR, 1.0 / FLOOR, 1.0 / norm)


@triton.jit
def has_bit(mask, index):
    return ((mask >> index) & 1) != 0


@triton.jit
def _rows_at(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    # On the pointer: a hint on the integer is lost in the cast, and loads come out 16 bits wide.
    if ALIGNED:
        pointer = tl.multiple_of(pointer, [16, 16] if len(pointer.shape) == 2 else [16, 16, 16])
    return pointer


@triton.jit
def read_rows(address, channel, inside, wide, half, TYPE: tl.constexpr, ALIGNED: tl.constexpr, UPCAST: tl.constexpr):
    """Rows at byte `address`, in the type they are stored in; float32 if blocks differ in type, or if UPCAST."""
    if TYPE == "fp32":
        x = tl.load(_rows_at(address, tl.float32, ALIGNED) + channel, mask=inside, other=0.0)
    elif TYPE == "bf16":
        x = tl.load(_rows_at(address, tl.bfloat16, ALIGNED) + channel, mask=inside, other=0.0)
    elif TYPE == "fp16":
        x = tl.load(_rows_at(address, tl.float16, ALIGNED) + channel, mask=inside, other=0.0)
    else:
        # Every element is behind exactly one of the three masks, so nothing is read twice.
        x = tl.load(_rows_at(address, tl.float32, ALIGNED) + channel, mask=inside & wide, other=0.0)
        bfloat = inside & (wide == 0) & (half == 0)
        x += tl.load(_rows_at(address, tl.bfloat16, ALIGNED) + channel, mask=bfloat, other=0.0).to(tl.float32)
        x += tl.load(_rows_at(address, tl.float16, ALIGNED) + channel, mask=inside & half, other=0.0).to(tl.float32)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def write_rows(address, channel, value, inside, wide, half, TYPE: tl.constexpr, ALIGNED: tl.constexpr,
           UPCAST: tl.constexpr):  # fmt: skip
    """float32 `value` rounded once to each row's own type."""
    if TYPE == "fp32":
        tl.store(_rows_at(address, tl.float32, ALIGNED) + channel, value, mask=inside)
    elif TYPE == "bf16":
        tl.store(_rows_at(address, tl.bfloat16, ALIGNED) + channel, to_bfloat16(value, UPCAST), mask=inside)
    elif TYPE == "fp16":
        tl.store(_rows_at(address, tl.float16, ALIGNED) + channel, value.to(tl.float16), mask=inside)
    else:
        tl.store(_rows_at(address, tl.float32, ALIGNED) + channel, value, mask=inside & wide)
        bfloat = inside & (wide == 0) & (half == 0)
        tl.store(_rows_at(address, tl.bfloat16, ALIGNED) + channel, to_bfloat16(value, UPCAST), mask=bfloat)
        tl.store(_rows_at(address, tl.float16, ALIGNED) + channel, value.to(tl.float16), mask=inside & half)
