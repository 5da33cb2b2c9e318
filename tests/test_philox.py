"""Random numbers: published and Triton's known answers, the twins, and independence of the batch."""

import numpy as np
import pytest
import torch

from dit_fast import philox
from dit_fast.errors import UserError
from tests.helpers.cases import loop_over

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
PUBLISHED = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]

# triton 3.7.1 under its interpreter: tl.philox, uint_to_uniform_float and pair_uniform_to_normal for two blocks.
TRITON = [
    (
        (1234, 7, 4),
        [591352468, 78739804, 1754402623, 1098883392, 2613082651, 2042284772, 1623605454, 1370951647],
        [0.275369912, 0.0366660766, 0.816957295, 0.511707366, 0.783188522, 0.951012909, 0.756050169, 0.638399065],
        [1.56358242, 0.366728842, -0.634155333, -0.0467325449, 0.66626066, -0.211802796, -0.482476056, -0.571412206],
    ),
    (
        (0x123456789ABCDEF0, (5 << 32) + 17, 1030),
        [3318870372, 2836223177, 3846052984, 947975672, 2529360324, 1306771726, 3741702723, 4125372396],
        [0.454530507, 0.679280579, 0.209041998, 0.441435546, 0.822174728, 0.608512938, 0.257633865, 0.0789737701],
        [-0.539815187, -1.13383424, -1.65086603, 0.636460245, -0.485880226, -0.394366741, 1.44831586, 0.784100056],
    ),
    (
        (2**63 - 1, 2**40 + 3, 65536),
        [1860248643, 1677922275, 3218139305, 346954892, 2027888983, 3147643200, 1298629029, 1479146003],
        [0.866245747, 0.7813434, 0.501437068, 0.161563441, 0.944309354, 0.534264326, 0.604721189, 0.688780963],
        [0.104854621, -0.525527179, 0.61980474, 0.998196542, -0.330715418, -0.0723202676, -0.376354426, -0.92969507],
    ),
]


@loop_over(("counter", "key", "expected"), PUBLISHED)
def test_published_known_answers(counter, key, expected):
    seed = key[0] + (key[1] << 32)
    ours = philox.philox4x32(seed, *(torch.tensor([word]) for word in counter))
    twin = philox.philox4x32_numpy(seed, *(np.array([word], dtype=np.uint64) for word in counter))
    assert [word.item() for word in ours] == expected
    assert [int(word[0]) for word in twin] == expected


@loop_over(("key", "words", "uniforms", "normals"), TRITON)
def test_triton_known_answers(key, words, uniforms, normals):
    seed, position, stream = key
    positions = torch.tensor([position])
    assert philox.uint32(seed, positions, stream, 8).tolist() == [words]
    assert torch.equal(philox.uniform(seed, positions, stream, (8,)), torch.tensor([uniforms]))
    # Triton's float32 logarithm, sine and cosine may be a few units in the last place off.
    torch.testing.assert_close(
        philox.normal(seed, positions, stream, (8,)), torch.tensor([normals]), rtol=1e-6, atol=5e-7
    )


@loop_over("count", [1, 2, 3, 4, 5, 64, 1023])
@loop_over("seed", [0, 2**32 + 1, 2**64 - 1])
def test_numpy_twin_gives_the_same_bits(seed, count):
    positions = np.array([0, 1, 2**31, 2**32 - 1, 2**32, 2**62 + 5])
    twin = torch.from_numpy(positions)
    assert np.array_equal(philox.uint32_numpy(seed, positions, 3, count), philox.uint32(seed, twin, 3, count).numpy())
    ours = philox.uniform(seed, twin, 3, (count,)).numpy()
    assert ours.dtype == np.float32
    assert np.array_equal(philox.uniform_numpy(seed, positions, 3, (count,)), ours)


@loop_over("shape", [(), (1,), (7,), (3, 5, 5), (4, 16, 16)])
def test_draws_depend_on_their_position_alone(shape):
    positions = torch.arange(37)
    whole = philox.normal(5, positions, philox.Stream.NOISE, shape)
    assert whole.shape == (37, *shape)
    for part in (positions[:1], positions[3:20], positions.flip(0)[::3], positions[torch.randperm(37)]):
        assert torch.equal(philox.normal(5, part, philox.Stream.NOISE, shape), whole[part])


def test_a_longer_draw_begins_with_the_shorter():
    positions = torch.arange(5)
    assert torch.equal(philox.normal(1, positions, 4, (31,)), philox.normal(1, positions, 4, (64,))[:, :31])
    assert torch.equal(philox.uint32(1, positions, 4, 6), philox.uint32(1, positions, 4, 9)[:, :6])


def test_seed_position_and_stream_each_change_the_draw():
    draws = [philox.uint32(s, torch.tensor([p]), r, 4) for s, p, r in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]]
    draws += [philox.uint32(1 + 2**32, torch.tensor([2]), 3, 4), philox.uint32(1, torch.tensor([2 + 2**32]), 3, 4)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


def test_distributions():
    u = philox.uniform(9, torch.arange(1000), 0, (1000,))
    n = philox.normal(9, torch.arange(1000), 1, (1000,)).double()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.double().mean() - 0.5) < 2e-3  # about 6 standard errors
    assert abs(n.mean()) < 5e-3
    assert abs(n.square().mean() - 1) < 8e-3
    assert abs(n.pow(4).mean() - 3) < 6e-2
    assert abs((n[:, ::2] * n[:, 1::2]).mean()) < 8e-3


def test_uniform_never_reaches_one():
    largest = torch.tensor([0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0])
    assert philox._to_uniform(largest).tolist() == [pytest.approx(1), pytest.approx(1), 0, 0]
    assert philox._to_uniform(largest).max() < 1


def test_streams_do_not_overlap():
    values = [int(stream) for stream in philox.Stream]
    assert len(set(values)) == len(values)
    assert philox.Stream.SAMPLER + 10_000 < philox.Stream.METHOD


@loop_over(
    ("arguments", "message"),
    [
        ((-1, torch.arange(2), 0, 4), "seed -1"),
        ((2**64, torch.arange(2), 0, 4), "seed"),
        ((0, torch.arange(2), -1, 4), "stream"),
        ((0, torch.arange(2), 2**32, 4), "stream"),
        ((0, torch.arange(2.0), 0, 4), "positions"),
        ((0, torch.tensor(3), 0, 4), "positions"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        philox.uint32(*arguments)


def test_numpy_twin_refuses_floats():
    with pytest.raises(UserError, match="positions"):
        philox.uint32_numpy(0, np.arange(3.0), 0, 4)


def test_no_host_synchronisation():
    with torch._subclasses.FakeTensorMode():
        assert philox.normal(3, torch.arange(4), 0, (2, 3)).shape == (4, 2, 3)
