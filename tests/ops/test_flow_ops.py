"""Flow matching as torch ops: the reference, registration, both modes of differentiation, complaints."""

import os

import pytest
import torch

from dit_fast import philox
from dit_fast.diffusion import Path, velocity_error
from dit_fast.errors import ConfigError, UserError
from dit_fast.ops import flow, flow_error, flow_noised
from dit_fast.ops.flow import draws_noise_in_registers, error_backward_op, error_op, noised_op
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close

PATHS = ["linear", "cosine"]
TIMES = torch.tensor([0.0, 0.3, 0.5, 0.77, 1.0])
POSITIONS = torch.tensor([0, 3, 2**32, 2**62 + 12345, 17])


def make(*dtypes, shape=(3, 7, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(TIMES), *shape, generator=generator).to(dtype) for dtype in dtypes]


def key(path, seed=5, dtype=torch.float32):
    return TIMES.to(dtype), POSITIONS, seed, path


def noise(like, seed=5):
    return philox.normal(seed, POSITIONS, philox.Stream.NOISE, tuple(like.shape[1:]))


def error_through_op(prediction, latents, t, positions, seed, path):
    """What compiled code runs, and what "torch" runs where a fused implementation can: here, torch behind the op."""
    key = (t, positions, flow._signed(seed), path, "torch")
    return flow._fused_error(prediction.flatten(1), latents.flatten(1), *key)


def noised_through_op(latents, t, positions, seed, path):
    key = (t, positions, flow._signed(seed), path, "torch")
    return flow._fused_noised(latents.flatten(1), *key).view(latents.shape)


@loop_over("path", PATHS)
def test_the_reference_is_path_and_velocity_error_to_the_bit(path):
    """The trainer may change from one to the other without changing a run."""
    p, x = make(torch.bfloat16, torch.float32)
    noised, target = Path(path).interpolate(x, noise(x), TIMES)
    leaf, other = p.clone().requires_grad_(), p.clone().requires_grad_()
    plain, ours = velocity_error(other, target), flow_error(leaf, x, *key(path))
    assert torch.equal(flow_noised(x, *key(path)), noised)
    assert torch.equal(ours, plain)
    assert torch.equal(torch.autograd.grad(ours.mean(), leaf)[0], torch.autograd.grad(plain.mean(), other)[0])


