"""The long skip under compile, checkpoints, opcheck and both modes of differentiation."""

import pytest
import torch

from dit_fast.ops import long_skip, row_statistics
from dit_fast.ops.long_skip import backward_op, forward_op
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close
from tests.helpers.long_skip_cases import autocast, inputs, upstream_like
from tests.helpers.long_skip_cases import backend as backend


def test_both_modes_of_differentiation_in_float64():
    tensors = [tensor.requires_grad_() for tensor in inputs((2, 2), 3)]
    assert torch.autograd.gradcheck(lambda *x: long_skip(*x, backend="gemm"), tensors, check_forward_ad=True)
    assert torch.autograd.gradcheck(lambda x: long_skip(x, *tensors[1:], backend="gemm"), tensors[:1])


def test_opcheck():
    for dtype, cast in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float64,) * 2):
        tensors = inputs((7,), 5, dtype)
        cast = torch.float64 if dtype == torch.float64 else cast
        stats = [None, None, *row_statistics(tensors[1])]
        torch.library.opcheck(forward_op.registered, (*tensors, *stats, *[None] * 3, 1e-6, cast, torch.float32, "gemm"))
        y, mean, rstd = forward_op(*tensors, *stats, *[None] * 3, 1e-6, cast, torch.float32, "gemm")
        for needs in ([True] * 6, [False, True, True, False, False, True]):
            given = (torch.ones_like(y), y, mean, rstd, *tensors, *[None] * 3, cast, needs, "gemm")
            torch.library.opcheck(backward_op.registered, given)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
def test_compiled_values_and_gradients_equal_eager_ones(compiler, cast):
    def function(stats, *tensors):
        with autocast(cast):
            return long_skip(*tensors, backend="gemm", x_stats=stats)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for rows in (12, 20):
        tensors = inputs((2, rows), 6, torch.float32)
        stats = row_statistics(tensors[0])
        assert_close(compiled(stats, *tensors), function(stats, *tensors), 1e-6)
        tensors = [x.requires_grad_() for x in tensors]
        ours, reference = compiled(stats, *tensors), function(stats, *tensors)
        assert_close(ours, reference.detach(), 1e-6)
        upstream = upstream_like(ours.shape, ours.dtype)
        for grad, expected in zip(
            torch.autograd.grad(ours, tensors, upstream), torch.autograd.grad(reference, tensors, upstream), strict=True
        ):
            assert_close(grad, expected, 1e-6)


@loop_over("reentrant", [False, True])
def test_inside_an_activation_checkpoint(backend, reentrant):
    tensors = [x.bfloat16().requires_grad_() for x in inputs((2, 6), 16)]
    run = lambda *tensors: long_skip(*tensors, backend=backend).sin()  # noqa: E731
    expected = torch.autograd.grad(run(*tensors).sum(), tensors)
    torch.utils.checkpoint.checkpoint(run, *tensors, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(x.grad, g) for x, g in zip(tensors, expected, strict=True))


@loop_over("backend", ["auto", "gemm"])
@loop_over("given", [False, True])
def test_forward_mode_over_a_function_whose_primal_is_trained(backend, given):
    """What mean flow does: a directional derivative, with reverse mode on the primal; both against differences."""
    x, skip, *parameters = inputs((2, 3), 4)
    direction, other = upstream_like((2, 3, 4), seed=5), upstream_like((4, 8), seed=6)
    parameters[2].requires_grad_()

    def output(x, weight):
        first = x.sin()
        stats = row_statistics(first) if given else None
        return long_skip(first, skip * x, *parameters[:2], weight, parameters[3], backend=backend, x_stats=stats).exp()

    weight = parameters[2]
    value, tangent = torch.func.jvp(lambda x: output(x, weight), (x,), (direction,))
    with torch.no_grad():
        step = 1e-6
        expected = (output(x + step * direction, weight) - output(x - step * direction, weight)) / (2 * step)
        assert_close(tangent, expected, 1e-7)
        assert_close(value, output(x, weight), 1e-12)
        slope = (output(x, weight + step * other).sum() - output(x, weight - step * other).sum()) / (2 * step)
        turned = [
            torch.func.jvp(lambda x, w=weight + s * other: output(x, w), (x,), (direction,))[1].sum()
            for s in (step, -step)
        ]
    gradient = torch.autograd.grad(value.sum(), weight, retain_graph=True)[0]
    assert_close((gradient * other).sum(), slope, 1e-7)
    if tangent.requires_grad:
        gradient = torch.autograd.grad(tangent.sum(), weight)[0]
        assert_close((gradient * other).sum(), (turned[0] - turned[1]) / (2 * step), 1e-6)


@loop_over("cast", [None, torch.bfloat16])
def test_forward_mode_in_lower_precision(backend, cast):
    tensors = [x.bfloat16() for x in inputs((5,), 16)] if cast is None else inputs((5,), 16, torch.float32)
    directions = [upstream_like(x.shape, x.dtype, seed) for seed, x in enumerate(tensors)]
    with autocast(cast):
        run = lambda *x: long_skip(*x, backend=backend)  # noqa: E731
        ours = torch.func.jvp(run, tuple(tensors), tuple(directions))[1]
    wide = [tuple(x.double() for x in side) for side in (tensors, directions)]
    expected = torch.func.jvp(lambda *x: long_skip(*x, backend="torch"), *wide)[1]
    assert ours.dtype == torch.bfloat16
    assert_close(ours, expected, 5e-3)
