"""csrc/gelu_cpu.cpp against float64: every instruction set, any size, any number of threads, and what it refuses."""

import pytest
import torch
from torch.nn import functional as F

from dit_fast import _C
from tests.helpers.cases import loop_over

pytestmark = pytest.mark.skipif(_C.unavailable() is not None, reason=str(_C.unavailable()))
native = torch.ops.dit_fast_native
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def levels():
    return range(native.isa_level() + 1)


def seeded(*shape):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(3))


def relative(found, expected):
    return ((found - expected).abs() / (expected.abs() + 1e-2)).max()


@loop_over("dtype", DTYPES)
def test_values_to_rounding_on_every_level_and_the_same_bits_with_fused_multiply_add(dtype):
    x = torch.cat([torch.linspace(-100, 100, 5001), seeded(3, 1001).flatten()]).to(dtype)
    expected = F.gelu(x.double(), approximate="tanh")
    found = []
    for level in levels():
        found.append(torch.empty_like(x))
        native.gelu_forward(x, found[-1], level)
        assert relative(found[-1], expected) < LIMITS[dtype]
    assert all(torch.equal(found[1], other) for other in found[2:])


def test_far_values_and_those_that_are_no_numbers():
    x = torch.tensor([0.0, -0.0, 1e30, -1e30, float("inf"), float("nan"), -89.5, 20.0])
    y = torch.empty_like(x)
    for level in levels():
        native.gelu_forward(x, y, level)
        torch.testing.assert_close(y, torch.tensor([0, 0, 1e30, 0, float("inf"), float("nan"), 0, 20]), equal_nan=True)


@loop_over("dtype", DTYPES)
@loop_over("shape", [(1, 1), (63, 16), (64, 17), (65, 40), (200, 5)])
def test_gradient_activation_and_bias_in_one_pass(dtype, shape):
    hidden, grad = seeded(*shape).to(dtype), torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    wide = hidden.double().requires_grad_()
    expected = torch.autograd.grad(F.gelu(wide, approximate="tanh"), wide, grad.double())[0]
    for level in levels():
        inner, activation, bias = grad.clone(), torch.empty_like(hidden), torch.empty(shape[1])
        native.gelu_backward(hidden, inner, inner, activation, bias, level)
        assert relative(inner, expected) < 2 * LIMITS[dtype]
        assert relative(activation, F.gelu(hidden.double(), approximate="tanh")) < LIMITS[dtype]
        torch.testing.assert_close(bias.double(), expected.sum(0), rtol=1e-5, atol=1e-5)
        alone = torch.empty_like(grad)
        native.gelu_backward(hidden, grad, alone, None, None, level)
        assert torch.equal(alone, inner)


def test_column_sums_of_strided_rows():
    wide = seeded(130, 50)
    for dtype in DTYPES:
        for x in (wide[:, 3:40], wide[::2, :17], wide[:1].expand(130, 50)):
            x, sums = x.to(dtype) if dtype != torch.float32 else x, torch.empty(x.shape[1])
            native.column_sums(x, sums, -1)
            torch.testing.assert_close(sums.double(), x.double().sum(0), rtol=1e-6, atol=1e-5)


def test_the_same_bits_for_any_number_of_threads():
    hidden, grad = seeded(700, 130), seeded(700, 130).flip(0)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results = [torch.empty_like(hidden) for _ in range(3)] + [torch.empty(130) for _ in range(2)]
            native.gelu_forward(hidden, results[0], -1)
            native.gelu_backward(hidden, grad, results[1], results[2], results[3], -1)
            native.column_sums(grad, results[4], -1)
            found.append(results)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


def test_complaints():
    x, half, sums = torch.zeros(4, 6), torch.zeros(4, 6).half(), torch.zeros(6)
    for call in (
        lambda: native.gelu_forward(x.double(), x.double(), -1),
        lambda: native.gelu_forward(x, half, -1),
        lambda: native.gelu_forward(x.t(), x.t(), -1),
        lambda: native.gelu_backward(x[0], x[0], x[0], None, None, -1),
        lambda: native.gelu_backward(x, x, x, None, sums[1:], -1),
        lambda: native.column_sums(x.t(), torch.zeros(4), -1),
        lambda: native.gelu_forward(x, x.clone(), 9),
    ):
        with pytest.raises(RuntimeError):
            call()
