"""The adaLN ops as torch ops: analytic gradients, both modes, compile, saved memory, mixed dtypes, strides."""

from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from dit_fast import _C
from dit_fast.errors import ConfigError, UserError
from dit_fast.ops import RowStatistics, adaln, row_statistics
from dit_fast.ops import gate_residual as residual
from dit_fast.ops import gate_residual_modulate as fused
from dit_fast.ops import layer_norm_modulate as modulate
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close

SHAPES = {
    modulate: ("x", "shift", "scale"),
    residual: ("x", "y", "gate"),
    fused: ("x", "y", "gate", "shift", "scale"),
}
STREAMS = ("x", "y")
SHAPES |= {  # the other norm, and no shift
    partial(modulate, norm="rms"): SHAPES[modulate],
    lambda x, scale, **options: modulate(x, None, scale, norm="rms", **options): ("x", "scale"),
    lambda x, y, gate, scale, **options: fused(x, y, gate, None, scale, **options): ("x", "y", "gate", "scale"),
    partial(fused, norm="rms"): SHAPES[fused],
}
NAMES = dict(
    zip(
        SHAPES,
        (
            "layer_norm_modulate",
            "gate_residual",
            "gate_residual_modulate",
            "layer_norm_modulate rms",
            "layer_norm_modulate rms scale",
            "gate_residual_modulate scale",
            "gate_residual_modulate rms",
        ),
        strict=True,
    )
)
ops = pytest.mark.parametrize("op", list(SHAPES), ids=list(NAMES.values()))
needs_library = pytest.mark.skipif(_C.unavailable() is not None, reason=f"{_C.unavailable()}")
BACKENDS = ["torch", *(["cpp"] if _C.unavailable() is None else [])]  # the rest of the library's tests say why


def inputs(op, n=2, t=5, d=12, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, t, d) if name in STREAMS else (n, d) for name in SHAPES[op]]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def outputs_of(result):
    return result if isinstance(result, tuple) else (result,)


def through_op(op, backend):
    """The op's own path, whatever the backend: the public functions send "torch" to plain autograd."""

    def run(*tensors):
        given = dict(zip(SHAPES[op], tensors, strict=True))
        parts = [given.get(name) for name in ("x", "y", "gate", "shift", "scale")]
        results = adaln._fused(*parts, None, None, 1e-6, "rms" in NAMES[op], tensors[0].dtype, True, backend, False)
        return tuple(result for result, name in zip(results, ("y", "scale"), strict=False) if name in given)

    return run


def everything(run, tensors, seed=9, strides=None):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    results = outputs_of(run(*leaves))
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    if strides == "transposed":
        upstream = [u.transpose(1, 2).contiguous().transpose(1, 2) for u in upstream]
    elif strides == "expanded":
        upstream = [u[:, :1].expand_as(u) for u in upstream]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves, upstream)]


@ops
def test_analytic_gradients_and_tangents(op):
    tensors = [tensor.requires_grad_() for tensor in inputs(op, 2, 3, 4)]
    assert torch.autograd.gradcheck(through_op(op, "torch"), tensors, check_forward_ad=True)


@ops
@loop_over("backend", BACKENDS)
@loop_over("strides", [None, "transposed", "expanded"])
def test_values_and_gradients_equal_autograd_of_the_reference(op, backend, strides):
    tensors = inputs(op, 3, 70, 33, torch.float32)
    ours = everything(through_op(op, backend), tensors, strides=strides)
    exact = everything(lambda *t: op(*t, backend="torch"), [t.double() for t in tensors], strides=strides)
    for mine, expected in zip(ours, exact, strict=True):
        assert_close(mine, expected, 2e-6)


@ops
@needs_library
@loop_over("stream", [torch.bfloat16, torch.float16, torch.float32])
@loop_over("branch", [torch.bfloat16, torch.float32])
def test_error_in_half_precision_is_at_most_that_of_eager(op, stream, branch):
    tensors = [
        t.to(stream if name == "x" else branch) for name, t in zip(SHAPES[op], inputs(op, 4, 32, 96), strict=True)
    ]
    exact = everything(lambda *t: op(*t, backend="torch"), [t.double() for t in tensors])
    ours, eager = (everything(lambda *t, b=b: op(*t, backend=b), tensors) for b in ("auto", "torch"))
    for mine, theirs, expected in zip(ours, eager, exact, strict=True):
        assert mine.dtype == theirs.dtype
        errors = [(x.double() - expected).norm() / expected.norm() for x in (mine, theirs)]
        assert errors[0] <= max(1.25 * errors[1], 1e-6)


