"""Backward kernels of the diversity statistics; kernels/diversity.py derives and launches them."""

import triton
import triton.language as tl

from dit_fast.kernels.diversity_sums import token_cosines
from dit_fast.kernels.rows import has_bit, read_rows, write_rows


@triton.jit
def _pair_weights(grad_pairs, wanted, row, BLOCKS: tl.constexpr):
    """H [ROWS, ROWS], zero in rows that are not wanted, and which blocks have to be read."""
    k = row[:, None]
    l = row[None, :]
    inside = (k < BLOCKS) & (l < BLOCKS) & has_bit(wanted, k)
    weights = tl.load(grad_pairs + k * BLOCKS + l, mask=inside, other=0.0)
    weights += tl.load(grad_pairs + l * BLOCKS + k, mask=inside, other=0.0)
    joined = tl.max((weights != 0).to(tl.int32), axis=0) > 0
    return weights, (joined | has_bit(wanted, row)) & (row < BLOCKS)


@triton.jit(do_not_specialize=("wanted", "wide_blocks", "half_blocks"))
def projections(addresses, strides, inverse_norms, grad_pairs, out, tokens, wanted, wide_blocks, half_blocks,
                BLOCKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr,
                GROUP: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """out [BLOCKS, tokens]: p of the wanted blocks."""
    group = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    weights, needed = _pair_weights(grad_pairs, wanted, row, BLOCKS)
    base = tl.load(addresses + row, mask=needed, other=0)
    stride = tl.load(strides + row, mask=needed, other=0)
    wide = has_bit(wide_blocks, row)
    half = has_bit(half_blocks, row)
    for token in range(group * GROUP, tl.minimum((group + 1) * GROUP, tokens)):
        position = row.to(tl.int64) * tokens + token
        inverse = tl.load(inverse_norms + position, mask=needed, other=0.0)
        cosines = token_cosines(base + token * stride, inverse, needed, wide, half,
                           ROWS, WIDTH, STRIP, TYPE, ALIGNED, UPCAST)  # fmt: skip
        projection = tl.where(inverse < 1e8, tl.sum(weights * cosines, axis=1), 0.0)
        tl.store(out + position, projection, mask=has_bit(wanted, row))


@triton.jit
def _mix(weights, x, TYPE: tl.constexpr, UPCAST: tl.constexpr):
    """weights @ x with float32 accuracy in the weights; x is exact in every one of these products."""
    if UPCAST:
        mixed = tl.dot(weights, x, input_precision="ieee")
    elif TYPE == "bf16":
        upper = weights.to(tl.bfloat16)
        mixed = tl.dot(upper, x)
        mixed = tl.dot((weights - upper.to(tl.float32)).to(tl.bfloat16), x, mixed)
    elif TYPE == "fp16":
        # Weights are too small for float16, but TF32 holds its values exactly.
        values = x.to(tl.float32)
        upper = (weights.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        mixed = tl.dot(upper, values, input_precision="tf32")
        mixed = tl.dot(weights - upper, values, mixed, input_precision="tf32")
    else:
        mixed = tl.dot(weights, x, input_precision="tf32x3")
    return mixed


@triton.jit(do_not_specialize=("wanted", "wide_blocks", "half_blocks"))
def gradients(addresses, strides, inverse_norms, projected, grad_statistics, grad_pairs, tokens, wanted,
              wide_blocks, half_blocks,
              BLOCKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr,
              TOKENS: tl.constexpr, UPSTREAM: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr,
              UPCAST: tl.constexpr):  # fmt: skip
    """dx of the wanted blocks; tables hold features, results, upstream; a program has STRIP channels, TOKENS tokens."""
    strip = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    channel = strip * STRIP + tl.arange(0, STRIP)
    written = has_bit(wanted, row) & (row < BLOCKS)
    weights, needed = _pair_weights(grad_pairs, wanted, row, BLOCKS)
    wide = has_bit(wide_blocks, row)[:, None]
    half = has_bit(half_blocks, row)[:, None]
    base = tl.load(addresses + row, mask=needed, other=0)
    stride = tl.load(strides + row, mask=needed, other=0)
    out_base = tl.load(addresses + BLOCKS + row, mask=written, other=0)
    out_stride = tl.load(strides + BLOCKS + row, mask=written, other=0)
    read_here = needed[:, None] & (channel < WIDTH)[None, :]
    write_here = written[:, None] & (channel < WIDTH)[None, :]
    coefficient = grad_statistics + row[:, None] * WIDTH + channel[None, :]
    constant = tl.load(coefficient, mask=write_here, other=0.0)
    signed = tl.load(coefficient + BLOCKS * WIDTH, mask=write_here, other=0.0)
    linear = 2.0 * tl.load(coefficient + 2 * BLOCKS * WIDTH, mask=write_here, other=0.0)
    if UPSTREAM:
        upstream_base = tl.load(addresses + 2 * BLOCKS + row, mask=written, other=0)
        upstream_stride = tl.load(strides + 2 * BLOCKS + row, mask=written, other=0)
    for token in range(group * TOKENS, tl.minimum((group + 1) * TOKENS, tokens)):
        position = row.to(tl.int64) * tokens + token
        inverse = tl.load(inverse_norms + position, mask=needed, other=0.0)
        projection = tl.load(projected + position, mask=written, other=0.0)
        address = (base + token * stride)[:, None]
        raw = read_rows(address, channel[None, :], read_here, wide, half, TYPE, ALIGNED, UPCAST)
        mixed = _mix(weights * inverse[None, :], raw, TYPE, UPCAST)
        x = raw.to(tl.float32)
        sign = (x > 0).to(tl.float32) - (x < 0).to(tl.float32)
        grad = constant + signed * sign + (linear - (inverse * inverse * projection)[:, None]) * x
        grad += inverse[:, None] * mixed
        if UPSTREAM:
            above = (upstream_base + token * upstream_stride)[:, None]
            grad += read_rows(above, channel[None, :], write_here, wide, half, TYPE, ALIGNED, True)
        address = (out_base + token * out_stride)[:, None]
        write_rows(address, channel[None, :], grad, write_here, wide, half, TYPE, ALIGNED, UPCAST)
