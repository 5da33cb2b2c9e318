"""The kernel of taps behind gates against float64 on equally rounded inputs, and models of gates with taps."""

import pytest
import torch

from dit_fast.kernels import diversity_taps, tables
from dit_fast.ops import DiversityTaps, diversity_descent, diversity_loss, gate_residual, traced
from dit_fast.ops._kinds import Kinds
from dit_fast.ops.diversity_descent import tap_backward_op
from tests.ops.interpreted.test_diversity_kernels import BF16, FP16, FP32, error, make


def exact(added, above, y, gate):
    total = added.double() + above.double()
    return total, total * gate.double()[:, None], (total * y.double()).sum(1)


@pytest.mark.parametrize("tokens", [35, 32])
@pytest.mark.parametrize(("own", "branch"), [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16)])
def test_a_gate_adds_both_gradients(own, branch, tokens):
    """Each result is rounded once; two runs have the same bits."""
    added, above, y = (x.view(2, tokens, 72) for x in make(2 * tokens, 72, [own, own, branch]))
    gate = make(2, 72, [branch], seed=4)[0]
    ours, again = (diversity_taps.backward(added, above, y, gate) for _ in range(2))
    for each, second, reference, dtype in zip(
        ours, again, exact(added, above, y, gate), (own, *[branch] * 2), strict=True
    ):
        assert each.dtype == dtype
        assert each.is_contiguous()
        assert torch.equal(each, second)
        assert error(each, reference) <= 1.02 * error(reference.to(dtype), reference) + 1e-6
    grad_x, grad_y, partials = diversity_taps.differentiate(added, above, y, gate)
    assert torch.equal(grad_x, ours[0])
    assert torch.equal(grad_y, ours[1])
    assert torch.equal(partials.double().sum((1, 2)).float().to(branch), ours[2])


def test_any_strides_and_addresses():
    buffer = torch.randn(2, 11, 51 + 1)
    added, gate = torch.randn(2, 11, 48), torch.randn(2, 96)[:, 48:]
    y = torch.randn(2, 22, 48)[:, ::2]
    for above in (torch.randn(2, 48, 11).mT, torch.ones(48).expand(2, 11, 48), buffer[:, :, 1:49]):
        for ours, reference in zip(
            tap_backward_op(added, above, y, gate, "triton"), exact(added, above, y, gate), strict=True
        ):
            assert error(ours, reference) < 1e-6


def test_an_equal_table_is_not_written_again(monkeypatch):
    features = make(5, 16, [FP32] * 3)
    first = tables.address_table(features)
    monkeypatch.setattr(tables, "write_table", None)
    assert all(one is two for one, two in zip(tables.address_table(features), first, strict=True))
    with pytest.raises(TypeError):
        tables.address_table(features[:2])


@pytest.mark.parametrize("onward", [True, False])
@pytest.mark.parametrize("pairs", ["all", [(0, 3)]])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_model_of_gates_has_the_gradients_of_the_plain_loss_and_no_launch_per_tap(dtype, pairs, onward, monkeypatch):
    """Each block's part is let go when its gate has it; without a gradient from above the gate is as without a tap."""
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    generator, found = torch.Generator().manual_seed(0), {}
    x, above = draw(2, 9, 40).to(dtype), draw(2, 9, 40).to(dtype)
    branches, gates = [draw(2, 9, 40) for _ in range(5)], [draw(2, 40) for _ in range(5)]
    left, descents = [], []
    monkeypatch.setattr(traced, "_PROGRAMS", Kinds())  # a trace would not call what stands in the kernel's place
    monkeypatch.setattr(traced, "_can_be_taken_down", lambda present: False)
    run, begin = diversity_taps.backward, diversity_descent.Descent.__init__
    monkeypatch.setattr(diversity_taps, "backward", lambda *a: left.append(len(descents[0]._made)) or run(*a))
    monkeypatch.setattr(
        diversity_descent.Descent, "__init__", lambda self, *a: descents.append(self) or begin(self, *a)
    )
    for kind in ("triton", "exact"):
        wide = torch.float64 if kind == "exact" else None
        leaves = [t.to(wide or t.dtype).requires_grad_() for t in (x, *branches, *gates)]
        stream, taps, outputs = leaves[0], DiversityTaps("triton"), []
        for y, gate in zip(leaves[1:6], leaves[6:], strict=True):
            if kind == "triton":
                stream = gate_residual(stream, y, gate, "triton")
                assert taps.tap(stream) is stream
            else:
                stream = stream + gate[:, None] * y
                stream = stream + (stream.detach().to(dtype) - stream.detach())  # rounded as ours
            outputs.append(stream)
        total = (taps.loss(pairs) if kind == "triton" else diversity_loss(outputs, pairs, backend="torch")).total
        value = 1000 * total + ((stream * above.to(stream.dtype)).sum() if onward else 0)
        found[kind] = torch.autograd.grad(value, leaves)
    assert left == [4, 3, 2, 1, 0][not onward :]
    for ours, reference in zip(*found.values(), strict=True):
        assert error(ours, reference) < (1e-5 if dtype == FP32 else 1e-2)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_opcheck(backend):
    given = [torch.randn(3, 3, 33) for _ in range(3)]
    torch.library.opcheck(tap_backward_op.registered, (*given, torch.randn(3, 33), backend))
