"""Sum of all blocks' directions, kept for the taps; kernels/diversity.py launches it."""

import triton
import triton.language as tl

from dit_fast.kernels.rows import has_bit, read_rows


@triton.jit(do_not_specialize=("wide_blocks", "half_blocks"))
def add_directions(addresses, strides, inverse_norms, out, tokens, wide_blocks, half_blocks,
                   BLOCKS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr,
                   TYPE: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """out [tokens, WIDTH] = sum over blocks of x r, added in the order of the blocks; one program per STEP tokens."""
    token = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)
    channel = tl.arange(0, PADDED)
    inside = (token < tokens)[:, None] & (channel < WIDTH)[None, :]
    position = tl.zeros([1, 1], tl.int64)
    total = tl.zeros([STEP, PADDED], tl.float32)
    for block in range(0, BLOCKS):
        here = position + block
        address = (tl.load(addresses + block) + token * tl.load(strides + block))[:, None]
        inverse = tl.load(inverse_norms + here * tokens + token[:, None], mask=(token < tokens)[:, None], other=0.0)
        total += inverse * read_rows(
            address, channel[None, :], inside, has_bit(wide_blocks, here), has_bit(half_blocks, here),
            TYPE, ALIGNED, True)  # fmt: skip
    tl.store(out + token[:, None] * WIDTH + channel[None, :], total, mask=inside)
