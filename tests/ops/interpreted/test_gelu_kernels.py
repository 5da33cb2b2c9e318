"""The GELU backward kernels against float64 on equally rounded inputs: odd sizes, types, tails, chunk order, masks."""

import contextlib
import importlib

import pytest
import torch
from torch.nn import functional as F

from dit_fast.kernels import gelu
from dit_fast.nn.block import Block
from dit_fast.nn.linear import make_shadows
from dit_fast.ops import gelu_mlp
from dit_fast.ops.gelu_mlp import activation_again

op = importlib.import_module("dit_fast.ops.gelu_mlp")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LIMITS = {FP32: 1e-6, FP16: 1e-3, BF16: 6e-3}  # relative RMS error; the sum over rows is fp32 in every case
SHAPES = [(1, 1), (5, 33), (gelu.CHUNK, gelu.BLOCK), (gelu.CHUNK + 1, gelu.BLOCK + 8), (2 * gelu.CHUNK + 3, 40)]


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


def make(rows, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(rows, width, generator=generator) for _ in range(2)]
    return (2 * draw[0]).to(dtype), draw[1].to(dtype)


def exact(hidden, grad):
    wide = hidden.double().requires_grad_()
    (grad_hidden,) = torch.autograd.grad(F.gelu(wide, approximate="tanh"), wide, grad.double())
    return grad_hidden, grad_hidden.sum(0)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_and_its_sum(shape, dtype):
    hidden, grad = make(*shape, dtype)
    ours = gelu.backward(hidden, grad, True)
    eager = op._gelu_backward(hidden, grad, torch.eye(shape[1], dtype=dtype), False, True, "torch")[1:]
    for place, reference in enumerate(exact(hidden, grad)):
        limit = 1e-6 if place == 1 else LIMITS[dtype]
        assert ours[place].dtype == (FP32 if place == 1 else dtype)
        assert ours[place].shape == reference.shape
        assert error(ours[place], reference) < limit
        if dtype == BF16:
            assert error(ours[place], reference) <= 1.25 * error(eager[place], reference) + 1e-7


def test_the_gradient_may_take_the_place_of_the_other():
    hidden, grad = make(gelu.CHUNK + 3, 520, BF16)
    expected, given = gelu.backward(hidden, grad, True), grad.clone()
    ours = gelu.backward(hidden, given, True, given)
    assert ours[0] is given
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_real_width():
    hidden, grad = make(3, 4608, BF16)
    for ours, reference in zip(gelu.backward(hidden, grad, True), exact(hidden, grad), strict=True):
        assert error(ours, reference) < LIMITS[BF16]


def test_far_tails_keep_their_relative_accuracy():
    """Where tanh rounds to -1, 1 + tanh is zero, and the textbook form loses what is left of the slope."""
    hidden = torch.tensor([[-5.0, -4.0, -3.0, -1e-4, 0.0, 3.0, 12.0, 1e4, -1e4]])
    grad_hidden, _ = gelu.backward(hidden, torch.ones_like(hidden), False)
    expected, _ = exact(hidden, torch.ones_like(hidden))
    torch.testing.assert_close(grad_hidden.double()[:, :8], expected[:, :8], rtol=1e-5, atol=0)
    assert grad_hidden[0, 8] == 0


def test_a_sum_that_is_not_wanted():
    hidden, grad = make(70, 48, BF16)
    found, none = gelu.backward(hidden, grad, False)
    assert none is None
    assert torch.equal(found, gelu.backward(hidden, grad, True)[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_values_stay_where_they_are(bad):
    hidden, grad = make(9, 33, FP32)
    grad[4, 7] = bad
    grad_hidden, grad_bias = gelu.backward(hidden, grad, True)
    assert not grad_hidden[4, 7].isfinite()
    assert not grad_bias[7].isfinite()
    assert grad_hidden.isfinite().sum() == 9 * 33 - 1
    assert grad_bias.isfinite().sum() == 32


def test_nothing_past_the_end_is_read_or_written(monkeypatch):
    hidden, grad = make(gelu.CHUNK + 2, 20, FP32)
    expected = exact(hidden, grad)
    hidden, grad = (torch.cat([x, torch.full((1, 20), torch.nan)])[:-1] for x in (hidden, grad))
    outputs = []

    def guarded(like):
        outputs.append(torch.full((len(like) + 1, *like.shape[1:]), -7.0))
        return outputs[-1][:-1]

    monkeypatch.setattr(torch, "empty_like", guarded)
    for ours, reference in zip(gelu.backward(hidden, grad, True), expected, strict=True):
        assert error(ours, reference) < 1e-6
    assert len(outputs) == 1
    assert all((output[-1] == -7).all() for output in outputs)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_op_through_the_kernel(dtype):
    """All gradients of the MLP; GEMM sums of fp32 have three roundings more than the kernel's limit."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 9, 24), (96, 24), (96,), (16, 96), (16,)]
    inputs = [(torch.randn(shape, generator=generator) / 4).to(dtype) for shape in shapes]
    sides = {}
    for backend, convert in (("triton", dtype), ("torch", dtype), ("exact", torch.float64)):
        leaves = [x.to(convert).requires_grad_() for x in inputs]
        y = gelu_mlp(*leaves, backend="torch" if backend == "exact" else backend)
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(dtype).to(convert)
        sides[backend] = [y.detach(), *torch.autograd.grad(y, leaves, seed)]
    for ours, eager, reference in zip(*sides.values(), strict=True):
        assert ours.dtype == dtype
        assert error(ours, reference) < {FP32: 3e-6, BF16: 6e-3}[dtype]
        if dtype == BF16:
            assert error(ours, reference) <= 1.25 * error(eager, reference)


def test_the_activation_is_kept_or_computed_again():
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in [(9, 24), (96, 24), (96,), (16, 96), (16,)]]
    sides = []
    for context in (contextlib.nullcontext, activation_again):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, into=kept: into.append(x) or x, lambda x: x), context():
            y = gelu_mlp(*inputs, backend="triton")
        sides.append((sum(x.shape == (9, 96) for x in kept), torch.autograd.grad(y.sum(), inputs)))
    (both, expected), (hidden_alone, found) = sides
    assert (both, hidden_alone) == (2, 1)
    assert all(torch.equal(ours, same) for ours, same in zip(found, expected, strict=True))


@pytest.mark.parametrize("context", [contextlib.nullcontext, activation_again])
def test_a_block_as_trained_computes_no_more_activations_than_it_says(context):
    """As trained, where its halves are one node each: the forward's own and, for memory, the backward's."""
    block = Block(16, 2)
    make_shadows(block, list(block.parameters()))
    x, c = torch.randn(1, 3, 16, requires_grad=True), torch.randn(1, 16)
    with torch.profiler.profile() as counted, torch.autocast("cpu", BF16), context():
        y, _ = block(x, c)
        torch.autograd.grad(y.sum(), [x, *block.mlp.parameters()])
    assert type(y.grad_fn).__name__ == "_JoinsBackward"
    assert sum(event.name == "aten::gelu" for event in counted.events()) == (
        1 if context is contextlib.nullcontext else 2
    )


def test_supports_names_what_it_refuses():
    assert gelu.supports(torch.zeros(4, 3, dtype=BF16)) == []
    refused = gelu.supports(torch.zeros(1, dtype=torch.float64).expand(gelu.CHUNK * gelu.MAX_CHUNKS + 1, 1))
    assert [reason.split()[0] for reason in refused] == ["torch.float64", str(gelu.CHUNK * gelu.MAX_CHUNKS + 1)]
