"""csrc's self-attention: the formula's values and gradients at every instruction set, and when it gives way."""

import copy

import pytest
import torch

from dit_fast import _C
from dit_fast.backend import force
from dit_fast.errors import UserError
from dit_fast.nn.attention import Attention, _plain_attention
from dit_fast.ops import attention_cpp
from tests.helpers.cases import loop_over

pytestmark = pytest.mark.skipif(_C.unavailable() is not None, reason="needs the C++ operators")
SHAPES = [(2, 3, 64, 32), (1, 2, 37, 16), (2, 1, 1, 48), (1, 2, 130, 64)]  # [N, H, T, d]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def packed(samples, heads, tokens, width, dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(0)
    qkv = size * torch.randn(samples, tokens, 3 * heads * width, generator=generator)
    return qkv.to(dtype).requires_grad_(), torch.randn(samples, tokens, heads * width, generator=generator).to(dtype)


def formula(qkv, heads):
    query, key, value = (part.transpose(1, 2) for part in qkv.unflatten(-1, (3, heads, -1)).unbind(2))
    return _plain_attention(query, key, value).transpose(1, 2).flatten(2)


def off(ours, theirs):
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


@loop_over("level", range(3))
@loop_over("dtype", list(BOUNDS))
@loop_over("shape", SHAPES)
def test_values_and_gradients_are_those_of_float64(monkeypatch, shape, dtype, level):
    if level > torch.ops.dit_fast_native.isa_level():
        return
    monkeypatch.setattr(attention_cpp, "_BEST_LEVEL", level)
    qkv, upstream = packed(*shape, dtype=dtype)
    y = attention_cpp.attention(qkv, shape[1])
    (gradient,) = torch.autograd.grad(y, qkv, upstream)
    double = qkv.detach().double().requires_grad_()
    expected = formula(double, shape[1])
    (expected_gradient,) = torch.autograd.grad(expected, double, upstream.double())
    assert (y.dtype, gradient.dtype) == (dtype, dtype)
    assert off(y, expected) < BOUNDS[dtype]
    assert (gradient.double() - expected_gradient).norm() <= BOUNDS[dtype] * upstream.double().norm()


def test_large_logits_and_far_ones():
    qkv, _ = packed(1, 2, 40, 32, size=30.0)
    assert off(attention_cpp.attention(qkv, 2), formula(qkv.detach().double(), 2)) < 1e-5


def test_a_nan_stays_one():
    qkv, _ = packed(1, 1, 20, 16)
    with torch.no_grad():
        qkv[0, 3, 0] = torch.nan  # of one query
        y = attention_cpp.attention(qkv, 1)
    assert y[0, 3].isnan().all()
    assert not y[0, 4].isnan().any()


@pytest.mark.parametrize("level", [1, 2])
def test_the_bits_depend_on_neither_threads_nor_level(monkeypatch, level):
    if level > torch.ops.dit_fast_native.isa_level():
        pytest.skip(f"this processor has no instructions of level {level}")
    before, found = torch.get_num_threads(), []
    qkv, upstream = packed(3, 2, 100, 32)
    try:
        for threads, at in ((1, level), (2, level), (2, -1)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(attention_cpp, "_BEST_LEVEL", at)
            y = attention_cpp.attention(qkv, 2)
            found.append((y, *torch.autograd.grad(y, qkv, upstream)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(mine, first) for each in found[1:] for mine, first in zip(each, found[0], strict=True))


def test_no_second_derivative_comes_out_silently():
    qkv, upstream = packed(1, 2, 16, 16)
    (first,) = torch.autograd.grad(attention_cpp.attention(qkv, 2), qkv, upstream, create_graph=True)
    with pytest.raises(UserError, match='attention: no second derivative here; for one use attention="math"'):
        first.sum().backward()


def test_the_module_uses_it_where_it_can(monkeypatch):
    calls, before = [], attention_cpp.attention
    monkeypatch.setattr(attention_cpp, "attention", lambda *given: calls.append(1) or before(*given))
    torch.manual_seed(0)
    module, x = Attention(64, 2), torch.randn(2, 20, 64)
    plain = copy.deepcopy(module)
    plain.kind = "math"
    torch.testing.assert_close(module(x), plain(x), rtol=1e-5, atol=1e-6)
    assert calls == [1]
    module(x, heads=True)
    with force("torch"):
        module(x)
    torch.func.jvp(module, (x,), (x,))
    Attention(64, 2, qk_norm=True)(x)
    Attention(60, 6)(torch.randn(2, 20, 60))
    Attention(64, 2).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(1, 65, 64))
        assert calls == [1]
        module(x)
    assert calls == [1, 1]
