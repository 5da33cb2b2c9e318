r"""Gradient of the diversity statistics on its way down a model: one block at a time, with the gradient from above.

With H = G + G^T of G = dL/d pair_sums, u the directions and X = sum of all u_l, a block k needs (kernels/diversity.py)

    v_k = sum_l H_kl u_l = c_k X + o_k u_k + sum over other l of w_kl u_l,

c_k the most frequent of its weights towards others, o_k = H_kk - c_k and w_kl = H_kl - c_k, most of which are zero:
`weigh_partners` finds them once per backward, so that a block reads its own row, X where there is one, and the rows of
the partners that are left, which are listed by number. Without X, c_k is zero. Of equally frequent weights the smallest
counts.

`differentiate_tap` adds to the gradient from above

    a = above + dL/dS + dL/dA sgn(x) + 2 dL/dQ x + r (v - p r x),   p = r v . x, or 0 below the floor of the norm.

Where x is the result of a gate, x = x' + g y with g per sample, it goes on to that op's own gradients: dx' = a,
dy = g a, dg = sum over tokens of a y. So a tap behind a gate has no launch and no pass over the stream of its own.

Bits. Padded width, rows of a tile and warps order the sum over a row and are functions of the width alone; CHUNK tokens
of one sample make a partial sum of dg, and `add_chunks` adds the chunks, as for a gate without a tap.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.adaln_gradients import BLOCK, CHUNK, add_chunks
from dit_fast.kernels.adaln_rows import has_aligned_rows, multiple, strides_of
from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.launch import Kept, launcher, signature
from dit_fast.kernels.rows import has_bit, read_rows, store_rounded, types_of
from dit_fast.kernels.tables import address_table, is_aligned


@triton.jit
def weigh_partners(grad_pairs, weights, sources, BLOCKS: tl.constexpr, PADDED: tl.constexpr, MIX: tl.constexpr):
    """weights [K, K + 1]: c, o, then w of the partners that are left; sources [K, K]: how many, then their numbers."""
    block = tl.program_id(0).to(tl.int64)
    partner = tl.arange(0, PADDED)
    inside = partner < BLOCKS
    weight = tl.load(grad_pairs + block * BLOCKS + partner, mask=inside, other=0.0)
    weight += tl.load(grad_pairs + partner * BLOCKS + block, mask=inside, other=0.0)
    other = inside & (partner != block)
    common = 0.0
    if MIX:
        alike = (weight[:, None] == weight[None, :]) & other[None, :]
        often = tl.where(other, tl.sum(alike.to(tl.int32), 1), -1)
        common = tl.min(tl.where(other & (often == tl.max(often, 0)), weight, float("inf")), 0)
        weight -= common
    own = tl.sum(tl.where(partner == block, weight, 0.0), 0)
    other = other & (weight != 0)
    place = tl.sum((other[None, :] & (partner[None, :] < partner[:, None])).to(tl.int32), 1)
    row = weights + block * (BLOCKS + 1)
    tl.store(row, common)
    tl.store(row + 1, own)
    tl.store(row + 2 + place, weight, mask=other)
    tl.store(sources + block * BLOCKS, tl.sum(other.to(tl.int32), 0))
    tl.store(sources + block * BLOCKS + 1 + place, partner, mask=other)


@triton.jit
def _stream(pointer, sample, token, strides, channel, inside, ALIGNED: tl.constexpr):
    place = pointer + sample * multiple(pointer, strides[0], ALIGNED) + token * multiple(pointer, strides[1], ALIGNED)
    return tl.load(place + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=("tokens", "chunks", "block", "wide_blocks", "half_blocks"))
def differentiate_tap(x, above, y, gate, mixture, inverse_norms, grad_statistics, weights, sources, addresses, strides,
                      grad_x, grad_y, partials, tokens, chunks, block, wide_blocks, half_blocks,
                      x_strides, above_strides, y_strides, gate_stride,
                      BLOCKS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
                      CHUNK: tl.constexpr, ABOVE: tl.constexpr, GATE: tl.constexpr, MIX: tl.constexpr,
                      TYPE: tl.constexpr, ALIGNED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """grad_x, grad_y [N, T, D] contiguous, partials [N, chunks, D] of grad_gate. A program has one chunk of one sample.

    ABOVE: there is a gradient from above. GATE: there are y and what follows from it. MIX: there is a mixture. TYPE is
    that of all blocks' rows, which lie at `addresses`.
    """
    program = tl.program_id(0).to(tl.int64)
    sample, chunk = program // chunks, program % chunks
    count = tl.num_programs(0).to(tl.int64) // chunks * tokens
    block = block.to(tl.int64)
    first = chunk * CHUNK
    channel = tl.arange(0, PADDED)[None, :]
    whole = channel < WIDTH
    coefficient = grad_statistics + block * WIDTH + channel
    constant = tl.load(coefficient, mask=whole, other=0.0)
    signed = tl.load(coefficient + BLOCKS * WIDTH, mask=whole, other=0.0)
    linear = 2.0 * tl.load(coefficient + 2 * BLOCKS * WIDTH, mask=whole, other=0.0)
    weights += block * (BLOCKS + 1)
    sources += block * BLOCKS
    common = tl.load(weights)
    own = tl.load(weights + 1)
    partners = tl.load(sources)
    if GATE:
        gates = tl.load(gate + sample * multiple(gate, gate_stride, ALIGNED) + channel, mask=whole, other=0.0)
        gates = gates.to(tl.float32)
        grad_gate = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(0, CHUNK, ROWS):
        token = first + start + tl.arange(0, ROWS)[:, None]
        present = token < tokens
        inside = present & whole
        row = sample * tokens + token
        stream = _stream(x, sample, token, x_strides, channel, inside, ALIGNED)
        inverse = tl.load(inverse_norms + block * count + row, mask=present, other=0.0)
        mixed = own * inverse * stream
        if MIX:
            mixed += common * tl.load(mixture + row * WIDTH + channel, mask=inside, other=0.0)
        for i in range(0, partners):
            source = tl.load(sources + 1 + i).to(tl.int64)
            here = source + tl.zeros([1, 1], tl.int64)
            norm = tl.load(inverse_norms + source * count + row, mask=present, other=0.0)
            address = tl.load(addresses + source) + row * tl.load(strides + source)
            mixed += tl.load(weights + 2 + i) * norm * read_rows(
                address, channel, inside, has_bit(wide_blocks, here), has_bit(half_blocks, here),
                TYPE, ALIGNED, True)  # fmt: skip
        along = tl.where(inverse < 1e8, tl.sum(mixed * stream, 1)[:, None] * inverse, 0.0)
        sign = (stream > 0).to(tl.float32) - (stream < 0).to(tl.float32)
        total = constant + signed * sign + linear * stream + inverse * (mixed - along * inverse * stream)
        if ABOVE:
            total += _stream(above, sample, token, above_strides, channel, inside, ALIGNED)
        store_rounded(grad_x + row * WIDTH + channel, total, inside, UPCAST)
        if GATE:
            store_rounded(grad_y + row * WIDTH + channel, gates * total, inside, UPCAST)
            grad_gate += total * _stream(y, sample, token, y_strides, channel, inside, ALIGNED)
    if GATE:
        column = tl.arange(0, PADDED)
        place = partials + (sample * chunks + chunk) * WIDTH + column
        tl.store(place, tl.sum(grad_gate, 0), mask=column < WIDTH)


class Partners(NamedTuple):
    """What all taps of one backward share, for K blocks, as `weigh_partners` and `address_table` give it."""

    weights: Tensor
    sources: Tensor
    rows: tuple[Tensor, Tensor]
    aligned: bool


def partners(features: Sequence[Tensor], grad_pairs: Tensor, mix: bool) -> Partners:
    """Of K <= 32 features [M, D] as in kernels/diversity.py and grad_pairs [K, K]; mix: there is a mixture."""
    blocks, features = len(features), list(features)
    weights = torch.empty(blocks, blocks + 1, dtype=torch.float32, device=grad_pairs.device)
    sources = torch.empty(blocks, blocks, dtype=torch.int32, device=grad_pairs.device)
    weigh_partners[(blocks,)](
        grad_pairs.float().contiguous(), weights, sources,
        BLOCKS=blocks, PADDED=_padded(blocks), MIX=mix, num_warps=1, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return Partners(weights, sources, address_table(features), is_aligned(features))


def _padded(blocks: int) -> int:
    return 16 if blocks <= 16 else 32


def _tile(width: int) -> dict[str, Any]:
    """Two rows at least: rows at an address have a hint of two dimensions, which the compiler cannot keep for one."""
    padded = max(128, triton.next_power_of_2(width))
    rows = max(2, min(8, 1024 // padded))
    options = {"num_warps": max(1, padded * rows // 512), "num_stages": 1}
    return {"WIDTH": width, "PADDED": padded, "ROWS": rows, "UPCAST": triton.knobs.runtime.interpret, **options}


def backward(
    x: Tensor, above: Tensor | None, y: Tensor | None, gate: Tensor | None, block: int, shared: Partners,
    inverse_norms: Tensor, grad_statistics: Tensor, mixture: Tensor | None, dtypes: tuple[torch.dtype, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, or of the stream, y and gate where those two are given; contiguous, in their dtypes.

    x: the tapped output [N, T, D], not empty; above: its gradient from above, or None; y [N, T, D]; gate [N, D]; all:
    last stride 1, any others, fp32, bf16 or fp16. inverse_norms [K, N T] and grad_statistics [3, K, D]:
    float32, contiguous, as in kernels/diversity.py; mixture: float32 [N T, D], or None; dtypes: of all features.
    """
    grad_x, grad_y, partials, plan = _differentiated(
        x, above, y, gate, block, shared, inverse_norms, grad_statistics, mixture, dtypes
    )
    grad_gate = None
    if partials is not None and gate is not None:
        grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        plan.add(partials, grad_gate, partials, partials)
    return grad_x, grad_y, grad_gate


