"""The long skip's analytic gradient, statistics, memory and forward mode: "gemm", and "triton" where it can run."""

import os
import sys
import types

import pytest
import torch
from golden import assert_close
from long_skip_cases import NAMES, autocast, errors, everything, inputs, stressed
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dit_fast import kernels
from dit_fast.errors import ConfigError, UserError
from dit_fast.ops import RowStatistics, long_skip, long_skip_op, row_statistics
from dit_fast.ops.long_skip_op import backward_op, forward_op

HALF = (torch.bfloat16, torch.float16)
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or kernels.unavailable() is not None,
    reason="runs where Triton is installed, with TRITON_INTERPRET=1",
)
# What `_choose` may return. The stand-in follows the kernels' interface in plain torch.
BACKENDS = ["gemm", "stand-in", pytest.param("triton", marks=interpreted)]


def _fold(norm_weight, norm_bias, weight, bias, dtype):
    folded = (norm_weight.float() * weight.float()).to(dtype)
    return folded, folded.float().sum(1), bias.float() + weight.float() @ norm_bias.float()


def _kernel_forward(x, skip, mean, rstd, folded, row_sums, folded_bias, out_dtype):
    centred = torch.cat([x, skip], 1).double() - mean.double()[:, None]
    return (centred @ folded.double().T * rstd[:, None] + folded_bias).to(out_dtype)


def _prepare_backward(grad, y, rstd, row_sums, folded_bias):
    assert grad.is_contiguous()
    width = 2 * grad.shape[1]
    wide = grad.double()
    c1, c2 = (wide * (y.double() - folded_bias)).sum(1) / width, wide @ row_sums.double() / width
    return (rstd[:, None] * grad).to(grad.dtype), c1.float(), c2.float(), grad.float().sum(0)


def _backward_input(grad, x, skip, mean, rstd, folded, c1, c2, needs=(True, True)):
    normalised = (torch.cat([x, skip], 1).double() - mean[:, None]) * rstd[:, None]
    both = rstd[:, None] * (grad.double() @ folded.double() - c2[:, None] - normalised * c1[:, None])
    halves = both.chunk(2, 1)
    return tuple(h.to(like.dtype) if need else None for h, like, need in zip(halves, (x, skip), needs, strict=True))


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param != "stand-in":
        return request.param
    kernel = types.ModuleType("dit_fast.kernels.long_skip")
    kernel.fold, kernel.forward = _fold, _kernel_forward
    kernel.prepare_backward, kernel.backward_input = _prepare_backward, _backward_input
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    monkeypatch.setattr(kernels, "long_skip", kernel, raising=False)
    monkeypatch.setattr(long_skip_op, "_choose", lambda *arguments: "triton")
    return "gemm"


def _upstream(shape, dtype=torch.float64, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("rows", "width"), [((2, 5), 6), ((1,), 1), ((3, 7), 2), ((2, 1, 4), 5), ((130,), 33)])
def test_analytic_gradients_in_float64(rows, width):
    tensors, upstream = inputs(rows, width), _upstream((*rows, width))
    for ours, expected in zip(
        everything(tensors, upstream, backend="gemm", eps=1e-3),
        everything(tensors, upstream, backend="torch", eps=1e-3),
        strict=True,
    ):
        assert ours.dtype == torch.float64
        assert_close(ours, expected, 1e-12, extra=1e-13)


def test_both_modes_of_differentiation_in_float64():
    tensors = [tensor.requires_grad_() for tensor in inputs((2, 2), 3)]
    assert torch.autograd.gradcheck(lambda *x: long_skip(*x, backend="gemm"), tensors, check_forward_ad=True)
    assert torch.autograd.gradcheck(lambda x: long_skip(x, *tensors[1:], backend="gemm"), tensors[:1])


@pytest.mark.parametrize("kind", ["plain", "mean 100", "massive"])
def test_float32_error_is_at_most_that_of_eager(kind):
    """1e-6 on plain inputs; in all cases within 1.25 times eager's against fp64 (kernels.md section 7)."""
    tensors = [x.float() for x in stressed(kind, inputs((300,), 48))]
    upstream = _upstream((300, 48), torch.float32)
    exact = everything([x.double() for x in tensors], upstream, backend="torch")
    ours, eager = (errors(everything(tensors, upstream, backend=name), exact) for name in ("gemm", "torch"))
    for name, error, allowed in zip(NAMES, ours, eager, strict=True):
        assert error <= max(1.25 * allowed, 1e-6), (name, error, allowed)


