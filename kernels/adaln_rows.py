"""Rows of streams [N, T, D] and vectors [N, D], of any of three types and with any strides, for the adaLN kernels.

A row is one tile wide. Padded width, rows of a tile and warps order the sums over a row, so they are functions of the
width alone.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.rows import to_bfloat16

Given = TypeVar("Given", Tensor, Tensor | None)

MAX_WIDTH = 2048
TOKENS = 8  # rows of a program of the forward, no less than those of a tile
TILE = 1024  # elements of a tile where rows are short
PER_WARP = 256  # 8 per thread: 16 bytes of a 16-bit type
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PURE, HALF, SINGLE = ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32")  # types of the stream and of all else
AUTOCAST = ("fp32", "bf16")


@triton.jit
def multiple(pointer, stride, ALIGNED: tl.constexpr):
    """The same stride, known to be a multiple of 16 bytes. A hint on the pointer is lost where additions combine."""
    VECTOR: tl.constexpr = (128 // pointer.dtype.element_ty.primitive_bitwidth) if ALIGNED else 1
    return stride // VECTOR * VECTOR


@triton.jit
def read_rows(pointer, token, strides, channel, inside, ALIGNED: tl.constexpr):
    place = pointer + token * multiple(pointer, strides[1], ALIGNED) + channel
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def read_vector(pointer, sample, stride, channel, whole, ALIGNED: tl.constexpr):
    place = pointer + sample * multiple(pointer, stride, ALIGNED) + channel
    return tl.load(place, mask=whole, other=0.0).to(tl.float32)


@triton.jit
def as_stored(pointer, value, INTERPRETED: tl.constexpr):
    """float32 `value` after rounding to the type that `pointer` points at."""
    if pointer.dtype.element_ty == tl.bfloat16:
        value = to_bfloat16(value, INTERPRETED).to(tl.float32)
    else:
        value = value.to(pointer.dtype.element_ty).to(tl.float32)
    return value


def by_rows(tensor: Given) -> Given:
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def has_aligned_rows(tensors: Sequence[Tensor | None], results: Sequence[torch.dtype]) -> bool:
    """Whether every row of every tensor starts at a multiple of 16 bytes where its first one does.

    results: types of further tensors of that width, contiguous.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        steps = [step for step, length in zip(tensor.stride()[:-1], tensor.shape, strict=False) if length > 1]
        if any(step * tensor.element_size() % 16 for step in (*steps, tensor.shape[-1])):
            return False
    width = next(tensor for tensor in tensors if tensor is not None).shape[-1]
    return not any(width * dtype.itemsize % 16 for dtype in results)


def tile_of(width: int) -> dict[str, int]:
    padded = max(16, triton.next_power_of_2(width))
    return {"WIDTH": width, "PADDED": padded, "ROWS": min(TOKENS, max(1, TILE // padded))}


def options_of(width: int, per_warp: int = PER_WARP) -> dict[str, Any]:
    tile = tile_of(width)
    warps = max(1, tile["PADDED"] * tile["ROWS"] // per_warp)
    return {"UPCAST": triton.knobs.runtime.interpret, "num_warps": warps, "num_stages": 1}


def strides_of(tensor: Tensor | None, like: Tensor) -> tuple[int, int]:
    tensor = like if tensor is None else tensor
    return tensor.stride(0), tensor.stride(1)
