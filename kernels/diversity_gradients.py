"""Backward kernels of the diversity statistics; kernels/diversity.py derives and launches them."""

import triton
import triton.language as tl

from dit_fast.kernels.rows import has_bit, read_rows, write_rows


@triton.jit
def _pair_weights(grad_pairs, wanted, row, BLOCKS: tl.constexpr):
    """H [ROWS, ROWS], zero in rows that are not wanted, and which blocks have to be read."""
    k = row[:, None]
    l = row[None, :]
    inside = (k < BLOCKS) & (l < BLOCKS) & has_bit(wanted, k)
    weights = tl.load(grad_pairs + l * BLOCKS + k, mask=inside, other=0.0)
    weights += tl.load(grad_pairs + k * BLOCKS + l, mask=inside, other=0.0)
    joined = tl.max((weights != 0).to(tl.int32), axis=0) > 0
    return weights, (joined | has_bit(wanted, row)) & (row < BLOCKS)


@triton.jit(do_not_specialize=("wanted",))
def projections(cosines, inverse_norms, grad_pairs, out, tokens, wanted,
                BLOCKS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """out [tokens, 2, BLOCKS]: r and r^2 p, where a program of `gradients` finds those of one token side by side."""
    row = tl.arange(0, ROWS)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    weights, _ = _pair_weights(grad_pairs, wanted, row, BLOCKS)
    place = (token[:, None, None] * BLOCKS + row[None, :, None]) * BLOCKS + row[None, None, :]
    # Cosines without a weight may be NaN.
    inside = (token < tokens)[:, None, None] & (weights != 0)[None, :, :]
    projection = tl.sum(weights[None, :, :] * tl.load(cosines + place, mask=inside, other=0.0), axis=2)
    present = (token < tokens)[:, None] & (row < BLOCKS)[None, :]
    place = row[None, :].to(tl.int64) * tokens + token[:, None]
    inverse = tl.load(inverse_norms + place, mask=present, other=0.0)
    place = token[:, None] * 2 * BLOCKS + row[None, :]
    tl.store(out + place, inverse, mask=present)
    tl.store(out + place + BLOCKS, tl.where(inverse < 1e8, inverse * inverse * projection, 0.0), mask=present)


@triton.jit
def _mix(weights, y, TYPE: tl.constexpr, UPCAST: tl.constexpr):
    """weights @ y with almost float32 accuracy: each of the two in two parts, without the product of the lower ones."""
    if UPCAST:
        mixed = tl.dot(weights, y, input_precision="ieee")
    elif TYPE == "bf16":
        upper = weights.to(tl.bfloat16)
        first = y.to(tl.bfloat16)
        mixed = tl.dot(upper, first)
        mixed = tl.dot((weights - upper.to(tl.float32)).to(tl.bfloat16), first, mixed)
        mixed = tl.dot(upper, (y - first.to(tl.float32)).to(tl.bfloat16), mixed)
    else:
        mixed = tl.dot(weights, y, input_precision="tf32x3")
    return mixed


@triton.jit(do_not_specialize=("wanted", "wide_blocks", "half_blocks"))
def gradients(addresses, strides, scales, grad_statistics, grad_pairs, tokens, wanted, wide_blocks, half_blocks,
              BLOCKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr,
              TOKENS: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """dx of the wanted blocks; tables hold features and results; a program has STRIP channels, TOKENS tokens."""
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
    for token in range(group * TOKENS, tl.minimum((group + 1) * TOKENS, tokens)):
        place = scales + token * 2 * BLOCKS + row
        inverse = tl.load(place, mask=needed, other=0.0)
        slope = tl.load(place + BLOCKS, mask=written, other=0.0)
        address = (base + token * stride)[:, None]
        raw = read_rows(address, channel[None, :], read_here, wide, half, TYPE, ALIGNED, UPCAST)
        x = raw.to(tl.float32)
        sign = (x > 0).to(tl.float32) - (x < 0).to(tl.float32)
        grad = constant + signed * sign + (linear - slope[:, None]) * x
        grad += inverse[:, None] * _mix(weights, inverse[:, None] * x, TYPE, UPCAST)
        address = (out_base + token * out_stride)[:, None]
        write_rows(address, channel[None, :], grad, write_here, wide, half, TYPE, ALIGNED, UPCAST)