@pytest.mark.parametrize("cast", [None, *HALF], ids=str)
@pytest.mark.parametrize("streams", ["half half", "fp32 half", "half fp32", "fp32 fp32", "bf16 fp16"])
@pytest.mark.parametrize("kind", ["plain", "mean 100", "massive"])
def test_half_precision_error_is_at_most_that_of_eager(backend, kind, streams, cast):
    """y and all six gradients within 1.25 times eager's error, for every mix of dtypes.

    fp32 weights under autocast, or bf16 weights without it.
    """
    if cast and streams == "bf16 fp16":
        pytest.skip("autocast's concatenation refuses the pair")
    if backend == "triton" and (streams not in ("half half", "fp32 half") or cast == torch.float16):
        pytest.skip("takes long interpreted; the kernels' own tests have the other mixes")
    rows, seeds = (32, 1) if backend == "triton" else (128, 3)
    half = cast or torch.bfloat16
    of = {"half": half, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtypes = [of[name] for name in streams.split()] + 4 * [torch.float32 if cast else half]
    sides = []
    for seed in range(seeds):
        tensors = [
            x.to(dtype) for x, dtype in zip(stressed(kind, inputs((rows,), 128, seed=seed)), dtypes, strict=True)
        ]
        upstream = _upstream((rows, 128), half, 10 + seed)
        exact = everything([x.double() for x in tensors], upstream, backend="torch")
        ours = everything(tensors, upstream, cast, backend=backend)
        assert [x.dtype for x in ours] == [half, *dtypes]
        eager = everything(tensors, upstream, cast, backend="torch")
        sides.append((errors(ours, exact), errors(eager, exact)))
    both = torch.tensor(sides, dtype=torch.float64).square().mean(0).sqrt()
    for name, error, allowed in zip(NAMES, *both.tolist(), strict=True):
        assert error <= 1.25 * allowed + 1e-6, (name, error, allowed)
    assert both[0].max() < (6e-3 if half == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (5,), (0, 4), (1, 2, 5), ()])
def test_only_the_gradients_that_are_needed(backend, wanted):
    tensors, upstream = inputs((4, 3), 8, torch.float32), _upstream((4, 3, 8), torch.float32)
    if backend == "triton":
        tensors, upstream = [x.bfloat16() for x in tensors], upstream.bfloat16()
    expected = everything(tensors, upstream, backend=backend)
    for index in wanted:
        tensors[index].requires_grad_()
    y = long_skip(*tensors, backend=backend)
    assert y.requires_grad == bool(wanted)
    if wanted:
        grads = torch.autograd.grad(y, [tensors[index] for index in wanted], upstream)
        for index, grad in zip(wanted, grads, strict=True):
            assert torch.equal(grad, expected[1 + index])


@pytest.mark.parametrize("wanted", [range(6), (0,), (1, 3), (0, 4), (2,), (5,)])
def test_flops_are_counted(wanted):
    """As for a linear layer: one GEMM [M, 2D] x [2D, D] forward, and of the backward's two what is needed."""
    tensors = inputs((6,), 8, torch.float32)
    for index in wanted:
        tensors[index].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = long_skip(*tensors, backend="gemm")
        assert counter.get_total_flops() == 2 * 6 * 16 * 8
        y.sum().backward()
    halves = len({0, 1} & set(wanted)) + 2 * bool({2, 4} & set(wanted))
    assert counter.get_total_flops() == 2 * 6 * 16 * 8 + halves * 2 * 6 * 8 * 8


def test_unneeded_gradients_are_not_computed():
    tensors = inputs((7,), 5, torch.float32)
    y, mean, rstd = forward_op(*tensors, [None] * 4, 1e-6, torch.float32, "gemm")
    needs = [False, True, False, False, True, False]
    grads = backward_op(torch.ones_like(y), y, mean, rstd, *tensors, "gemm", needs)
    assert [g.shape for g in grads] == [tensors[1].shape, tensors[4].shape]


def _strided(tensors):
    x, skip, *parameters = tensors
    stretched = torch.stack([x, x], -1)[..., 0]
    sliced = torch.cat([skip, skip], -1)[..., skip.shape[-1] :]
    norm_weight, norm_bias, weight, bias = parameters
    return [stretched, sliced, torch.stack([norm_weight] * 2, -1)[:, 0], norm_bias, weight.T.contiguous().T, bias]


