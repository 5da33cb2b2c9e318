"""Linear maps on the CPU by oneDNN: the reference's values and derivatives, and when they give way to torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp

from dit_fast.backend import force
from dit_fast.ops import onednn
from dit_fast.ops.linear import linear

pytestmark = pytest.mark.skipif(not onednn._has(torch.float32), reason="torch without oneDNN")


def arguments(rows=256, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, rows // 2, 24), (40, 24), (40,))
    made = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return made if bias else [*made[:2], None]


def counted(monkeypatch):
    calls, before = [], onednn.linear
    monkeypatch.setattr(onednn, "linear", lambda *given: calls.append(given[0].shape) or before(*given))
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strided", [False, True])
def test_values_and_gradients_are_the_references(monkeypatch, bias, strided):
    calls, given = counted(monkeypatch), arguments(bias=bias)
    x = given[0].transpose(0, 1) if strided else given[0]
    y, expected = linear(x, *given[1:]), F.linear(x, *given[1:])
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    wanted = [each for each in given if each is not None]
    ours, theirs = (torch.autograd.grad(each, wanted, upstream) for each in (y, expected))
    assert len(calls) == 2  # forward and the gradient of x
    for mine, other in zip((y, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_second_derivatives_reach_everything():
    x, weight, bias = (each.detach().double().requires_grad_() for each in arguments())
    single = [each.detach().float().requires_grad_() for each in (x, weight, bias)]

    def second(function, x, weight, bias):
        (first,) = torch.autograd.grad(function(x, weight, bias).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, weight, bias))

    for mine, other in zip(second(linear, *single), second(F.linear, x, weight, bias), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-2)


def test_it_gives_way_to_torch(monkeypatch):
    """Few rows, another dtype, an implementation forced on every op, forward mode, functorch, autocast."""
    calls, (x, weight, bias) = counted(monkeypatch), arguments()
    few = arguments(rows=128)
    linear(few[0], weight, bias)
    linear(x.double(), weight.double(), bias.double())
    with force("torch"):
        linear(x, weight, bias)
    _, tangent = jvp(lambda each: linear(each, weight, bias), (x,), (x,))
    torch.testing.assert_close(tangent, F.linear(x, weight), rtol=1e-5, atol=1e-5)
    torch.func.vmap(lambda each: linear(each, weight, bias))(x[None])
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert calls == []
    with torch.no_grad():
        linear(x, weight, bias)
    assert calls == [torch.Size([256, 24])]