def differentiate(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward` of a block behind a gate, with partial sums [N, chunks, 1, D] in the place of the gate's."""
    return _differentiated(*given)[:3]  # type: ignore[return-value]


def _differentiated(
    x: Tensor, above: Tensor | None, y: Tensor | None, gate: Tensor | None, block: int, shared: Partners,
    inverse_norms: Tensor, grad_statistics: Tensor, mixture: Tensor | None, dtypes: tuple[torch.dtype, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None, "_Plan"]:  # fmt: skip
    batch, _, width = x.shape
    key = (signature(x, above, y, gate), block, len(inverse_norms), mixture is None, dtypes, shared.aligned)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS.keep(
            key, _plan(x, above, y, gate, block, len(inverse_norms), mixture is not None, dtypes, shared)
        )
    contiguous = torch.contiguous_format
    grad_x = torch.empty_like(x, memory_format=contiguous)
    grad_y = partials = None
    if y is not None and gate is not None:
        grad_y = torch.empty_like(y, memory_format=contiguous)
        partials = torch.empty(batch, plan.chunks, 1, width, dtype=torch.float32, device=x.device)
    given = [x if each is None else each for each in (above, y, gate, mixture)]
    places = [grad_x if each is None else each for each in (grad_y, partials)]
    of_all = (inverse_norms, grad_statistics, shared.weights, shared.sources, *shared.rows)
    plan.differentiate(x, *given, *of_all, grad_x, *places)
    return grad_x, grad_y, partials, plan


class _Plan(NamedTuple):
    chunks: int
    differentiate: Callable[..., None]
    add: Callable[..., None]


_PLANS = Kept()


def _plan(
    x: Tensor, above: Tensor | None, y: Tensor | None, gate: Tensor | None, block: int, blocks: int, mix: bool,
    dtypes: tuple[torch.dtype, ...], shared: Partners,
) -> _Plan:  # fmt: skip
    (batch, tokens, width), (kind, masks) = x.shape, types_of(dtypes)
    chunks = triton.cdiv(tokens, CHUNK)
    strides = (*(strides_of(each, x) for each in (x, above, y)), 0 if gate is None else gate.stride(0))
    aligned = shared.aligned and has_aligned_rows([x, above, y, gate], [])
    constants = {
        "BLOCKS": blocks, "CHUNK": CHUNK, "ABOVE": above is not None, "GATE": y is not None, "MIX": mix, "TYPE": kind,
        "ALIGNED": aligned, **_tile(width), "enable_fp_fusion": True,
    }  # fmt: skip
    numbers = (tokens, chunks, block, *masks, *strides)
    sums = {"BLOCK": BLOCK, "RESIDUAL": True, "NORM": False, "SCALE_ONLY": False}
    sums |= {"UPCAST": triton.knobs.runtime.interpret, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    return _Plan(
        chunks,
        launcher(differentiate_tap, (batch * chunks,), numbers, constants, unaligned={"ALIGNED": False}),
        launcher(add_chunks, (batch, triton.cdiv(width, BLOCK)), (chunks, width), sums),
    )


def aot_cases(arch: int) -> list[AotCase]:
    """Widths and depths of SiT-B, L and XL: a tap behind a gate and one alone, with and without a mixture."""
    launch: dict[str, Any] = {"num_warps": 1, "num_stages": 1}
    pointers = {"grad_pairs": "*fp32", "weights": "*fp32", "sources": "*i32"}
    cases = [
        AotCase(
            weigh_partners, f"K={blocks}{' mixture' if mix else ''}", pointers,
            {"BLOCKS": blocks, "PADDED": _padded(blocks), "MIX": mix}, launch, wide_loads=False,
        )
        for blocks, mix in ((12, True), (24, False), (28, True), (28, False))
    ]  # fmt: skip
    return [
        *cases,
        _case(differentiate_tap, 12, 768, "bf16", "bf16", True, True, True),
        _case(differentiate_tap, 24, 1024, "fp16", "fp16", True, False, True),
        _case(differentiate_tap, 24, 1024, "fp16", "fp16", True, True, False),
        _case(differentiate_tap, 28, 1152, "fp32", "fp32", True, True, True),
        _case(differentiate_tap, 28, 1152, "fp32", "fp32", True, True, False),
        _case(differentiate_tap, 28, 1152, "fp32", "fp32", False, True, False),
        _case(differentiate_tap, 28, 1152, "bf16", "bf16", True, True, False),
        _case(differentiate_tap, 28, 1152, "mixed", "bf16", False, True, True),
    ]  # fmt: skip


def _case(kernel: Any, blocks: int, width: int, kind: str, own: str, gated: bool, above: bool, mix: bool) -> AotCase:
    tile = _tile(width)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    constants: dict[str, Any] = {**tile, "CHUNK": CHUNK, "BLOCKS": blocks, "TYPE": kind, "ALIGNED": True}
    constants |= {"ABOVE": above, "GATE": gated, "MIX": mix}
    branch = "bf16" if own == "fp32" else own
    kinds: dict[str, Any] = dict.fromkeys(("x", "above", "grad_x"), f"*{own}")
    kinds |= dict.fromkeys(("y", "gate", "grad_y"), f"*{branch if gated else own}")
    kinds |= {"mixture": "*fp32" if mix else f"*{own}", "partials": "*fp32" if gated else f"*{own}"}
    kinds |= dict.fromkeys(("inverse_norms", "grad_statistics", "weights"), "*fp32")
    kinds |= {"sources": "*i32", "addresses": "*i64", "strides": "*i64"}
    kinds |= dict.fromkeys(("tokens", "chunks", "block", "wide_blocks", "half_blocks", "gate_stride"), "i32")
    kinds |= dict.fromkeys(("x_strides", "above_strides", "y_strides"), ("i32", "i32"))
    signature = {name: kinds[name] for name in kernel.arg_names if name not in constants}
    shown = " ".join(name for name, there in (("gate", gated), ("above", above), ("mixture", mix)) if there)
    return AotCase(
        kernel, f"K={blocks} D={width} {kind}+{own} {shown}", signature, constants, options,
        unaligned=("tokens", "chunks", "block", "wide_blocks", "half_blocks"), wide_stores=True,
    )  # fmt: skip
