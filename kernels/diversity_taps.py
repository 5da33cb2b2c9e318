r"""Backward of a gate, x = x' + g y with g per sample, to whose result's gradient from above, a, one more is added.

The diversity loss gives that one, b, for all blocks at once (kernels/diversity.py). Then

    dx' = a + b,    dy = g dx',    dg = sum over tokens of dx' y,

so a block that a gate wrote has no pass over the stream to add the two.

Bits. Rows of a tile and warps are functions of the width alone, as for a gate without a tap; CHUNK tokens of one sample
make a partial sum of dg, and `add_chunks` adds the chunks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.adaln_gradients import BLOCK, CHUNK, add_chunks
from dit_fast.kernels.adaln_rows import (
    AUTOCAST,
    HALF,
    PURE,
    has_aligned_rows,
    multiple,
    options_of,
    read_rows,
    read_vector,
    strides_of,
    tile_of,
)
from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.launch import Kept, launcher, signature
from dit_fast.kernels.rows import store_rounded


@triton.jit(do_not_specialize=("tokens", "chunks"))
def differentiate_tap(added, above, y, gate, grad_x, grad_y, partials,
                      tokens, chunks, above_strides, y_strides, gate_stride,
                      WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
                      ALIGNED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """added, grad_x, grad_y [N, T, D] contiguous, partials [N, chunks, D] of grad_gate. Program (n, chunk)."""
    sample = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    first = chunk * CHUNK
    channel = tl.arange(0, PADDED)[None, :]
    whole = channel < WIDTH
    gates = read_vector(gate, sample, gate_stride, channel, whole, ALIGNED)
    above += sample * multiple(above, above_strides[0], ALIGNED)
    y += sample * multiple(y, y_strides[0], ALIGNED)
    grad_gate = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(0, CHUNK, ROWS):
        token = first + start + tl.arange(0, ROWS)[:, None]
        inside = (token < tokens) & whole
        place = (sample * tokens + token) * WIDTH + channel
        total = tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        total += read_rows(above, token, above_strides, channel, inside, ALIGNED)
        store_rounded(grad_x + place, total, inside, UPCAST)
        store_rounded(grad_y + place, gates * total, inside, UPCAST)
        grad_gate += total * read_rows(y, token, y_strides, channel, inside, ALIGNED)
    column = tl.arange(0, PADDED)
    tl.store(partials + (sample * chunks + chunk) * WIDTH + column, tl.sum(grad_gate, 0), mask=column < WIDTH)


def backward(added: Tensor, above: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the stream, y and gate, contiguous, in the dtypes of added, y and gate.

    added, above: both parts of the gradient of the gate's result [N, T, D], not empty, added contiguous; y [N, T, D];
    gate [N, D]; all: last stride 1, any others, fp32, bf16 or fp16.
    """
    grad_x, grad_y, partials, plan = _differentiated(added, above, y, gate)
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    plan.add(partials, grad_gate, partials, partials)
    return grad_x, grad_y, grad_gate


def differentiate(added: Tensor, above: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward`, with partial sums [N, chunks, 1, D] in the place of the gate's gradient."""
    return _differentiated(added, above, y, gate)[:3]


class _Plan(NamedTuple):
    chunks: int
    differentiate: Callable[..., None]
    add: Callable[..., None]


_PLANS = Kept()


def _differentiated(added: Tensor, above: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor, _Plan]:
    key = signature(added, above, y, gate)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS.keep(key, _plan(added, above, y, gate))
    grad_x, grad_y = torch.empty_like(added), torch.empty_like(y, memory_format=torch.contiguous_format)
    partials = torch.empty(len(y), plan.chunks, 1, y.shape[-1], dtype=torch.float32, device=y.device)
    plan.differentiate(added, above, y, gate, grad_x, grad_y, partials)
    return grad_x, grad_y, partials, plan


def _plan(added: Tensor, above: Tensor, y: Tensor, gate: Tensor) -> _Plan:
    batch, tokens, width = added.shape
    chunks = triton.cdiv(tokens, CHUNK)
    numbers = (tokens, chunks, strides_of(above, added), strides_of(y, added), gate.stride(0))
    constants = {"CHUNK": CHUNK, "ALIGNED": has_aligned_rows([added, above, y, gate], [])}
    constants |= {**tile_of(width), **options_of(width), "enable_fp_fusion": True}
    sums = {"BLOCK": BLOCK, "RESIDUAL": True, "NORM": False, "SCALE_ONLY": False}
    sums |= {"UPCAST": triton.knobs.runtime.interpret, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    return _Plan(
        chunks,
        launcher(differentiate_tap, (batch, chunks), numbers, constants, {"ALIGNED": False}),
        launcher(add_chunks, (batch, triton.cdiv(width, BLOCK)), (chunks, width), sums),
    )


def aot_cases(arch: int) -> list[AotCase]:
    """Widths of SiT-B, L and XL, each with types of the stream and of the branch."""
    return [_case(*shape) for shape in ((768, PURE), (1024, HALF), (1152, PURE), (1152, AUTOCAST))]


def _case(width: int, types: tuple[str, str]) -> AotCase:
    options = options_of(width)
    constants = {**tile_of(width), "CHUNK": CHUNK, "ALIGNED": True, "UPCAST": options.pop("UPCAST")}
    kinds: dict[str, Any] = dict.fromkeys(("added", "above", "grad_x"), f"*{types[0]}") | {"partials": "*fp32"}
    kinds |= dict.fromkeys(("y", "gate", "grad_y"), f"*{types[1]}")
    kinds |= dict.fromkeys(("tokens", "chunks", "gate_stride"), "i32")
    kinds |= dict.fromkeys(("above_strides", "y_strides"), ("i32", "i32"))
    arguments = {name: kinds[name] for name in differentiate_tap.arg_names if name not in constants}
    return AotCase(
        differentiate_tap, f"D={width} {'+'.join(types)}", arguments, constants, options,
        unaligned=("tokens", "chunks"), wide_stores=True,
    )  # fmt: skip
