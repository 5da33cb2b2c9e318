"""Counter-based random numbers (Philox 4x32-10) that are the same in numpy, in torch on any device, and in Triton.

Every random number of a run is a pure function of (seed, position, stream): the seed is the 64-bit key, the counter
words are (block, stream, position_lo, position_hi). Element e of a draw is word e % 4 of block e // 4, so a longer draw
begins with the shorter one, and no draw depends on the batch it is computed in.

Integers and uniforms equal `tl.philox` and `tl.random.uint_to_uniform_float` bit for bit. Normals are Triton's
`pair_uniform_to_normal` on the word pairs (0, 1) and (2, 3); logarithm, sine and cosine are rounded to float32 from
float64, so that devices agree with each other and with Triton's float32 functions to a few units in the last place.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import math
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from dit_fast.errors import UserError

_ROUNDS = 10
_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_SCALE = 4.6566127342e-10  # largest float32 whose product with 2^31 stays below 1
_SMALLEST = 1e-7  # log(0) is out of reach, as in Triton
_TWO_PI = 2 * math.pi


class Stream(IntEnum):
    """Second counter word: one per use of random numbers, so that uses never share a number."""

    SHARD_ORDER = 0
    SAMPLE_ORDER = 1
    POSTERIOR = 2
    TIME = 3
    NOISE = 4
    LABEL_DROP = 5
    # 6 was reserved for flips and stays unused: streams are never given a second meaning
    INITIAL_NOISE = 7
    CLASS_TOKEN = 8  # noise of the class token
    SECOND_TIME = 9
    TIMES_AGREE = 10  # whether a sample has one time or two
    OMEGA = 11  # scale of the guidance that a model is told
    GUIDED_FROM = 12  # least time with it
    GUIDED_TO = 13  # largest one
    SAMPLED_LABEL = 14  # class of an image that is sampled
    SAMPLER = 1024  # + sampling step
    METHOD = 65536  # first one free for methods
    SAMPLED_CLASS_TOKEN = 1 << 24  # + the image's stream, for a class token sampled with it


def philox4x32(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on counter words held in int64 tensors of one shape; four random words of that shape."""
    for key_a, key_b in _keys(seed):
        # The 64-bit product wraps into the sign bit; shift and mask still give its upper and lower 32 bits.
        product_a, product_b = c0 * _MULTIPLIER_A, c2 * _MULTIPLIER_B
        c0 = (product_b >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(key_a)
        c2 = (product_a >> 32).bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(key_b)
        c1, c3 = product_b.bitwise_and_(_MASK), product_a.bitwise_and_(_MASK)
    return c0, c1, c2, c3


def philox4x32_numpy(seed: int, *counter: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """numpy twin of `philox4x32`, in uint64."""
    c0, c1, c2, c3 = counter
    mask, half = np.uint64(_MASK), np.uint64(32)
    for key_a, key_b in _keys(seed):
        product_a, product_b = c0 * np.uint64(_MULTIPLIER_A), c2 * np.uint64(_MULTIPLIER_B)
        c0 = (product_b >> half) ^ c1 ^ np.uint64(key_a)
        c2 = (product_a >> half) ^ c3 ^ np.uint64(key_b)
        c1, c3 = product_b & mask, product_a & mask
    return c0, c1, c2, c3


def uint32(seed: int, positions: Tensor, stream: int, count: int) -> Tensor:
    """Random words as int64 [N, count] in [0, 2^32), on the device of `positions` (int64 [N], >= 0).

    seed: 0 <= seed < 2^64. Raises UserError for a seed, stream or count out of range, or positions of another type.
    """
    check(seed, positions, stream, count)
    size, blocks = positions.shape[0], -(-count // 4)
    c0 = torch.arange(blocks, dtype=torch.int64, device=positions.device).expand(size, blocks)
    c1 = torch.full_like(c0, int(stream), memory_format=torch.contiguous_format)
    c2 = (positions & _MASK)[:, None].expand(size, blocks)
    c3 = ((positions >> 32) & _MASK)[:, None].expand(size, blocks)
    return torch.stack(philox4x32(seed, c0, c1, c2, c3), dim=-1).flatten(1)[:, :count]


def uniform(seed: int, positions: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform float32 [N, *shape] in [0, 1) for positions int64 [N]; on their device."""
    return _to_uniform(uint32(seed, positions, stream, math.prod(shape))).reshape(-1, *shape)


def normal(seed: int, positions: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [N, *shape] for positions int64 [N]; on their device."""
    count = math.prod(shape)
    first, second = _to_uniform(uint32(seed, positions, stream, count + count % 2)).unflatten(1, (-1, 2)).unbind(-1)
    radius = first.clamp(min=_SMALLEST).double().log().float().mul(-2.0).sqrt()
    angle = second.mul(_TWO_PI).double()
    pairs = torch.stack((radius * angle.cos().float(), radius * angle.sin().float()), dim=-1)
    return pairs.flatten(1)[:, :count].reshape(-1, *shape)


def leaf_stream(name: str, image: int) -> int:
    """The stream of a leaf of what is denoised, where the image's is `image`; no leaf changes another's numbers.

    Raises UserError for a leaf of another name.
    """
    token = Stream.CLASS_TOKEN if image == Stream.NOISE else Stream.SAMPLED_CLASS_TOKEN + image
    streams = {"image": image, "class_token": token}
    if name not in streams:
        raise UserError(f"unknown leaf '{name}' of what is denoised; known: {', '.join(streams)}")
    return streams[name]


def uint32_numpy(seed: int, positions: np.ndarray, stream: int, count: int) -> np.ndarray:
    """numpy twin of `uint32`: int64 [N, count] for integer positions [N]."""
    _check(seed, stream, count)
    positions = np.asarray(positions)
    if positions.ndim != 1 or not np.issubdtype(positions.dtype, np.integer):
        raise UserError(f"positions must be integers [N], not {positions.dtype} {list(positions.shape)}")
    word = positions.astype(np.uint64)
    size, blocks = len(word), -(-count // 4)
    c0 = np.broadcast_to(np.arange(blocks, dtype=np.uint64), (size, blocks))
    c1 = np.full((size, blocks), int(stream), dtype=np.uint64)
    c2 = np.broadcast_to((word & np.uint64(_MASK))[:, None], (size, blocks))
    c3 = np.broadcast_to((word >> np.uint64(32))[:, None], (size, blocks))
    return np.stack(philox4x32_numpy(seed, c0, c1, c2, c3), axis=-1).reshape(size, -1)[:, :count].astype(np.int64)


def uniform_numpy(seed: int, positions: np.ndarray, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """numpy twin of `uniform`: float32 [N, *shape], the same bits."""
    words = uint32_numpy(seed, positions, stream, math.prod(shape))
    folded = np.where(words > 0x7FFFFFFF, _MASK - words, words)
    return (folded.astype(np.float32) * np.float32(_SCALE)).reshape(-1, *shape)


def _to_uniform(words: Tensor) -> Tensor:
    """Triton's map of a word, read as int32 with negative values folded, to float32 in [0, 1)."""
    return torch.where(words > 0x7FFFFFFF, _MASK - words, words).float().mul_(_SCALE)


def _keys(seed: int) -> list[tuple[int, int]]:
    low, high = seed & _MASK, seed >> 32
    return [((low + r * _WEYL_A) & _MASK, (high + r * _WEYL_B) & _MASK) for r in range(_ROUNDS)]


def check(seed: int, positions: Tensor, stream: int, count: int) -> None:
    """Raises UserError as `uint32`."""
    _check(seed, stream, count)
    if positions.dtype != torch.int64 or positions.dim() != 1:
        raise UserError(f"positions must be int64 [N], not {positions.dtype} {list(positions.shape)}")


def _check(seed: int, stream: int, count: int) -> None:
    if not 0 <= seed < 1 << 64:
        raise UserError(f"seed {seed} is out of range; use 0 <= seed < 2^64")
    if not 0 <= int(stream) <= _MASK or not 0 <= count <= 4 << 32:
        raise UserError(f"stream {int(stream)} or count {count} is out of range (32 bits)")
