"""The kernel of taps against float64 on equally rounded inputs: alone and behind a gate, with and without a mixture."""

import pytest
import torch

from dit_fast.kernels import diversity_taps, tables
from dit_fast.ops import DiversityTaps, diversity_loss, gate_residual
from dit_fast.ops.diversity_descent import Descent, partners_op, tap_backward_op
from tests.ops.interpreted.test_diversity_kernels import (
    BF16,
    FP16,
    FP32,
    LIMITS,
    error,
    exact_gradients,
    exact_statistics,
    make,
    make_gradients,
)  # fmt: skip

SHAPES = [(FP32, FP32, True), (BF16, BF16, False), (FP16, FP16, True), (FP32, BF16, True)]


def descent(features, grads, mix):
    """features: [N, T, D]."""
    flat = [x.flatten(0, 1) for x in features]
    _, _, norms = exact_statistics(flat)
    mixture = sum(x.float() * n[:, None] for x, n in zip(flat, norms.float(), strict=True))
    kept = mixture.float() if mix else torch.zeros(0, flat[0].shape[1])
    return Descent("triton", features, norms.float(), kept, *grads)


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize(("own", "others", "above"), SHAPES)
def test_a_tap_alone_and_behind_a_gate(own, others, above, mix):
    """Pairs of both signs and a diagonal."""
    features = [x.view(2, 35, 72) for x in make(70, 72, [own, *[others] * 3])]
    statistics, pairs = make_gradients([x.flatten(0, 1) for x in features])
    pairs = torch.where(pairs.abs() > 4, pairs, 0.25)
    given = make(70, 72, [own], seed=2)[0].view(2, 35, 72) if above else None
    upstream = [torch.zeros(70, 72) if given is None else given.flatten(0, 1)] * 4
    exact = exact_gradients([x.flatten(0, 1) for x in features], statistics, pairs, upstream)[0].view(2, 35, 72)
    ours = descent(features, (statistics, pairs), mix)
    alone = ours.added(0, given)
    assert alone.dtype == own
    assert alone.is_contiguous()
    assert error(alone, exact) < LIMITS[own]
    y, gate = make(70, 72, [others], seed=3)[0].view(2, 35, 72), make(2, 72, [others], seed=4)[0]
    grad_x, grad_y, grad_gate = ours.through_gate(0, given, y, gate, None)
    assert torch.equal(grad_x, alone)
    ours._shared = (*ours._shared[:-1], "torch")
    for each, reference in zip((grad_x, grad_y, grad_gate), ours.through_gate(0, given, y, gate, None), strict=True):
        assert error(each, reference) < 2 * LIMITS[each.dtype]
    assert grad_y.dtype == grad_gate.dtype == others
    assert error(grad_y, exact * gate.double()[:, None]) < LIMITS[others]
    assert error(grad_gate, (exact * y.double()).sum(1)) < LIMITS[others]


@pytest.mark.parametrize("mix", [False, True])
def test_a_row_below_the_norm_floor(mix):
    features = [x.view(1, 5, 32) for x in make(5, 32, [FP32] * 3)]
    features[0][0, 1] *= 7e-9 / features[0][0, 1].norm()  # close to the floor, where a projection would show
    flat = [x.flatten(0, 1) for x in features]
    statistics, pairs = make_gradients(flat)
    exact = exact_gradients(flat, statistics, pairs)[0]
    ours = descent(features, (statistics, pairs), mix).added(0, None)[0]
    for row in range(5):
        assert error(ours[row], exact[row]) < 2e-6