@ops
def test_each_gradient_is_computed_only_where_it_is_wanted(op):
    tensors = inputs(op, dtype=torch.float32)
    whole = everything(op, tensors)[-len(tensors) :]
    generator = torch.Generator().manual_seed(9)
    for place in range(len(tensors)):
        leaves = [t.clone().requires_grad_(index == place) for index, t in enumerate(tensors)]
        results = outputs_of(op(*leaves))
        generator.manual_seed(9)
        upstream = [torch.randn(r.shape, generator=generator, dtype=torch.float64).float() for r in results]
        wanted = [(r, u) for r, u in zip(results, upstream, strict=True) if r.requires_grad]
        (grad,) = torch.autograd.grad([r for r, _ in wanted], [leaves[place]], [u for _, u in wanted])
        assert_close(grad, whole[place], 1e-6)


@loop_over("which", [0, 1])
@loop_over("backend", BACKENDS)
def test_one_of_two_results_alone(which, backend):
    def gradients(run, tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        return torch.autograd.grad(run(*leaves)[which].square().sum(), leaves, allow_unused=True)

    tensors = inputs(fused, dtype=torch.float32)
    exact = gradients(lambda *t: fused(*t, backend="torch"), [t.double() for t in tensors])
    for ours, expected in zip(gradients(through_op(fused, backend), tensors), exact, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            assert_close(ours, expected, 2e-6)


def test_out_dtype_rounds_once_as_a_cast_afterwards_does():
    x, y, gate, shift, scale = inputs(fused, 3, 8, 40, torch.float32)
    assert torch.equal(modulate(x, shift, scale, out_dtype=torch.bfloat16), modulate(x, shift, scale).bfloat16())
    x_new, out = fused(x, y, gate, shift, scale, out_dtype=torch.bfloat16)
    expected = fused(x, y, gate, shift, scale)
    assert x_new.dtype == torch.float32
    assert torch.equal(out, expected[1].bfloat16())
    with pytest.raises(UserError, match="out_dtype"):
        modulate(x, shift, scale, out_dtype=torch.int32)


@loop_over("backend", BACKENDS)
@loop_over("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_of_the_stream_as_it_is_stored(backend, dtype):
    tensors = [t + 20 if t.dim() == 3 else t for t in inputs(fused, 2, 9, 70)]
    x, y, gate, shift, scale = (t.to(dtype) for t in tensors)
    alone, stats = residual(x, y, gate, backend=backend, return_stats=True)
    x_new, _, also = fused(x, y, gate, shift, scale, backend=backend, return_stats=True)
    assert torch.equal(alone, x_new)
    for ours in (stats, also):
        assert isinstance(ours, RowStatistics)
        variance, mean = torch.var_mean(x_new.double(), -1, correction=0)
        assert_close(ours.mean, mean, 1e-6)
        assert_close(ours.variance, variance, 1e-5)
        assert not ours.mean.requires_grad


@loop_over("backend", BACKENDS)
def test_known_statistics_change_nothing_and_wrong_ones_are_believed(backend):
    x, shift, scale = (t.requires_grad_() for t in inputs(modulate, 2, 9, 70, torch.float32))
    stats = row_statistics(x)
    for norm in ("layer", "rms"):
        run = partial(modulate, backend=backend, norm=norm)
        ours = everything(partial(run, stats=stats), [x, shift, scale])
        for mine, expected in zip(ours, everything(run, [x, shift, scale]), strict=True):
            assert_close(mine, expected, 1e-6)
    wrong = RowStatistics(stats.mean + 1, stats.variance)
    same = torch.equal(
        modulate(x, shift, scale, backend=backend, stats=wrong), modulate(x, shift, scale, backend=backend)
    )
    assert same == (backend == "torch")
    for broken, named in (
        (RowStatistics(stats.mean[0], stats.variance), "stats.mean"),
        (RowStatistics(stats.mean, stats.variance.double()), "stats.variance"),
    ):
        with pytest.raises(UserError, match=named):
            modulate(x, shift, scale, stats=broken)


@needs_library
@loop_over("stream", [torch.float32, torch.bfloat16])
def test_saved_for_the_backward_are_streams_that_live_anyway_and_two_numbers_per_row(stream):
    n, t, d = 4, 16, 64

    def saved(backend):
        tensors = [x.to(stream).requires_grad_() for x in inputs(fused, n, t, d, torch.float32)]
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            results = fused(*tensors, backend=backend)
        alive = {x.untyped_storage()._cdata for x in (*tensors, *results)}
        return sum(storage.nbytes() for key, storage in storages.items() if key not in alive)

    assert saved("cpp") == 2 * 4 * n * t
    assert saved("torch") >= 4 * n * t * d


@ops
def test_opcheck(op):
    for dtype in (torch.float32, torch.bfloat16):
        given = dict(zip(SHAPES[op], inputs(op, dtype=dtype), strict=True))
        parts = [given.get(name) for name in ("x", "y", "gate", "shift", "scale")]
        stats = row_statistics(given["x"]) if op is modulate else (None, None)
        rms = "rms" in NAMES[op]
        for backend in BACKENDS:
            torch.library.opcheck(adaln.forward_op.registered, (*parts, *stats, 1e-6, rms, dtype, True, backend))
            normalises = "scale" in given
            x = given["x"]
            rest = (x, *parts[1:3], parts[4], *row_statistics(x)) if normalises else (None, *parts[1:3], *(None,) * 3)
            grads = (x if "y" in given else None, x if normalises else None)
            arguments = (*grads, *rest, 1e-6, rms, "shift" in given, *[dtype] * 4, backend)
            torch.library.opcheck(adaln.backward_op.registered, arguments)


@ops
@loop_over("backend", BACKENDS)
def test_results_of_strided_streams_are_contiguous_as_the_compiler_is_told(op, backend):
    x, y = torch.randn(2, 2, 16, 5).transpose(2, 3).unbind(0)
    gate, shift, scale = torch.randn(3, 2, 16).unbind(0)
    given = {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale}
    parts = [given[name] if name in SHAPES[op] else None for name in given]
    rms, names = "rms" in NAMES[op], SHAPES[op]
    results = adaln.forward_op(*parts, None, None, 1e-6, rms, x.dtype, True, backend)
    assert all(result.is_contiguous() for result in results)
    rest = (parts[0], *parts[1:3], parts[4], *results[2:]) if "scale" in names else (None, *parts[1:3], *(None,) * 3)
    grads = (x if "y" in names else None, y if "scale" in names else None)
    found = adaln.backward_op(*grads, *rest, 1e-6, rms, "shift" in names, *[x.dtype] * 4, backend)
    assert all(grad.is_contiguous() for grad in found)


@ops
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_values_and_gradients_equal_eager_ones(op, compiler):
    torch._dynamo.reset()
    run = torch.compile(op, fullgraph=True, backend=compiler)
    for tokens in (5, 9):
        tensors = inputs(op, 2, tokens, 16, torch.float32)
        for ours, expected in zip(everything(run, tensors), everything(op, tensors), strict=True):
            assert_close(ours, expected, 1e-6)


@ops
@loop_over("reentrant", [False, True])
def test_inside_an_activation_checkpoint(op, reentrant):
    tensors = [t.requires_grad_() for t in inputs(op, dtype=torch.bfloat16)]
    run = lambda *t: sum(r.sin() for r in outputs_of(op(*t)))  # noqa: E731
    expected = torch.autograd.grad(run(*tensors).sum(), tensors)
    torch.utils.checkpoint.checkpoint(run, *tensors, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(t.grad, g) for t, g in zip(tensors, expected, strict=True))


@ops
def test_autocast_changes_nothing(op):
    tensors = inputs(op, dtype=torch.float32)
    plain = everything(op, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        inside = everything(op, tensors)
    assert all(torch.equal(a, b) for a, b in zip(inside, plain, strict=True))


@ops
def test_forward_mode_over_a_function_whose_primal_is_trained(op):
    """What mean flow does: a directional derivative with reverse mode on the primal, against central differences."""
    tensors = inputs(op, 2, 3, 4)
    directions = inputs(op, 2, 3, 4, seed=5)
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)

    def output(weight, *t):
        return sum(r.exp().sum(1) for r in outputs_of(through_op(op, "torch")(t[0] * weight, *t[1:])))

    value, tangent = torch.func.jvp(lambda *t: output(weight, *t), tuple(tensors), tuple(directions))
    step = 1e-6
    with torch.no_grad():
        moved = [[t + s * d for t, d in zip(tensors, directions, strict=True)] for s in (step, -step)]
        expected = (output(weight, *moved[0]) - output(weight, *moved[1])) / (2 * step)
        turn = torch.arange(4, dtype=torch.float64)
        slopes = [output(weight + s * turn, *tensors).sum() for s in (step, -step)]
    assert_close(tangent, expected, 1e-6)
    assert_close((torch.autograd.grad(value.sum(), weight)[0] * turn).sum(), (slopes[0] - slopes[1]) / (2 * step), 1e-6)


@ops
def test_forward_mode_in_lower_precision(op):
    tensors, directions = inputs(op, dtype=torch.bfloat16), inputs(op, dtype=torch.bfloat16, seed=5)
    ours = torch.func.jvp(op, tuple(tensors), tuple(directions))[1]
    exact = torch.func.jvp(op, tuple(t.double() for t in tensors), tuple(d.double() for d in directions))[1]
    for mine, expected in zip(outputs_of(ours), outputs_of(exact), strict=True):
        assert mine.dtype == torch.bfloat16
        assert_close(mine, expected, 8e-3)


@ops
def test_second_derivatives_need_the_reference(op):
    tensors = [t.requires_grad_() for t in inputs(op, dtype=torch.float32)]
    first = outputs_of(op(*tensors, backend="torch"))[-1].square().sum()
    (grad,) = torch.autograd.grad(first, tensors[0], create_graph=True)
    assert torch.isfinite(torch.autograd.grad(grad.square().sum(), tensors[0])[0]).all()


@ops
def test_empty_batch(op):
    results = everything(op, inputs(op, n=0, dtype=torch.float32))
    assert all(not result.numel() for result in results)


@ops
@needs_library
def test_twice_gives_the_same_bits_and_the_library_is_what_runs(op):
    tensors = inputs(op, 3, 130, 40, torch.float32)
    first, second, named = (everything(lambda *t, b=b: op(*t, backend=b), tensors) for b in ("auto", "auto", "cpp"))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, named, strict=True))


@ops
@needs_library
def test_what_a_backend_cannot_take(op):
    with pytest.raises(ConfigError, match=r"backend 'cpp' cannot run: some input is torch\.float64"):
        op(*inputs(op), backend="cpp")
    with pytest.raises(ConfigError, match="backend 'triton' cannot run"):
        op(*inputs(op, dtype=torch.float32), backend="triton")


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_gradient_of_a_stream_that_goes_on_is_taken_along(backend, norm):
    """x is read after the op too: one gradient comes out, of both readers, with no addition by autograd."""
    generator = torch.Generator().manual_seed(3)
    x, shift, scale = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in ((2, 5, 8), (2, 8), (2, 8))
    )
    exact = [t.detach().double().requires_grad_() for t in (x, shift, scale)]
    same, out = modulate(x, shift, scale, backend=backend, norm=norm, return_x=True)
    assert torch.equal(same, x)
    assert same.data_ptr() == x.data_ptr()
    wide = modulate(*exact, backend="torch", norm=norm)
    loss, expected = (same.square() * out.cos()).sum(), (exact[0].square() * wide.cos()).sum()
    for ours, theirs in zip(
        torch.autograd.grad(loss, (x, shift, scale)), torch.autograd.grad(expected, exact), strict=True
    ):
        assert_close(ours, theirs, 1e-6)


def test_a_stream_that_goes_on_alone_keeps_its_gradient():
    x = torch.randn(2, 5, 8, requires_grad=True)
    same, _ = modulate(x, torch.zeros(2, 8), torch.zeros(2, 8), return_x=True)
    upstream = torch.randn(2, 5, 8)
    assert torch.equal(torch.autograd.grad(same, x, upstream)[0], upstream)


def test_a_residual_hands_on_the_gradient_that_it_gets():
    """dx of `x + gate * y` is the gradient of the sum: the same memory, not a copy."""
    x, y = torch.randn(2, 2, 5, 8).unbind(0)
    result = residual(x.requires_grad_(), y, torch.zeros(2, 8))
    upstream = torch.randn(2, 5, 8)
    assert torch.autograd.grad(result, x, upstream)[0].data_ptr() == upstream.data_ptr()