def test_strided_and_expanded_inputs(backend):
    tensors = inputs((4, 6), 8, torch.bfloat16)
    upstream = _upstream((4, 6, 8))
    expected = everything(tensors, upstream, backend=backend)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    y = long_skip(*_strided(leaves), backend=backend)
    grads = torch.autograd.grad(y, leaves, upstream.bfloat16())
    for ours, theirs in zip((y, *grads), expected, strict=True):
        assert_close(ours, theirs, 4e-3)
    row = tensors[0][:1, :1].expand(4, 6, 8)
    plain = [row.contiguous(), *tensors[1:]]
    assert torch.equal(long_skip(row, *tensors[1:], backend=backend), long_skip(*plain, backend=backend))


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y.sum(),
        lambda y: y[..., 0].sum(),
        lambda y: (y.transpose(0, 1)[1:] * torch.arange(8)).sum(),
        lambda y: (torch.cat([y, y * 2], -1)[..., 3:11] ** 2).sum(),
        lambda y: (y.float().to(torch.float64) ** 2).sum(),
    ],
)
def test_strided_and_expanded_gradients(backend, use):
    tensors = inputs((4, 6), 8, torch.bfloat16)
    sides = []
    for name, dtype in ((backend, torch.bfloat16), ("torch", torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        sides.append(torch.autograd.grad(use(long_skip(*leaves, backend=name)), leaves))
    for ours, expected in zip(*sides, strict=True):
        assert_close(ours, expected, 2e-2)


def _saved(backend, rows, width, skip_dtype):
    """Bytes that autograd keeps under bf16 autocast, each storage once, parameters left out: (all, the op's own).

    The op's own are those that the model does not hold anyway: skip is kept by the block that made it, y by the block
    that reads it (kernels.md 3.1). Sizes alone are computed, so that the shapes can be those of training.
    """
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode():
        x, skip = torch.empty(rows, width, dtype=torch.bfloat16), torch.empty(rows, width, dtype=skip_dtype)
        shapes = [(2 * width,), (2 * width,), (width, 2 * width), (width,)]
        leaves = [x, skip, *(torch.empty(shape) for shape in shapes)]
        leaves = [tensor.requires_grad_() for tensor in leaves]
        with autocast(torch.bfloat16), saved_tensors_hooks(pack, lambda tensor: tensor):
            y = long_skip(*leaves, backend=backend)

    def count(*left_out):
        skipped = {tensor.untyped_storage()._cdata for tensor in left_out}
        return sum(storage.nbytes() for key, storage in storages.items() if key not in skipped)

    return count(*leaves[2:]), count(*leaves[1:], y)


@pytest.mark.parametrize(("rows", "width"), [(8192, 768), (8192, 1152), (65536, 1152)])
def test_memory_saved_for_the_backward_pass(rows, width):
    """At least 6 times below the released formulation: fp32 LayerNorm under bf16 autocast, x bf16, skip fp32.

    Eager: the joined fp32 row (8MD), its normalised bf16 copy (4MD), two statistics and the bf16 weight. Ours: x (2MD)
    and two numbers per row. Counting skip and y as well, which we refer to and eager does not, it is 8MD.
    """
    everything_saved, own = _saved("gemm", rows, width, torch.float32)
    eager_everything, eager = _saved("torch", rows, width, torch.float32)
    element = rows * width
    assert own == 2 * element + 8 * rows
    assert everything_saved == own + (4 + 2) * element
    assert eager == eager_everything == 12 * element + 8 * rows + 2 * 2 * width**2
    assert eager >= 6 * own
    assert _saved("gemm", rows, width, torch.bfloat16)[0] == 6 * element + 8 * rows


def test_no_copy_of_a_parameter_is_kept():
    """W', u and b' are made again: nothing of size D^2 beside the leaf itself, which an engine may have gathered."""
    tensors = [tensor.requires_grad_() for tensor in inputs((2,), 64, torch.float32)]
    kept = []
    with autocast(torch.bfloat16), saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = long_skip(*tensors, backend="gemm")
    owned = [t for t in kept if not any(t.data_ptr() == leaf.data_ptr() for leaf in (*tensors, y))]
    assert sum(t.numel() for t in owned) == 2 * 2
    assert all(any(t is leaf for t in kept) for leaf in tensors[2:])


def test_parameters_may_be_away_between_the_passes():
    """As under ZeRO-3, which frees a parameter after the forward pass and gathers it again before the backward."""
    tensors = [x.requires_grad_() for x in inputs((5,), 8, torch.float32)]
    expected = torch.autograd.grad(long_skip(*tensors, backend="gemm").sum(), tensors)
    y = long_skip(*tensors, backend="gemm")
    values = [x.detach().clone() for x in tensors[2:]]
    for parameter in tensors[2:]:
        parameter.data = torch.empty(0)
    for parameter, value in zip(tensors[2:], values, strict=True):
        parameter.data = value
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y.sum(), tensors), expected, strict=True))


