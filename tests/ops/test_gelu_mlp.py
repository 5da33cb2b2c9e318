"""The MLP as a torch op: what is kept, registration, both modes of differentiation, autocast, complaints."""

import pytest
import torch
from torch.nn import functional as F

from dit_fast.benchmarks.cost import peak_memory
from dit_fast.errors import ConfigError, UserError
from dit_fast.ops import gelu_mlp
from dit_fast.ops.gelu_mlp import _recompute, gelu_backward_op
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close

N, T, D, HIDDEN, OUT = 2, 5, 12, 40, 9
SHAPES = [(N, T, D), (HIDDEN, D), (HIDDEN,), (OUT, HIDDEN), (OUT,)]
BACKENDS = ["torch", "recompute", "auto"]  # on the CPU "cpp" is what "auto" takes, but for float64


def make(dtype=torch.float32, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) / shape[-1] ** 0.5 * 2).to(dtype) for shape in shapes]


def leaves(inputs):
    return [x.clone().requires_grad_() for x in inputs]


def exact(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    hidden = x @ fc1_weight.T + fc1_bias
    tanh = torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3))
    return (0.5 * hidden * (1 + tanh)) @ fc2_weight.T + fc2_bias


def seed_like(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(6)).to(y.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, dtype):
    """GEMM sums in fp32; in half precision the roundings of both hidden tensors and of the result."""
    inputs = make(dtype)
    ours, wide = leaves(inputs), leaves([x.double() for x in inputs])
    y, expected = gelu_mlp(*ours, backend=backend), exact(*wide)
    limit = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert y.dtype == dtype
    assert_close(y, expected, limit)
    seed = seed_like(y)
    grads = torch.autograd.grad(y, ours, seed), torch.autograd.grad(expected, wide, seed.double())
    for each, reference in zip(*grads, strict=True):
        assert each.dtype == dtype
        assert_close(each, reference, limit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_in_float64(backend):
    inputs = make(torch.float64, shapes=[(2, 3), (4, 3), (4,), (2, 4), (2,)])
    assert torch.autograd.gradcheck(lambda *x: gelu_mlp(*x, backend=backend), leaves(inputs), check_forward_ad=True)


@loop_over("backend", BACKENDS)
def test_values_do_not_depend_on_whether_gradients_are_recorded(backend):
    inputs = make()
    with torch.no_grad():
        quiet = gelu_mlp(*inputs, backend=backend)
    assert torch.equal(quiet, gelu_mlp(*leaves(inputs), backend=backend))
    assert torch.equal(quiet, gelu_mlp(*inputs, backend=backend))


def test_the_epilogue_of_the_cpu_has_the_other_gelu():
    """Why the library's epilogue is bound to CUDA: the same function computes the erf form here."""
    _, fc1_weight, fc1_bias, *_ = inputs = make()
    x = inputs[0].flatten(0, 1)
    found = torch.ops.aten._addmm_activation(fc1_bias, x, fc1_weight.t(), use_gelu=True)
    hidden = F.linear(x, fc1_weight, fc1_bias)
    assert_close(found, F.gelu(hidden), 1e-6)
    assert (found - F.gelu(hidden, approximate="tanh")).abs().max() > 1e-5


def saved(function):
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
        function()
    return found


def test_one_hidden_tensor_is_kept_where_autograd_keeps_two():
    inputs = leaves(make())
    hidden_sized = {
        backend: [x for x in saved(lambda b=backend: gelu_mlp(*inputs, backend=b)) if x.numel() == N * T * HIDDEN]
        for backend in ("torch", "recompute")
    }
    assert len(hidden_sized["torch"]) == 2
    (kept,) = hidden_sized["recompute"]
    assert_close(kept, F.linear(inputs[0], *inputs[1:3]).flatten(0, 1), 1e-6)
    everything = saved(lambda: gelu_mlp(*inputs, backend="recompute"))
    assert sum(x.numel() for x in everything) == sum(x.numel() for x in inputs) - OUT + N * T * HIDDEN


def test_nothing_is_kept_without_gradients():
    inputs = leaves(make())
    with torch.no_grad():
        assert saved(lambda: gelu_mlp(*inputs, backend="recompute")) == []


@loop_over("backend", ["torch", "recompute"])
@loop_over("wanted", [[0], [1], [2], [3], [4], [0, 4], [2, 3], [1, 3]])
def test_only_some_gradients_are_needed(backend, wanted):
    inputs = make()
    every = leaves(inputs)
    expected = torch.autograd.grad(exact(*every), every, seed_like(exact(*every)))
    some = [x.clone().requires_grad_(place in wanted) for place, x in enumerate(inputs)]
    y = gelu_mlp(*some, backend=backend)
    for each, place in zip(torch.autograd.grad(y, [some[p] for p in wanted], seed_like(y)), wanted, strict=True):
        assert_close(each, expected[place], 1e-6)


def test_the_backward_makes_two_tensors_of_the_hidden_size():
    """The activation, and the gradient of hidden in the place of the activation's."""
    rows, width, hidden = 256, 4, 512
    inputs = leaves(make(shapes=[(rows, width), (hidden, width), (hidden,), (width, hidden), (width,)]))
    loss = gelu_mlp(*inputs, backend="recompute").sum()
    peak = peak_memory(lambda: torch.autograd.grad(loss, inputs), torch.device("cpu"))
    assert 2 * rows * hidden * 4 <= peak < 2.5 * rows * hidden * 4


def test_parts_that_nobody_needs_are_not_computed():
    hidden, grad, weight = torch.randn(6, 8), torch.randn(6, 5), torch.randn(5, 8)
    sizes = [
        [x.numel() for x in gelu_backward_op(hidden, grad, weight, activation, bias, "recompute")]
        for activation in (True, False)
        for bias in (True, False)
    ]
    assert sizes == [[48, 48, 8], [48, 48, 0], [0, 48, 8], [0, 48, 0]]


@loop_over("backend", BACKENDS)
def test_strided_inputs_and_gradients(backend):
    """x sliced, transposed and expanded, weights transposed; gradients transposed and expanded."""
    wide = torch.randn(T, N, D + 3, generator=torch.Generator().manual_seed(1))
    _, *parameters = make()
    parameters[0] = parameters[0].t().contiguous().t()
    for view in (
        wide[..., 3:].transpose(0, 1),
        wide[:1, :, :D].transpose(0, 1).expand(N, T, D),
        wide[:, :, ::2][..., :6],
    ):
        weights = [parameters[0][:, : view.shape[-1]], *parameters[1:]]
        ours, reference = leaves([view, *weights]), leaves([x.contiguous() for x in (view, *weights)])
        y, expected = gelu_mlp(view, *ours[1:], backend=backend), exact(*reference)
        assert_close(y, expected.detach(), 1e-6)
        y = gelu_mlp(*ours, backend=backend)
        upstream = [seed_like(y).transpose(0, 1).contiguous().transpose(0, 1), torch.ones(1, 1, 1).expand_as(y)]
        for seed in upstream:
            found = torch.autograd.grad(y, ours, seed, retain_graph=True)
            wanted = torch.autograd.grad(expected, reference, seed.contiguous(), retain_graph=True)
            for each, same in zip(found, wanted, strict=True):
                assert_close(each, same, 1e-6)


@loop_over("backend", BACKENDS)
@loop_over("shape", [(D,), (7, D), (0, T, D), (N, 0, D), (2, 1, 3, D)])
def test_any_leading_shape_and_empty_batches(backend, shape):
    inputs = make(shapes=[shape, *SHAPES[1:]])
    ours, reference = leaves(inputs), leaves(inputs)
    y = gelu_mlp(*ours, backend=backend)
    assert y.shape == (*shape[:-1], OUT)
    found = torch.autograd.grad(y.sum(), ours), torch.autograd.grad(exact(*reference).sum(), reference)
    for each, same in zip(*found, strict=True):
        assert_close(each, same, 1e-6)


@loop_over("backend", BACKENDS)
@loop_over("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters(backend, dtype):
    inputs, wide = make(), leaves([x.to(dtype).double() for x in make()])
    for x_dtype in (torch.float32, dtype):
        ours = leaves([inputs[0].to(x_dtype), *inputs[1:]])
        with torch.autocast("cpu", dtype):
            y = gelu_mlp(*ours, backend=backend)
            assert y.dtype == dtype
        grads = torch.autograd.grad(y.float().sum(), ours)
        expected = exact(*wide)
        limit = 8e-3 if dtype == torch.bfloat16 else 1e-3
        assert_close(y, expected, limit)
        for each, leaf, same in zip(grads, ours, torch.autograd.grad(expected.sum(), wide), strict=True):
            assert each.dtype == leaf.dtype
            assert_close(each, same, limit)


@loop_over("backend", BACKENDS)
def test_autocast_leaves_float64_alone_and_does_not_reach_the_backward(backend):
    ours = leaves(make(torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        y = gelu_mlp(*ours, backend=backend)
    assert_close(y, exact(*ours).detach(), 1e-12)
    ours, reference = leaves(make()), leaves(make())
    y = gelu_mlp(*ours, backend=backend)
    if backend == "recompute":
        with torch.autocast("cpu", torch.bfloat16):
            grads = torch.autograd.grad(y.sum(), ours)
        for each, same in zip(grads, torch.autograd.grad(exact(*reference).sum(), reference), strict=True):
            assert_close(each, same, 1e-6)


@loop_over("backend", BACKENDS)
def test_x_is_cast_to_the_parameters(backend):
    """An fp32 stream into a half-precision MLP and the reverse."""
    for stream, dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        x, *parameters = leaves([make(stream)[0], *make(dtype)[1:]])
        y = gelu_mlp(x, *parameters, backend=backend)
        assert y.dtype == dtype
        assert torch.equal(y, gelu_mlp(x.to(dtype), *parameters, backend=backend))
        assert torch.autograd.grad(y.sum(), x)[0].dtype == stream


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        tensors = make(dtype, shapes=[(7, 10), (7, 4), (4, 10)])
        for wanted in ((True, True), (False, True), (True, False)):
            torch.library.opcheck(gelu_backward_op.registered, (*tensors, *wanted, "recompute"))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("backend", ["auto", "recompute"])
def test_compiled_values_and_gradients_equal_eager_ones(backend, compiler):
    def function(*x):
        return gelu_mlp(*x, backend=backend).sin()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for tokens in (T, T + 3):
        inputs = make(shapes=[(N, tokens, D), *SHAPES[1:]])
        ours, reference = leaves(inputs), leaves(inputs)
        y, expected = compiled(*ours), function(*reference)
        assert_close(y, expected.detach(), 1e-6)
        grads = torch.autograd.grad(y.sum(), ours), torch.autograd.grad(expected.sum(), reference)
        for each, same in zip(*grads, strict=True):
            assert_close(each, same, 1e-5)
        with torch.no_grad():
            assert_close(compiled(*inputs), expected.detach(), 1e-6)


@loop_over("reentrant", [False, True])
@loop_over("backend", BACKENDS)
def test_inside_an_activation_checkpoint(backend, reentrant):
    ours, reference = leaves(make()), leaves(make())
    again = torch.utils.checkpoint.checkpoint(gelu_mlp, *ours, backend, use_reentrant=reentrant)
    again.square().sum().backward()
    gelu_mlp(*reference, backend).square().sum().backward()
    assert all(torch.equal(each.grad, same.grad) for each, same in zip(ours, reference, strict=True))


@loop_over("moved", [[0], [1, 2], [3], [4], [0, 1, 2, 3, 4]])
@loop_over("trained", [True, False])
@loop_over("backend", BACKENDS)
def test_forward_mode_against_differences_and_reverse_mode_over_the_primal(backend, trained, moved):
    inputs, directions = make(torch.float64), make(torch.float64, seed=8)
    inputs = leaves(inputs) if trained else inputs

    def along(*some):
        arguments = list(inputs)
        for place, x in zip(moved, some, strict=True):
            arguments[place] = x
        return gelu_mlp(*arguments, backend=backend).sin().sum()

    start = tuple(inputs[place] for place in moved)
    value, tangent = torch.func.jvp(along, start, tuple(directions[place] for place in moved))
    with torch.no_grad():
        moves = [directions[place] for place in moved]
        ends = [along(*(x + s * 1e-6 * move for x, move in zip(start, moves, strict=True))) for s in (1, -1)]
    assert_close(tangent, (ends[0] - ends[1]) / 2e-6, 1e-7)
    if trained and moved == [0]:
        reference = leaves(inputs)
        expected = torch.autograd.grad(exact(*reference).sin().sum(), reference[1:])
        for each, same in zip(torch.autograd.grad(value, inputs[1:]), expected, strict=True):
            assert_close(each, same, 1e-9)


def test_reverse_mode_around_forward_mode_recomputes_what_the_inner_level_did_not_keep():
    """Inside jvp nothing seems to need a gradient; the level around it still gets the right one."""
    inputs, direction = make(torch.float64), make(torch.float64, seed=8)[0]

    def value(weight):
        arguments = [inputs[0], weight, *inputs[2:]]
        return torch.func.jvp(lambda x: gelu_mlp(x, *arguments[1:], backend="recompute"), (inputs[0],), (direction,))[0]

    found = torch.func.grad(lambda weight: value(weight).sin().sum())(inputs[1])
    leaf = inputs[1].clone().requires_grad_()
    expected = torch.autograd.grad(exact(inputs[0], leaf, *inputs[2:]).sin().sum(), leaf)[0]
    assert_close(found, expected, 1e-10)


def test_backward_without_a_kept_hidden_tensor():
    ours, reference = leaves(make()), leaves(make())
    copies = [each.detach() for each in ours[1:]]
    y, hidden, _ = _recompute(ours[0].flatten(0, 1), *ours[1:], *copies, 0, "recompute")
    assert hidden.numel() == 0
    found = torch.autograd.grad(y.sum(), ours), torch.autograd.grad(exact(*reference).sum(), reference)
    for each, same in zip(*found, strict=True):
        assert_close(each, same, 1e-6)


@loop_over(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"x must be \[\.\.\., D\], not \[\]"),
        (
            {"x": torch.zeros(3, 11)},
            r"fc1_weight must be \[F, D\] = \[40, 11\], not \[40, 12\]",
        ),
        ({"fc1_bias": torch.zeros(41)}, r"fc1_bias must be \[F\] = \[40\]"),
        ({"fc2_weight": torch.zeros(9, 41)}, r"fc2_weight must be \[E, F\] = \[9, 40\]"),
        ({"fc2_bias": torch.zeros(8)}, r"fc2_bias must be \[E\] = \[9\]"),
        ({"fc2_bias": torch.zeros(9, 1)}, r"fc2_bias must be \[E\] = \[9\], not \[9, 1\]"),
        ({"fc1_weight": torch.zeros(40)}, r"fc1_weight must be \[F, D\] = \[F, 12\], not \[40\]"),
        ({"x": torch.zeros(3, 12, dtype=torch.int64)}, "x must be floating point .*, not torch.int64"),
        ({"fc2_weight": torch.zeros(9, 40).half()}, "fc2_weight is torch.float16, fc1_weight torch.float32"),
        ({"fc2_bias": torch.zeros(9, device="meta")}, "fc2_bias is on meta, x on cpu"),
    ],
)
def test_complaints_name_the_culprit(change, message):
    names = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    with pytest.raises(UserError, match=message):
        gelu_mlp(**(dict(zip(names, make(), strict=True)) | change))


def test_backends():
    with pytest.raises(ConfigError, match="unknown backend 'fast'; valid: auto, triton, cpp, recompute, torch"):
        gelu_mlp(*make(), backend="fast")
    with pytest.raises(ConfigError, match="backend 'triton' cannot run"):
        gelu_mlp(*make(), backend="triton")
