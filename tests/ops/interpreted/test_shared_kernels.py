"""Kernels that others build on: the ordered sum, the address table, the generator."""

import math
from functools import partial

import pytest
import torch
import triton
import triton.language as tl

from dit_fast import philox
from dit_fast.kernels import adaln, adaln_gradients, adaln_rows, diversity, diversity_taps, qk_norm
from dit_fast.kernels import ordered_sum as ordered
from dit_fast.kernels import philox as kernel
from dit_fast.kernels.ordered_sum import CHUNK, COLUMNS, GROUP, ordered_sum, sums_of, takes
from dit_fast.kernels.tables import address_table, is_aligned
from dit_fast.ops import linear
from dit_fast.ops.draws import draws


@pytest.mark.parametrize("rows", [1, GROUP, GROUP + 1, 3 * GROUP + 5])
@pytest.mark.parametrize("columns", [1, 515])
def test_rows_are_added_by_groups_in_float64(rows, columns):
    partials = torch.randn(rows, columns) * 10.0 ** torch.randint(-6, 6, (rows, 1))
    groups = []
    for group in partials.double().split(GROUP):
        total = torch.zeros(columns, dtype=torch.float64)
        for row in group:
            total = total + row
        groups.append(total)
    expected = torch.zeros(columns, dtype=torch.float64)
    for total in groups:
        expected = expected + total
    assert torch.equal(ordered_sum(partials), expected.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (CHUNK, COLUMNS), (CHUNK + 1, COLUMNS + 24), (3 * CHUNK - 1, 40)])
def test_parts_are_joined_and_added_up(rows, width, dtype):
    parts = [torch.randn(rows, width).to(dtype) for _ in range(3)]
    for count in (1, 2, 3):
        joined, sums = sums_of(*parts[:count])
        assert torch.equal(joined, torch.cat(parts[:count], 1))
        exact, most = joined.double().sum(0), joined.double().abs().sum(0)
        assert ((sums.double() - exact).abs() <= 2e-7 * most + 1e-12).all(), "a few roundings of partial sums"
        assert torch.equal(sums, sums_of(joined)[1]), "the order is that of the rows alone"
    assert sums_of(parts[0])[0] is parts[0]


def test_which_sums_are_taken():
    x = torch.zeros(4, 8)
    assert takes([x])
    assert takes([x] * 3)
    for parts in ([x] * 4, [x.double()], [x, x.half()], [x, x[:3]], [x[:, ::2]], [x[:0]]):
        assert not takes(parts)


def test_the_kernel_sums_where_there_are_rows_enough_and_no_other_derivative(monkeypatch):
    calls = []
    monkeypatch.setattr(ordered, "sums_of", lambda *parts: calls.append(len(parts)) or sums_of(*parts))
    monkeypatch.setattr(linear, "FEWEST_ROWS", 4)
    parts = [torch.randn(5, 8).bfloat16() for _ in range(3)]
    run = partial(linear.joined_sum, dtype=torch.float32)
    run(parts)
    with torch.no_grad():
        joined, sums = run(parts)
        assert torch.equal(joined, torch.cat(parts, 1))
        torch.testing.assert_close(sums, joined.float().sum(0))
        assert run(parts[:1])[0] is parts[0]
        run([part[:3] for part in parts])
        torch.func.vmap(lambda x: linear.sum_of_rows(x, torch.float32))(torch.stack(parts))
    assert calls == [3, 1]


def test_the_table_holds_addresses_and_byte_strides():
    buffer = torch.zeros(6, 40, dtype=torch.bfloat16)
    tensors = [buffer[:, 8:16], buffer[1:, 3:5], torch.zeros(5, 7), torch.zeros(5, 4)]
    addresses, strides = address_table(tensors)
    assert addresses.tolist() == [tensor.data_ptr() for tensor in tensors]
    assert strides.tolist() == [80, 80, 28, 16]
    assert [is_aligned([tensor]) for tensor in tensors] == [True, False, False, True]
    assert not is_aligned(tensors)