@pytest.mark.parametrize("place", ["x", "skip", "y"])
def test_changing_what_is_saved_raises(backend, place):
    tensors = [x.bfloat16() for x in inputs((4,), 8)]
    tensors[4].requires_grad_()
    y = long_skip(*tensors, backend=backend)
    {"x": tensors[0], "skip": tensors[1], "y": y.detach()}[place].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives_need_the_reference():
    tensors = [x.requires_grad_() for x in inputs((3,), 4)]
    once = torch.autograd.grad(long_skip(*tensors, backend="gemm").square().sum(), tensors[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()
    once = torch.autograd.grad(long_skip(*tensors, backend="torch").square().sum(), tensors[0], create_graph=True)[0]
    assert torch.isfinite(torch.autograd.grad(once.sum(), tensors[0])[0]).all()


def test_statistics_of_the_caller(backend):
    """They replace the op's own, carry no gradient of theirs, and change no gradient; "torch" ignores them."""
    tensors = [x.bfloat16() for x in inputs((3, 4), 8)]
    upstream = _upstream((3, 4, 8))
    given = {"x_stats": row_statistics(tensors[0]), "skip_stats": row_statistics(tensors[1])}
    for options in (given, {"x_stats": given["x_stats"]}, {"skip_stats": given["skip_stats"]}):
        for ours, expected in zip(
            everything(tensors, upstream, backend=backend, **options),
            everything(tensors, upstream, backend=backend),
            strict=True,
        ):
            assert torch.equal(ours, expected)
    wrong = RowStatistics(given["x_stats"].mean + 1, given["x_stats"].variance)
    assert not torch.equal(long_skip(*tensors, backend=backend, x_stats=wrong), long_skip(*tensors, backend=backend))
    assert torch.equal(long_skip(*tensors, backend="torch", x_stats=wrong), long_skip(*tensors, backend="torch"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: (s.mean[0], s.variance), "x_stats.mean"),
        (lambda s: (s.mean, s.variance.bfloat16()), "x_stats.variance"),
        (lambda s: (s.mean, s.variance.to("meta")), "x_stats.variance"),
    ],
)
def test_statistics_that_do_not_fit_are_named(change, named):
    tensors = inputs((3, 4), 8, torch.float32)
    with pytest.raises(UserError, match=named) as caught:
        long_skip(*tensors, backend="gemm", x_stats=RowStatistics(*change(row_statistics(tensors[0]))))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cast", [None, *HALF], ids=str)
def test_backward_inside_autocast(backend, cast):
    """Autocast decides the dtype of the map when the forward runs, and nothing in the backward."""
    tensors = inputs((6,), 8, torch.float32)
    if backend == "triton" and cast is None:
        pytest.skip("products in float32")
    leaves = [x.clone().requires_grad_() for x in tensors]
    with autocast(cast):
        y = long_skip(*leaves, backend=backend)
    assert y.dtype == (cast or torch.float32)
    with autocast(torch.bfloat16):
        inside = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    outside = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    assert [g.dtype for g in inside] == [torch.float32] * 6


def test_empty_batch(backend):
    tensors = [x.bfloat16() for x in inputs((0, 3), 8)]
    grads = everything(tensors, torch.empty(0, 3, 8), backend=backend)
    assert [g.shape for g in grads] == [x.shape for x in (tensors[0], *tensors)]
    assert all(not g.any() for g in grads[3:])


def test_twice_gives_the_same_bits(backend):
    tensors = [x.bfloat16() for x in inputs((70,), 16)]
    first, second = (everything(tensors, _upstream((70, 16)), backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck():
    for dtype, cast in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float64,) * 2):
        tensors = inputs((7,), 5, dtype)
        cast = torch.float64 if dtype == torch.float64 else cast
        stats = [None, None, *row_statistics(tensors[1])]
        torch.library.opcheck(forward_op, (*tensors, stats, 1e-6, cast, "gemm"))
        y, mean, rstd = forward_op(*tensors, stats, 1e-6, cast, "gemm")
        for needs in ([True] * 6, [False, True, True, False, False, True]):
            torch.library.opcheck(backward_op, (torch.ones_like(y), y, mean, rstd, *tensors, "gemm", needs))


@pytest.mark.parametrize(
    ("compiler", "dynamic"),
    [("aot_eager", False), ("aot_eager", True), pytest.param("inductor", False, marks=pytest.mark.long)],
)
@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
def test_compiled_values_and_gradients_equal_eager_ones(compiler, dynamic, cast):
    def function(stats, *tensors):
        with autocast(cast):
            return long_skip(*tensors, backend="gemm", x_stats=stats)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler, dynamic=dynamic)
    for rows in (12, 20):
        tensors = inputs((2, rows), 6, torch.float32)
        stats = row_statistics(tensors[0])
        assert_close(compiled(stats, *tensors), function(stats, *tensors), 1e-6)
        tensors = [x.requires_grad_() for x in tensors]
        ours, reference = compiled(stats, *tensors), function(stats, *tensors)
        assert_close(ours, reference.detach(), 1e-6)
        upstream = _upstream(ours.shape, ours.dtype)
        for grad, expected in zip(
            torch.autograd.grad(ours, tensors, upstream), torch.autograd.grad(reference, tensors, upstream), strict=True
        ):
            assert_close(grad, expected, 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_an_activation_checkpoint(backend, reentrant):
    tensors = [x.bfloat16().requires_grad_() for x in inputs((2, 6), 8)]
    run = lambda *tensors: long_skip(*tensors, backend=backend).sin()  # noqa: E731
    expected = torch.autograd.grad(run(*tensors).sum(), tensors)
    torch.utils.checkpoint.checkpoint(run, *tensors, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(x.grad, g) for x, g in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("backend", ["auto", "gemm"])
@pytest.mark.parametrize("given", [False, True])
def test_forward_mode_over_a_function_whose_primal_is_trained(backend, given):
    """What mean flow does: a directional derivative, with reverse mode on the primal; both against differences."""
    x, skip, *parameters = inputs((2, 3), 4)
    direction, other = _upstream((2, 3, 4), seed=5), _upstream((4, 8), seed=6)
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


@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
def test_forward_mode_in_lower_precision(backend, cast):
    tensors = [x.bfloat16() for x in inputs((5,), 8)] if cast is None else inputs((5,), 8, torch.float32)
    directions = [_upstream(x.shape, x.dtype, seed) for seed, x in enumerate(tensors)]
    with autocast(cast):
        run = lambda *x: long_skip(*x, backend=backend)  # noqa: E731
        ours = torch.func.jvp(run, tuple(tensors), tuple(directions))[1]
    wide = [tuple(x.double() for x in side) for side in (tensors, directions)]
    expected = torch.func.jvp(lambda *x: long_skip(*x, backend="torch"), *wide)[1]
    assert ours.dtype == torch.bfloat16
    assert_close(ours, expected, 5e-3)


def test_what_a_backend_cannot_take():
    x, skip, *parameters = inputs((4,), 8, torch.float32)
    reasons = long_skip_op.supports(x, skip.double(), tuple(parameters), torch.float32, "gemm")
    assert reasons == ["float64 and other dtypes are mixed"]
    assert long_skip_op.supports(x, skip.bfloat16(), tuple(parameters), torch.bfloat16, "gemm") == []
    with pytest.raises(ConfigError, match="backend 'gemm' cannot run: float64 and other dtypes are mixed"):
        long_skip(x, skip.double(), *parameters, backend="gemm")
    with pytest.raises(ConfigError, match="backend 'triton' cannot run"):
        long_skip(x.double(), skip.double(), *(p.double() for p in parameters), backend="triton")
    assert long_skip_op.supports(x.double(), skip, tuple(parameters), torch.float32, "triton") == [
        "some inputs are float64"
    ]


@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, "cpu"), (torch.float32, "cpu")])
def test_auto_runs_the_reference_where_it_is_exact_or_faster(monkeypatch, dtype, device):
    monkeypatch.setattr(long_skip_op, "apply", lambda *arguments: pytest.fail("the op ran"))
    tensors = [x.to(device) for x in inputs((4,), 8, dtype)]
    assert torch.equal(long_skip(*tensors), long_skip(*tensors, backend="torch"))


def test_weights_of_16_bits_are_not_rounded_again():
    """Folding gamma into them would be a rounding that the released order of operations does not have."""
    tensors = [x.bfloat16() for x in inputs((256,), 128)]
    exact = long_skip(*(x.double() for x in tensors), backend="torch")
    ours, eager = (errors([long_skip(*tensors, backend=name)], [exact])[0] for name in ("gemm", "torch"))
    assert ours <= 1.05 * eager
