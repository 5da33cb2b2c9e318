"""Forward kernels of the diversity statistics; kernels/diversity.py derives and launches them."""

import triton
import triton.language as tl

from dit_fast.kernels.rows import has_bit, inverse_or_floor, read_rows


@triton.jit(do_not_specialize=("wide_blocks", "half_blocks"))
def block_sums(addresses, strides, partials, inverse_norms, tokens, wide_blocks, half_blocks,
               BLOCKS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
               STEP: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """inverse_norms [BLOCKS, tokens] and partials [chunks, 3, BLOCKS, WIDTH]; one program per block and chunk."""
    block = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, PADDED)
    base = tl.load(addresses + block)
    stride = tl.load(strides + block)
    wide = has_bit(wide_blocks, block + tl.zeros([1, 1], tl.int64))
    half = has_bit(half_blocks, block + tl.zeros([1, 1], tl.int64))
    sums = tl.zeros([PADDED], tl.float32)
    abs_sums = tl.zeros([PADDED], tl.float32)
    square_sums = tl.zeros([PADDED], tl.float32)
    last = tl.minimum((chunk + 1) * CHUNK, tokens)
    for start in range(chunk * CHUNK, last, STEP):
        token = start + tl.arange(0, STEP)
        inside = (token < last)[:, None] & (channel < WIDTH)[None, :]
        x = read_rows((base + token * stride)[:, None], channel[None, :], inside, wide, half, TYPE, ALIGNED, True)
        square = x * x
        norm = tl.sqrt(tl.sum(square, axis=1))
        tl.store(inverse_norms + block * tokens + token, inverse_or_floor(norm, 1e-8), mask=token < last)
        sums += tl.sum(x, axis=0)
        abs_sums += tl.sum(tl.abs(x), axis=0)
        square_sums += tl.sum(square, axis=0)
    out = partials + (chunk * 3 * BLOCKS + block) * WIDTH + channel
    tl.store(out, sums, mask=channel < WIDTH)
    tl.store(out + BLOCKS * WIDTH, abs_sums, mask=channel < WIDTH)
    tl.store(out + 2 * BLOCKS * WIDTH, square_sums, mask=channel < WIDTH)


@triton.jit(do_not_specialize=("wide_blocks", "half_blocks"))
def token_cosines(addresses, strides, inverse_norms, out, tokens, wide_blocks, half_blocks,
                  BLOCKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr,
                  TOKENS: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """out [tokens, BLOCKS, BLOCKS]: cosines of all pairs of each token's rows; a program has TOKENS tokens."""
    # Last tokens first: they are what block_sums left in the L2 cache.
    group = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0).to(tl.int64)
    token = group * TOKENS + tl.arange(0, TOKENS)
    row = tl.arange(0, ROWS)
    base = tl.load(addresses + row, mask=row < BLOCKS, other=0)
    stride = tl.load(strides + row, mask=row < BLOCKS, other=0)
    wide = has_bit(wide_blocks, row)[None, :, None]
    half = has_bit(half_blocks, row)[None, :, None]
    present = (token < tokens)[:, None] & (row < BLOCKS)[None, :]
    address = (base[None, :] + token[:, None] * stride[None, :])[:, :, None]
    gram = tl.zeros([TOKENS, ROWS, ROWS], tl.float32)
    for start in range(0, WIDTH, STRIP):
        channel = start + tl.arange(0, STRIP)
        inside = present[:, :, None] & (channel < WIDTH)[None, None, :]
        x = read_rows(address, channel[None, None, :], inside, wide, half, TYPE, ALIGNED, UPCAST)
        gram = tl.dot(x, tl.permute(x, (0, 2, 1)), gram, input_precision="tf32x3")
    place = row[None, :].to(tl.int64) * tokens + token[:, None]
    inverse = tl.load(inverse_norms + place, mask=present, other=0.0)
    place = (token[:, None, None] * BLOCKS + row[None, :, None]) * BLOCKS + row[None, None, :]
    inside = present[:, :, None] & (row < BLOCKS)[None, None, :]
    tl.store(out + place, gram * inverse[:, :, None] * inverse[:, None, :], mask=inside)
