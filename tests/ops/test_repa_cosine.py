"""REPA's cosine as a torch op: the reference, registration, both modes of differentiation, complaints."""

import os

import pytest
import torch
from torch.nn import functional as F

from dit_fast.errors import ConfigError, UserError
from dit_fast.ops import repa_cosine
from dit_fast.ops.repa_cosine import _fused, backward_op, forward_op
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(*shape, dtypes=(torch.float32, torch.float32), seed=0):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(*shape, generator=generator)
    return [(common + torch.randn(*shape, generator=generator)).to(dtype) for dtype in dtypes]


def definition(p, q):
    return -F.cosine_similarity(p.double(), q.double(), dim=-1).mean()


def in_float64(p, q):
    leaves = [x.double().requires_grad_() for x in (p, q)]
    return torch.autograd.grad(definition(*leaves), leaves)


def through_op(p, q):
    """What runs where a fused implementation can: here, torch behind the op."""
    return _fused(p.flatten(0, 1), q.flatten(0, 1), "torch")[0]


@loop_over("loss", [repa_cosine, through_op])
@loop_over("dtypes", [(a, b) for a in DTYPES for b in DTYPES])
def test_value_and_gradients(loss, dtypes):
    p, q = (x.requires_grad_() for x in make(3, 37, 50, dtypes=dtypes))
    value = loss(p, q)
    assert value.dtype == torch.float32
    assert_close(value, definition(p, q), 1e-6)
    for x, ours, exact in zip((p, q), torch.autograd.grad(value, (p, q)), in_float64(p, q), strict=True):
        assert ours.dtype == x.dtype
        assert_close(ours, exact, {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[x.dtype])


def test_auto_is_the_reference_to_the_bit_on_the_cpu():
    p, q = make(3, 20, 33, dtypes=(torch.bfloat16, torch.float32))
    leaf, other = p.clone().requires_grad_(), p.clone().requires_grad_()
    value = repa_cosine(leaf, q)
    plain = -(F.normalize(other.float(), dim=-1) * F.normalize(q, dim=-1)).sum(-1).mean()
    assert torch.equal(value, plain)
    assert torch.equal(torch.autograd.grad(value, leaf)[0], torch.autograd.grad(plain, other)[0])


@loop_over("loss", [repa_cosine, through_op])
def test_tokens_below_the_norm_floor(loss):
    p, q = make(1, 12, 8)
    with torch.no_grad():
        p[0, 3], q[0, 5] = 0, 0
        p[0, 7] *= 7e-13 / p[0, 7].norm()
    p, q = p.requires_grad_(), q.requires_grad_()
    reference = [x.detach().double().requires_grad_() for x in (p, q)]
    exact = -(F.normalize(reference[0], dim=-1) * F.normalize(reference[1], dim=-1)).sum(-1).mean()
    assert_close(loss(p, q), exact, 1e-6)
    for ours, wanted in zip(
        torch.autograd.grad(loss(p, q), (p, q)), torch.autograd.grad(exact, reference), strict=True
    ):
        assert ((ours - wanted).norm(dim=-1) <= 1e-6 * wanted.norm(dim=-1)).all()


@loop_over("loss", [repa_cosine, through_op])
def test_gradients_that_nobody_needs_are_not_computed(loss):
    p, q = make(2, 9, 6)
    exact = in_float64(p, q)
    for place in range(2):
        inputs = [p.clone(), q.clone()]
        inputs[place].requires_grad_()
        (grad,) = torch.autograd.grad(loss(*inputs), inputs[place])
        assert_close(grad, exact[place], 1e-6)
    saved = forward_op(p[0], q[0], "torch")[1]
    for needs in ([True, True], [False, True], [False, False]):
        assert len(backward_op(torch.ones(()), p[0], q[0], saved, needs, "torch")) == sum(needs)


@loop_over("loss", [repa_cosine, through_op])
def test_strided_inputs_and_an_expanded_gradient(loss):
    base = torch.randn(4, 10, 40, generator=torch.Generator().manual_seed(0))
    for p, q in (
        (base[..., :20], base[..., 20:]),
        (base[:, :, ::2], base.transpose(0, 1)[:4, :, 1::2].reshape(4, 4, 20).repeat(1, 3, 1)[:, :10]),
        (base.permute(0, 2, 1), base[:1].expand(4, 10, 40).permute(0, 2, 1)),
    ):
        p, q = p.detach().requires_grad_(), q.detach().requires_grad_()
        upstream = torch.tensor([0.3]).expand(5)[2]
        ours = torch.autograd.grad(loss(p, q), (p, q), upstream)
        for grad, exact in zip(ours, in_float64(p, q), strict=True):
            assert_close(grad, 0.3 * exact, 1e-6)


def test_saves_three_numbers_per_token():
    p, q = make(2, 16, 64, dtypes=(torch.bfloat16, torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        through_op(p.requires_grad_(), q)
    assert sorted(x.nbytes for x in kept if x.dim() and x.shape[-1] != 64) == [12 * 32]
    assert len(kept) == 3


def test_opcheck():
    p, q = (x[0] for x in make(1, 9, 5, dtypes=(torch.bfloat16, torch.float32)))
    torch.library.opcheck(forward_op.registered, (p, q, "torch"))
    saved = forward_op(p, q, "torch")[1]
    torch.library.opcheck(backward_op.registered, (torch.ones(()), p, q, saved, [True, True], "torch"))
    torch.library.opcheck(backward_op.registered, (torch.ones(()), p, q, saved, [False, True], "torch"))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_values_equal_eager_ones(compiler):
    torch._dynamo.reset()
    function = lambda p, q: repa_cosine(p.sin(), q) * 2  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for tokens in (6, 10):
        p, q = make(2, tokens, 7)
        p.requires_grad_()
        ours, reference = compiled(p, q), function(p, q)
        assert_close(ours, reference.detach(), 1e-6)
        assert_close(torch.autograd.grad(ours, p)[0], torch.autograd.grad(reference, p)[0], 1e-6)


@loop_over("loss", [repa_cosine, through_op])
def test_autocast_changes_nothing(loss):
    p, q = make(2, 8, 5)
    p.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(p, q)
    outside = loss(p, q)
    assert torch.equal(inside, outside)
    assert torch.equal(torch.autograd.grad(inside, p)[0], torch.autograd.grad(outside, p)[0])


@loop_over("loss", [repa_cosine, through_op])
def test_inside_an_activation_checkpoint(loss):
    p, q = make(2, 8, 5)
    p.requires_grad_()
    expected = torch.autograd.grad(loss(p.sin(), q), p)[0]
    again = torch.utils.checkpoint.checkpoint(lambda p: loss(p.sin(), q), p, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, p)[0], expected)


def test_both_modes_of_differentiation_in_float64():
    p, q = (x.double().requires_grad_() for x in make(1, 5, 4))
    function = through_op
    assert torch.autograd.gradcheck(function, (p, q), check_forward_ad=True)
    assert torch.autograd.gradcheck(function, (p, q.detach()), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(repa_cosine, (p, q))


@loop_over("loss", [repa_cosine, through_op])
def test_forward_mode_over_a_function_whose_primal_is_trained(loss):
    generator = torch.Generator().manual_seed(0)
    matrix, other = (torch.randn(4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    x, target, direction = (torch.randn(2, 3, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    matrix.requires_grad_()
    value, tangent = torch.func.jvp(lambda x: loss(x @ matrix, target), (x,), (direction,))
    step = 1e-6
    with torch.no_grad():
        expected = (loss((x + step * direction) @ matrix, target) - loss((x - step * direction) @ matrix, target)) / (
            2 * step
        )
        slope = (loss(x @ (matrix + step * other), target) - loss(x @ (matrix - step * other), target)) / (2 * step)
    assert_close(tangent.detach(), expected, 1e-6)
    gradient = torch.autograd.grad(value, matrix)[0]
    assert_close((gradient * other).sum(), slope, 1e-6)


@loop_over(
    ("p", "q", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), r"target must be \[N, T, Z\] = \[2, 3, 4\], not \[2, 3, 5\]"),
        (torch.zeros(3, 4), torch.zeros(3, 4), r"\[N, T, Z\], not \[3, 4\]"),
        (torch.zeros(0, 3, 4), torch.zeros(0, 3, 4), r"at least one element, not \[0, 3, 4\]"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int64), "target must be floating point"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, device="meta"), "target is on meta, prediction on cpu"),
    ],
)
def test_what_does_not_fit_is_named(p, q, message):
    with pytest.raises(UserError, match=message):
        repa_cosine(p, q)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do run on the CPU")
def test_backends_that_cannot_run_say_why():
    p, q = make(1, 4, 3)
    with pytest.raises(ConfigError, match="unknown backend 'cuda'; valid: auto, triton, torch"):
        repa_cosine(p, q, backend="cuda")
    with pytest.raises(ConfigError, match=r"backend 'triton' cannot run: made for cuda tensors, not cpu"):
        repa_cosine(p, q, backend="triton")