def test_any_strides_and_addresses():
    buffer = torch.randn(2, 11, 4 * 51 + 1)
    features = [buffer[:, :, 1 + 51 * k : 1 + 51 * k + 48] for k in range(4)]
    features[1] = features[1].transpose(0, 1).contiguous().transpose(0, 1)
    features[2] = features[2][:, :1].expand(2, 11, 48)
    grads = make_gradients([x.flatten(0, 1) for x in features])
    ours = descent(features, grads, True)
    for k, above in enumerate((torch.randn(2, 48, 11).mT, torch.ones(48).expand(2, 11, 48), features[0], None)):
        flat = [x.flatten(0, 1) for x in features]
        exact = exact_gradients(flat, *grads, [torch.zeros(22, 48) if above is None else above.flatten(0, 1)] * 4)[k]
        assert error(ours.added(k, above).flatten(0, 1), exact) < 1e-6
        y, gate = torch.randn(2, 22, 48)[:, ::2], torch.randn(2, 96)[:, 48:]
        found = ours.through_gate(k, above, y, gate, None)
        assert error(found[1].flatten(0, 1), exact * gate.double().repeat_interleave(11, 0)) < 1e-6
        assert error(found[2], (exact.view(2, 11, 48) * y.double()).sum(1)) < 1e-6


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_partners_are_those_whose_weight_is_not_the_most_frequent_one(backend):
    features, pairs = make(3, 16, [FP32] * 6), torch.full((6, 6), 0.5).triu(1)
    pairs[1, 4] = -0.5
    pairs[2, 2] = 3.0
    for mix, count in ((True, [0, 1, 0, 0, 1, 0]), (False, [5] * 6)):
        weights, sources, *_ = partners_op(features, pairs, mix, backend)
        assert sources[:, 0].tolist() == count
        assert weights[:, 0].tolist() == [0.5 * mix] * 6
        assert weights[2, 1] == 6 - 0.5 * mix
        assert sorted(sources[1, 1 : 1 + count[1]].tolist()) == ([4] if mix else [0, 2, 3, 4, 5])
        assert weights[1, 2 : 2 + count[1]].tolist() == ([-1.0] if mix else [0.5, 0.5, 0.5, -0.5, 0.5])


def test_blocks_that_no_weight_leads_to_are_not_read():
    features = [x.view(1, 9, 32) for x in make(9, 32, [BF16] * 4)]
    statistics, pairs = make_gradients([x.flatten(0, 1) for x in features])
    pairs[:, 3] = pairs[3] = 0
    exact = exact_gradients([x.flatten(0, 1) for x in features], statistics, pairs)
    ours = descent(features, (statistics, pairs), False)
    features[3].fill_(torch.nan)
    for k in range(3):
        assert error(ours.added(k, None).flatten(0, 1), exact[k]) < LIMITS[BF16]


def test_an_equal_table_is_not_written_again(monkeypatch):
    features = make(5, 16, [FP32] * 3)
    first = tables.address_table(features)
    monkeypatch.setattr(tables, "write_table", None)
    assert all(one is two for one, two in zip(tables.address_table(features), first, strict=True))
    with pytest.raises(TypeError):
        tables.address_table(features[:2])


@pytest.mark.parametrize("pairs", ["all", [(0, 3)]])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_model_of_gates_has_the_gradients_of_the_plain_loss_and_no_launch_per_tap(dtype, pairs, monkeypatch):
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    generator, found = torch.Generator().manual_seed(0), {}
    x, above = draw(2, 9, 40).to(dtype), draw(2, 9, 40).to(dtype)
    branches, gates = [draw(2, 9, 40) for _ in range(5)], [draw(2, 40) for _ in range(5)]
    launched = []
    run = diversity_taps.backward
    monkeypatch.setattr(diversity_taps, "backward", lambda *a: launched.append(a[2] is not None) or run(*a))
    for kind in ("triton", "exact"):
        wide = torch.float64 if kind == "exact" else None
        leaves = [t.to(wide or t.dtype).requires_grad_() for t in (x, *branches, *gates)]
        stream, taps, outputs = leaves[0], DiversityTaps("triton"), []
        for y, gate in zip(leaves[1:6], leaves[6:], strict=True):
            if kind == "triton":
                stream, stats = gate_residual(stream, y, gate, "triton", return_stats=True)
                assert taps.tap(stream, stats) is stream
            else:
                stream = stream + gate[:, None] * y
                stream = stream + (stream.detach().to(dtype) - stream.detach())  # rounded as ours
            outputs.append(stream)
        total = (taps.loss(pairs) if kind == "triton" else diversity_loss(outputs, pairs, backend="torch")).total
        value = 1000 * total + (stream * above.to(stream.dtype)).sum()
        found[kind] = torch.autograd.grad(value, leaves)
    assert launched == [True] * 5
    for ours, exact in zip(*found.values(), strict=True):
        assert error(ours, exact) < (1e-5 if dtype == FP32 else 1e-2)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_opcheck(backend):
    features = [x.view(3, 3, 33) for x in make(9, 33, [FP32, FP32])]
    flat = [x.flatten(0, 1) for x in features]
    statistics, pairs = make_gradients(flat)
    torch.library.opcheck(
        partners_op.registered, (flat, pairs, True, backend), test_utils=("test_schema", "test_faketensor")
    )
    shared = (*partners_op(flat, pairs, True, backend), exact_statistics(flat)[2].float(), statistics)
    given = (flat, features[0], features[1], features[1], torch.randn(3, 33), 0)
    torch.library.opcheck(tap_backward_op.registered, (*given, *shared, torch.zeros(9, 33), backend))