@loop_over("seed", [0, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed_reaches_the_generator(seed):
    (x,) = make(torch.float32)
    expected = Path("linear").interpolate(x, noise(x, seed), TIMES)[0]
    assert torch.equal(flow_noised(x, *key("linear", seed)), expected)
    assert torch.equal(noised_through_op(x, *key("linear", seed)), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("loss", [flow_error, error_through_op])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float16", "bfloat16")])
def test_error_and_gradients(dtypes, loss, path):
    p, x = (each.requires_grad_() for each in make(*(getattr(torch, name) for name in dtypes)))
    value = loss(p, x, *key(path))
    wide = [each.detach().double().requires_grad_() for each in (p, x)]
    exact = flow_error(*wide, *key(path, dtype=torch.float64))
    assert value.dtype == torch.float32
    assert exact.dtype == torch.float64
    assert_close(value, exact.detach(), 1e-6)
    upstream = torch.linspace(0.5, 2, len(TIMES))
    ours = torch.autograd.grad(value, (p, x), upstream)
    for each, grad, reference in zip((p, x), ours, torch.autograd.grad(exact, wide, upstream.double()), strict=True):
        assert grad.dtype == each.dtype
        assert grad.shape == each.shape
        rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[each.dtype]
        assert_close(grad, reference, rounding)


@loop_over("path", PATHS)
@loop_over("function", [flow_noised, noised_through_op])
def test_interpolant_and_its_gradient(function, path):
    for dtype in (torch.float32, torch.bfloat16):
        (x,) = make(dtype)
        x.requires_grad_()
        wide = x.detach().double().requires_grad_()
        ours, exact = function(x, *key(path)), Path(path).interpolate(wide, noise(wide).double(), TIMES.double())[0]
        assert ours.dtype == torch.float32
        assert_close(ours, exact.detach(), 1e-6)
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        grad = torch.autograd.grad(ours, x, direction)[0]
        assert grad.dtype == dtype
        expected = torch.autograd.grad(exact, wide, direction.double())[0]
        assert_close(grad, expected, 1e-6 if dtype == torch.float32 else 4e-3)


@loop_over("loss", [flow_error, error_through_op])
def test_gradients_that_nobody_needs_are_not_computed(loss):
    p, x = make(torch.float32, torch.float32)
    both = torch.autograd.grad(loss(p.requires_grad_(), x.requires_grad_(), *key("cosine")).sum(), (p, x))
    p, x = p.detach(), x.detach()
    for place in range(2):
        inputs = [p.clone(), x.clone()]
        inputs[place].requires_grad_()
        assert torch.equal(torch.autograd.grad(loss(*inputs, *key("cosine")).sum(), inputs[place])[0], both[place])
    rows = p.flatten(1), x.flatten(1)
    for needs in ([True, True], [False, True], [False, False]):
        grads = error_backward_op(torch.ones(len(TIMES)), *rows, *key("cosine"), needs, "torch")
        assert len(grads) == sum(needs)


@loop_over("loss", [flow_error, error_through_op])
def test_strided_inputs_and_an_expanded_gradient(loss):
    p = torch.randn(5, 8, 4, 4, generator=torch.Generator().manual_seed(1))[:, :3]
    x = make(torch.float32, shape=(4, 4, 3))[0].permute(0, 3, 1, 2)
    strided = torch.stack([TIMES, TIMES], 1)[:, 0], torch.stack([POSITIONS, POSITIONS], 1)[:, 1]
    leaf, plain = p.detach().requires_grad_(), p.contiguous().requires_grad_()
    ours = loss(leaf, x, *strided, 5, "linear").mean()
    expected = loss(plain, x.contiguous(), *key("linear")).mean()
    assert_close(ours, expected.detach(), 1e-7)
    assert_close(torch.autograd.grad(ours, leaf)[0], torch.autograd.grad(expected, plain)[0], 1e-7)
    (x,) = make(torch.float32)
    assert torch.equal(flow_noised(x[:1].expand(5, 3, 7, 5), *key("linear"))[0], flow_noised(x, *key("linear"))[0])


def test_nothing_of_a_samples_size_is_kept_but_the_inputs():
    p, x = make(torch.bfloat16, torch.float32)
    p.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        flow._fused_error(p.flatten(1), x.flatten(1), *key("linear"), "torch")
    large = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel() > len(TIMES)}
    assert large == {p.untyped_storage().data_ptr(), x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("path", PATHS)
def test_opcheck(path):
    p, x = (each.flatten(1) for each in make(torch.bfloat16, torch.float32, shape=(2, 3)))
    torch.library.opcheck(noised_op.registered, (x, *key(path, -3), "torch"))
    torch.library.opcheck(error_op.registered, (p, x, *key(path), "torch"))
    for needs in ([True, True], [True, False]):
        torch.library.opcheck(error_backward_op.registered, (torch.ones(len(TIMES)), p, x, *key(path), needs, "torch"))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_values_equal_eager_ones(compiler):
    def function(x, weight, t, positions):
        noised = flow_noised(x, t, positions, 2**64 - 5, "cosine")
        return flow_error((weight * noised).sin(), x, t, positions, 2**64 - 5, "cosine")

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for count in (5, 3):
        x, weight = (each[:count].requires_grad_() for each in make(torch.float32, torch.float32))
        inputs = (x.detach().requires_grad_(), weight.detach().requires_grad_())
        ours, reference = (each(*inputs, TIMES[:count], POSITIONS[:count]) for each in (compiled, function))
        assert_close(ours.detach(), reference.detach(), 1e-6)
        grads = (torch.autograd.grad(each.sum(), inputs) for each in (ours, reference))
        for grad, expected in zip(*grads, strict=True):
            assert_close(grad, expected, 1e-6)


@loop_over("loss", [flow_error, error_through_op])
def test_autocast_changes_nothing(loss):
    p, x = make(torch.float32, torch.float32)
    p.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(p, x, *key("cosine"))
        noised = flow_noised(x, *key("cosine"))
    outside = loss(p, x, *key("cosine"))
    assert torch.equal(inside, outside)
    assert torch.equal(noised, flow_noised(x, *key("cosine")))
    grads = (torch.autograd.grad(value.sum(), p)[0] for value in (inside, outside))
    assert torch.equal(*grads)


@loop_over("loss", [flow_error, error_through_op])
def test_inside_an_activation_checkpoint(loss):
    p, x = make(torch.float32, torch.float32)
    p.requires_grad_()
    function = lambda p: loss(p.sin(), x, *key("linear"))  # noqa: E731
    again = torch.utils.checkpoint.checkpoint(function, p, use_reentrant=False)
    expected = torch.autograd.grad(function(p).sum(), p)[0]
    assert torch.equal(torch.autograd.grad(again.sum(), p)[0], expected)


@pytest.mark.parametrize("path", PATHS)
def test_both_modes_of_differentiation_in_float64(path):
    p, x = (each.requires_grad_() for each in make(torch.float64, torch.float64, shape=(2, 2)))
    draw = key(path, dtype=torch.float64)
    error = lambda p, x: error_through_op(p, x, *draw)  # noqa: E731
    noised = lambda x: noised_through_op(x, *draw)  # noqa: E731
    assert torch.autograd.gradcheck(error, (p, x), check_forward_ad=True)
    assert torch.autograd.gradcheck(error, (p, x.detach()), check_forward_ad=True)
    assert torch.autograd.gradcheck(noised, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda p, x: flow_error(p, x, *draw), (p, x))


@loop_over("path", PATHS)
@loop_over("behind", [False, True])
def test_forward_mode_over_a_function_whose_primal_is_trained(behind, path):
    """A directional derivative, with reverse mode on the primal; both against differences."""
    generator = torch.Generator().manual_seed(0)
    matrix, other = (torch.randn(4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    x, direction = make(torch.float64, torch.float64, shape=(3, 4))
    draw = key(path, dtype=torch.float64)
    matrix.requires_grad_()

    def loss(x, matrix):
        if behind:
            noised = noised_through_op(x, *draw)
            return error_through_op(noised @ matrix, x, *draw).sum()
        return flow_error(flow_noised(x, *draw) @ matrix, x, *draw).sum()

    value, tangent = torch.func.jvp(lambda x: loss(x, matrix), (x,), (direction,))
    step = 1e-6
    with torch.no_grad():
        expected = (loss(x + step * direction, matrix) - loss(x - step * direction, matrix)) / (2 * step)
        slope = (loss(x, matrix + step * other) - loss(x, matrix - step * other)) / (2 * step)
    assert_close(tangent.detach(), expected, 1e-6)
    assert_close((torch.autograd.grad(value, matrix)[0] * other).sum(), slope, 1e-6)


def test_times_have_no_tangent_in_the_fused_ops():
    p, x = make(torch.float32, torch.float32)
    for function in (
        lambda t: error_through_op(p, x, t, POSITIONS, 5, "linear"),
        lambda t: noised_through_op(x, t, POSITIONS, 5, "linear"),
    ):
        with pytest.raises(UserError, match="t has no tangent here"):
            torch.func.jvp(function, (TIMES,), (torch.ones_like(TIMES),))


Z = torch.zeros(2, 3, 4, 4)
T, N = torch.zeros(2), torch.arange(2)


@loop_over(
    ("call", "message"),
    [
        (lambda: flow_noised(Z, T, N, 0, "cos"), "unknown path 'cos'; valid: linear, cosine"),
        (lambda: flow_noised(Z, T, N, -1), r"seed must be an integer, 0 <= seed < 2\^64, not -1"),
        (lambda: flow_noised(Z, T, N, 2**64), r"seed must be an integer, 0 <= seed < 2\^64, not 18446744073709551616"),
        (lambda: flow_noised(Z[:0], T[:0], N[:0], 0), r"at least one element, not \[0, 3, 4, 4\]"),
        (lambda: flow_noised(Z, T[:1], N, 0), r"t must be \[N\] = \[2\], not \[1\]"),
        (lambda: flow_noised(Z, T, N[:1], 0), r"positions must be \[N\] = \[2\], not \[1\]"),
        (lambda: flow_noised(Z, T, N.int(), 0), r"positions must be int64, not torch\.int32"),
        (lambda: flow_noised(Z.long(), T, N, 0), "latents must be floating point"),
        (lambda: flow_noised(Z, N, N, 0), "t must be floating point"),
        (lambda: flow_noised(Z, T, N.to("meta"), 0), "positions is on meta, latents on cpu"),
        (lambda: flow_noised(Z, T.clone().requires_grad_(), N, 0), r"t gets no gradient; pass t\.detach\(\)"),
        (
            lambda: flow_error(Z[:, :2], Z, T, N, 0),
            r"prediction must be \[N, ...\] = \[2, 3, 4, 4\], not",
        ),
        (lambda: flow_error(Z.long(), Z, T, N, 0), "prediction must be floating point"),
        (lambda: flow_error(Z.to("meta"), Z, T, N, 0), "prediction is on meta, latents on cpu"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do run on the CPU")
def test_backends_that_cannot_run_say_why():
    assert not draws_noise_in_registers(Z)
    for call in (
        lambda name: flow_noised(Z, T, N, 0, backend=name),
        lambda name: flow_error(Z, Z, T, N, 0, backend=name),
    ):
        with pytest.raises(ConfigError, match="unknown backend 'cuda'; valid: auto, triton, torch"):
            call("cuda")
        with pytest.raises(ConfigError, match=r"'triton' cannot run: made for cuda tensors, not cpu"):
            call("triton")
