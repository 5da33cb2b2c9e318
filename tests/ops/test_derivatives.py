"""Second derivatives of every public op: right, or refused by name, and never a silent zero."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp

from dit_fast import ops
from dit_fast.errors import UserError
from dit_fast.models import build_model
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close
from tests.helpers.op_cases import FUSED, REFERENCES, TIMES, N, inputs


def along(op, tensors, tangents):
    """|tangent of the result|^2: what a loss on forward-mode derivatives is made of."""
    with forward_ad.dual_level():
        result = op(*(forward_ad.make_dual(x, dx) for x, dx in zip(tensors, tangents, strict=True)))
        return forward_ad.unpack_dual(result).tangent.square().sum()


def slope(function, tensors, directions, step=1e-5):
    """Central difference of `function` along `directions`, and autograd's derivative there."""
    up, down = (function(*(x + sign * step * d for x, d in zip(tensors, directions, strict=True))) for sign in (1, -1))
    leaves = [x.clone().requires_grad_() for x in tensors]
    grads = torch.autograd.grad(function(*leaves), leaves, materialize_grads=True)
    return (up - down) / (2 * step), sum((g * d).sum() for g, d in zip(grads, directions, strict=True))


@loop_over("name", REFERENCES)
def test_references_differentiate_twice_in_every_combination(name):
    tensors = inputs(name)
    tangents, directions = tuple(x.roll(1, -1) for x in tensors), [x.flip(-1) for x in tensors]
    nonlinear = lambda *x: REFERENCES[name](*x).sin()  # noqa: E731
    leaves = [x.clone().requires_grad_() for x in tensors]
    assert torch.autograd.gradgradcheck(nonlinear, leaves, check_fwd_over_rev=True, fast_mode=True)
    difference, found = slope(lambda *x: along(nonlinear, x, tangents), tensors, directions)
    assert_close(found, difference, 1e-6)
    once = lambda *x: jvp(nonlinear, x, tangents)[1]  # noqa: E731
    plus, minus = (once(*(x + step * dx for x, dx in zip(tensors, tangents, strict=True))) for step in (1e-5, -1e-5))
    assert_close(jvp(once, tuple(tensors), tangents)[1], (plus - minus) / 2e-5, 1e-6)


@loop_over("name", FUSED)
def test_fused_tangents_have_a_gradient(name):
    tensors = inputs(name)
    tangents, directions = [x.roll(1, -1) for x in tensors], [x.flip(-1) for x in tensors]
    difference, found = slope(lambda *x: along(FUSED[name], x, tangents), tensors, directions)
    assert_close(found, difference, 1e-6)
    with_func = grad(lambda *x: jvp(FUSED[name], x, tuple(tangents))[1].square().sum(), tuple(range(len(tensors))))
    assert_close(sum((g * d).sum() for g, d in zip(with_func(*tensors), directions, strict=True)), difference, 1e-6)


@loop_over("name", ["layer_norm_modulate", "gate_residual", "gate_residual_modulate", "diversity_loss", "gelu_mlp"])
def test_tangents_of_the_cpp_ops_have_a_gradient(name):
    op = {"diversity_loss": lambda *x: ops.diversity_loss(x, backend="cpp").total}.get(
        name, lambda *x: getattr(ops, name)(*x, backend="cpp")
    )
    if name == "gate_residual_modulate":
        op = lambda *x: torch.cat(ops.gate_residual_modulate(*x, backend="cpp"))  # noqa: E731
    found = []
    for call, dtype in ((op, torch.float32), (REFERENCES[name], torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs(name)]
        tangents = [x.detach().roll(1, -1) for x in leaves]
        found.append(torch.autograd.grad(along(call, leaves, tangents), leaves, materialize_grads=True))
    for ours, exact in zip(*found, strict=True):
        assert_close(ours, exact, 1e-4)


@loop_over("name", FUSED)
def test_fused_second_derivatives_are_refused_in_one_line(name):
    tensors = tuple(inputs(name))
    loss = lambda *x: FUSED[name](*x).square().sum()  # noqa: E731
    first = lambda *x: sum(g.square().sum() for g in grad(loss, tuple(range(len(x))))(*x))  # noqa: E731

    def penalty():
        leaves = [x.clone().requires_grad_() for x in tensors]
        grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, allow_unused=True)

    for call in (
        penalty,
        lambda: grad(first)(*tensors),
        lambda: jvp(first, tensors, tensors),
        lambda: jvp(lambda *x: jvp(loss, x, tensors)[1], tensors, tensors),
    ):
        with pytest.raises(UserError, match=r"no second derivative here; for one use .*torch") as caught:
            call()
        assert "\n" not in str(caught.value)


def functions(kind=torch.autograd.Function):
    for each in kind.__subclasses__():
        yield from functions(each)
        if each.__module__.startswith("dit_fast.ops") and "backward" in vars(each):
            yield each


@pytest.mark.parametrize("name", FUSED)
def test_no_zeros_are_filled_for_results_without_a_gradient(name, monkeypatch):
    received = []
    for function in functions():

        def recorded(ctx, *grads, backward=function.backward):
            received.extend(grads)
            return backward(ctx, *grads)

        monkeypatch.setattr(function, "backward", staticmethod(recorded))
    FUSED[name](*(x.requires_grad_() for x in inputs(name))).sum().backward()
    assert any(g is not None for g in received)
    assert all(g.any() for g in received if g is not None and g.dim())


def test_a_backward_inside_a_forward_level_is_no_second_derivative():
    x, shift, scale = (tensor.requires_grad_() for tensor in inputs("layer_norm_modulate"))
    with forward_ad.dual_level():
        FUSED["layer_norm_modulate"](
            forward_ad.make_dual(x, torch.ones_like(x)), shift, scale
        ).square().sum().backward()
    expected = torch.autograd.grad(REFERENCES["layer_norm_modulate"](x, shift, scale).square().sum(), x)[0]
    assert_close(x.grad, expected, 1e-12)


def test_written_out_layer_norm_equals_torch():
    x = torch.randn(5, 7, 96) + torch.tensor([0.0, 1.0, 30.0, 1e3, -3.0])[:, None, None]
    weight, bias = torch.randn(96), torch.randn(96)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        with forward_ad.dual_level():
            ours = ops.layer_norm.layer_norm(x.to(dtype), 1e-6, weight.to(dtype), bias.to(dtype))
        exact = torch.nn.functional.layer_norm(x.double(), (96,), weight.double(), bias.double(), 1e-6)
        assert_close(ours, exact, bound)


@loop_over("wiring", ["input", "output"])
def test_gradient_of_a_models_tangent(wiring):
    torch.manual_seed(0)
    model = build_model(
        "SiT-S/2", input_size=4, hidden_size=8, depth=2, num_heads=2, num_classes=3, skip_wiring=wiring, qk_norm=True,
        attention="math", label_dropout=0,
    ).double()  # fmt: skip
    parameters = {name: torch.randn_like(x) * 0.3 for name, x in model.named_parameters() if x.requires_grad}
    x, velocity = torch.randn(2, N, 4, 4, 4, dtype=torch.float64).unbind(0)
    labels = torch.zeros(N, dtype=torch.int64)

    def along_time(*values):
        replaced = dict(zip(parameters, values, strict=True))
        call = lambda x, t: torch.func.functional_call(model, replaced, (x, t, labels))  # noqa: E731
        return jvp(call, (x, TIMES), (velocity, torch.ones_like(TIMES)))[1].square().sum()

    values = list(parameters.values())
    difference, found = slope(along_time, values, [torch.randn_like(value) for value in values])
    assert_close(found, difference, 1e-6)