BF16, FP32 = torch.bfloat16, torch.float32
LAYOUTS = {  # dtype, sizes, strides, offset, whether every row of the last dimension is whole 16-byte pieces
    "contiguous": (BF16, (2, 3, 16), (48, 16, 1), 0, True),
    "behind 16 bytes": (BF16, (2, 3, 16), (48, 16, 1), 8, True),
    "behind 14 bytes": (BF16, (2, 3, 16), (48, 16, 1), 7, False),
    "row of 24 bytes": (BF16, (2, 3, 12), (36, 12, 1), 0, False),
    "row of 24 bytes, steps of 32": (BF16, (2, 3, 12), (48, 16, 1), 0, False),
    "the same numbers in float32": (FP32, (2, 3, 12), (36, 12, 1), 0, True),
    "token step of 40 bytes": (BF16, (2, 3, 16), (80, 20, 1), 0, False),
    "sample step of 104 bytes": (BF16, (2, 3, 16), (52, 16, 1), 0, False),
    "one sample, whose step is never taken": (BF16, (1, 3, 16), (52, 16, 1), 0, True),
    "one token, whose step is never taken": (BF16, (2, 1, 16), (48, 20, 1), 0, True),
    "part of a modulation": (BF16, (2, 16), (48, 1), 16, True),
    "odd part of a modulation": (BF16, (2, 16), (48, 1), 12, False),
    "heads": (FP32, (2, 3, 2, 4), (24, 8, 4, 1), 0, True),
    "heads of 24 bytes": (FP32, (2, 3, 2, 6), (40, 12, 6, 1), 0, False),
    "heads apart by 24 bytes": (FP32, (2, 3, 2, 4), (40, 16, 6, 1), 0, False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_wide_accesses_only_where_every_row_starts_at_16_bytes(name):
    dtype, sizes, strides, offset, whole = LAYOUTS[name]
    tensor, aligned = torch.zeros(200, dtype=dtype).as_strided(sizes, strides, offset), torch.zeros(4, 16, dtype=dtype)
    starts = tensor.data_ptr() % 16 == 0  # which `launcher` looks at
    assert (adaln_rows.has_aligned_rows([None, aligned, tensor], []) and starts) == whole
    assert qk_norm._vector(sizes[-1], [tensor]) == (16 // tensor.element_size() if whole else 1)
    assert qk_norm._vector(16, [aligned, tensor]) == qk_norm._vector(16, [tensor])


def shifted(tensor):
    """The same values and strides, four bytes further on."""
    base = torch.zeros(tensor.numel() + 1)[1:].view(tensor.shape)
    return base.copy_(tensor)


def apart(tensor):
    """The same values at an aligned address, rows four bytes apart."""
    return torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)[..., :-1].copy_(tensor)


STREAM, VECTOR, HEADS, ROWS = (2, 3, 16), (2, 16), (2, 3, 2, 4), (6, 16)
LAUNCHES = {  # shapes of what a launcher reads in wide pieces, how to call it with them, who decides or is launched
    "adaln forward": (
        [STREAM, STREAM, VECTOR, VECTOR, VECTOR],
        lambda *x: adaln.forward(*x, 1e-6, False, None, FP32, True),
        (adaln, "modulate_rows"),
    ),
    "adaln backward": (
        [STREAM, STREAM, STREAM, STREAM, VECTOR, VECTOR],
        lambda *x: adaln.backward(*x, torch.zeros(2, 3), torch.ones(2, 3), 1e-6, False, True, FP32, FP32, [FP32] * 3),
        (adaln_gradients, "differentiate_rows"),
    ),
    "qk_norm forward": (
        [(2, 3, 24)],
        lambda qkv: qk_norm.forward(qkv, 2, *torch.ones(4, 4), None, None, 1e-5, "layer"),
        (qk_norm, "_vector"),
    ),
    "qk_norm backward": (
        [HEADS, HEADS, HEADS, (2, 3, 24)],
        lambda *x: qk_norm.backward(*x, *torch.ones(2, 4), None, None, 1e-5, "layer", True, True, True),
        (qk_norm, "_vector"),
    ),
    "diversity forward": ([ROWS] * 2, lambda *x: diversity.forward(x), (diversity, "is_aligned")),
    "diversity backward": (
        [ROWS] * 2,
        lambda a, b: diversity.backward(
            [a, b], torch.ones(2, 6), torch.ones(6, 2, 2), torch.ones(3, 2, 16), torch.ones(2, 2), [0, 1]
        ),
        (diversity, "is_aligned"),
    ),
    "diversity backward of one block": (
        [ROWS] * 2,
        lambda a, b: diversity.backward(
            [a, b], torch.ones(2, 6), torch.ones(6, 2, 2), torch.ones(3, 2, 16), torch.ones(2, 2), [1]
        ),
        (diversity, "is_aligned"),
    ),
    "diversity taps": (
        [STREAM] * 2 + [VECTOR],  # from above, the branch and its gate
        lambda *x: diversity_taps.backward(torch.ones(STREAM), *x),
        (diversity_taps, "differentiate_tap"),
    ),
}  # fmt: skip

KEPT = (
    adaln._FORWARD, adaln_gradients._BACKWARD, qk_norm._FORWARD, qk_norm._BACKWARD, diversity_taps._PLANS,
    diversity._LAUNCHES,
)  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_every_tensor_that_is_read_counts(name, monkeypatch):
    shapes, launch, (module, rule) = LAUNCHES[name]
    answers, decide = [], getattr(module, rule)

    class Recorded:
        def __call__(self, *arguments):
            answers.append(decide(*arguments))
            return answers[-1]

        def __getitem__(self, grid):
            return lambda *arguments, **constants: self.run(*arguments, grid=grid, **constants)

        def run(self, *arguments, grid, warmup=False, **constants):
            answers.append(constants["ALIGNED"])
            return decide[grid](*arguments, **constants)

    monkeypatch.setattr(module, rule, Recorded())

    def is_wide(*given):
        """Of all launches, of which one may read less than the others."""
        answers.clear()
        launch(*given)
        return all(answer > 1 if rule == "_vector" else answer for answer in answers)

    tensors = [torch.randn(shape) for shape in shapes]
    for change in (shifted, apart):
        for place in range(len(tensors)):
            for kept in KEPT:
                kept.clear()
            assert is_wide(*tensors)  # what was kept of this one must not serve the next
            assert not is_wide(*(change(x) if i == place else x for i, x in enumerate(tensors)))


def normals_of(uniforms):
    """As dit_fast/philox.py, with the nearest root, which torch's on a CPU often misses."""
    first, second = uniforms.unflatten(1, (-1, 2)).unbind(-1)
    radius = first.clamp(min=1e-7).double().log().float().mul(-2.0).double().sqrt().float()
    angle = second.mul(2 * math.pi).double()
    return torch.stack((radius * angle.cos().float(), radius * angle.sin().float()), dim=-1).flatten(1)


@pytest.mark.parametrize("seed", [0, 1234, 2**63 - 1, 2**63, 2**64 - 1])
def test_generator_equals_its_torch_twin(seed):
    """Several draws in one launch, all bits: after a draw of an odd length, and longer than what a program has."""
    positions = torch.tensor([0, 17, 2**32 - 1, 2**32, 2**62 + 12345])
    shapes = [(7, 11), (), (4, 7), (1030,), (1024,), (3, 2, 342)]
    asked = [(bool(place % 2), 2**31 - 3 + place, shape) for place, shape in enumerate(shapes)]
    for wanted in (asked, asked[::-1], asked[3:4]):
        for (normal, stream, shape), ours in zip(wanted, draws(seed, positions, wanted, "triton"), strict=True):
            expected = philox.uniform(seed, positions, stream, (math.prod(shape) + math.prod(shape) % 2,))
            if normal:
                expected = normals_of(expected)
                twin = philox.normal(seed, positions, stream, shape)
                torch.testing.assert_close(ours, twin, rtol=2.5e-7, atol=0)  # by that root
            assert ours.is_contiguous()
            assert torch.equal(ours, expected[:, : math.prod(shape)].reshape(-1, *shape))


@triton.jit
def _pairs(u, v, first, second, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    one, two = kernel.rounded_normal_pair(tl.load(u + place), tl.load(v + place))
    tl.store(first + place, one)
    tl.store(second + place, two)


def test_normals_of_extreme_uniforms():
    """The ends, where the series meet, and every 4096th float32 that a uniform can be; once, all were compared."""
    large = [torch.arange(2**power, 2 ** (power + 1), 2 ** (power - 11)) for power in range(24, 31)]
    words = torch.cat([torch.arange(0, 2**24, 4096), *large])
    edges = torch.tensor([0.0, 1e-7, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 2**-0.5, 1 - 2**-24])
    near = torch.cat([edges, edges.nextafter(torch.tensor(1.0)), edges.nextafter(torch.tensor(0.0))])
    u = torch.cat([words.float() * 4.6566127342e-10, near])
    u = torch.cat([u, torch.zeros(-len(u) % 1024)])
    first, second = torch.empty_like(u), torch.empty_like(u)
    _pairs[(len(u) // 1024,)](u, u.flip(0), first, second, SIZE=1024)
    assert torch.equal(
        torch.stack((first, second), -1).flatten()[None], normals_of(torch.stack((u, u.flip(0)), -1).flatten()[None])
    )


@triton.jit
def _pair(out, u, v):
    first, second = kernel.normal_pair(tl.load(u), tl.load(v))
    tl.store(out, first)
    tl.store(out + 1, second)


def test_normal_of_a_uniform_that_is_zero_is_finite():
    out, zero = torch.empty(2), torch.zeros(1)
    _pair[(1,)](out, zero, zero, enable_fp_fusion=False)
    assert out.tolist() == pytest.approx([5.67769, 0], abs=1e-4)
