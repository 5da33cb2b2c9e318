"""QK-norm as a torch op: the reference, registration, both modes of differentiation, strides, complaints."""

import importlib

import pytest
import torch
from torch.nn import functional as F

from dit_fast.errors import ConfigError, UserError
from dit_fast.ops import qk_norm
from dit_fast.ops.qk_norm import _fused, backward_op, forward_op
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close

N, T, H, D = 2, 7, 3, 8
EPS = 1e-5


def make(dtype=torch.float32, parameters=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = (torch.randn(N, T, 3 * H * D, generator=generator) + 0.5).to(dtype)
    return [qkv, *(torch.randn(D, generator=generator).to(parameters or dtype) for _ in range(4))]


def leaves(inputs):
    return [x.clone().requires_grad_() for x in inputs]


def plain(qkv, *parameters):
    return qk_norm(qkv, H, *parameters)


def through_op(qkv, *parameters):
    """What runs where the kernels can: here, torch behind the op."""
    return _fused(qkv, H, *parameters, None, None, EPS, "layer", "torch")


def exact(qkv, q_weight, q_bias, k_weight, k_bias):
    """From the definition, head by head."""
    columns = qkv.split(D, dim=-1)
    query = [F.layer_norm(x, (D,), q_weight, q_bias, EPS) for x in columns[:H]]
    key = [F.layer_norm(x, (D,), k_weight, k_bias, EPS) for x in columns[H : 2 * H]]
    return tuple(torch.stack(part, 1) for part in (query, key, columns[2 * H :]))


def tables(dtype=torch.float64, seed=3):
    """cos and sin [T, D], of one angle for each pair."""
    angles = torch.randn(T, D // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tuple(table.repeat_interleave(2, 1).to(dtype) for table in (angles.cos(), angles.sin()))


def exact_form(qkv, norm, weights, biases, rotary):
    """From the definition: pairs of neighbours as complex numbers, which turn by a product."""
    query, key, value = (torch.stack(part.split(D, dim=-1), 1) for part in qkv.split(H * D, dim=-1))
    parts = []
    for x, weight, bias in zip((query, key), weights or (1, 1), biases or (0, 0), strict=True):
        if norm == "layer":
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt() * weight + bias
        elif norm == "rms":
            x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        if rotary is not None:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            x = torch.view_as_real(pairs * torch.complex(*(table[:, ::2] for table in rotary))).flatten(-2)
        parts.append(x)
    return (*parts, value)


FORMS = {  # norm, weights, biases, rotary
    "layer, rotary": ("layer", True, True, True),
    "layer, weights alone": ("layer", True, False, False),
    "layer, biases alone, rotary": ("layer", False, True, True),
    "layer, nothing learned": ("layer", False, False, False),
    "rms": ("rms", True, False, False),
    "rms, rotary": ("rms", True, False, True),
    "rms, nothing learned, rotary": ("rms", False, False, True),
    "rotary": ("none", False, False, True),
    "nothing": ("none", False, False, False),
}


def given(form, dtype, parameters=None):
    """qkv, the four parameters, some None, and the tables."""
    _, weights, biases, rotary = FORMS[form]
    qkv, *learned = make(dtype, parameters)
    learned = [x if present else None for x, present in zip(learned, (weights, biases) * 2, strict=True)]
    return [qkv, *learned], tables(torch.float64 if dtype == torch.float64 else torch.float32) if rotary else None


@loop_over("form", FORMS)
@loop_over("dtype", [torch.float64, torch.float32, torch.bfloat16])
@loop_over("fused", [False, True])
def test_forms(form, dtype, fused):
    if fused and form == "nothing":
        return
    norm, limit = FORMS[form][0], {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    (qkv, *learned), rotary = given(form, dtype, None if dtype == torch.float64 else torch.float32)
    ours = [None if x is None else x.clone().requires_grad_() for x in (qkv, *learned)]
    wide = [None if x is None else x.double().requires_grad_() for x in (qkv, *learned)]
    if fused:
        outputs = _fused(ours[0], H, *ours[1:], *(rotary or (None,) * 2), EPS, norm, "torch")
    else:
        outputs = qk_norm(ours[0], H, *ours[1:], eps=EPS, norm=norm, rotary=rotary)
    pairs = [tuple(wide[i] for i in places) if wide[places[0]] is not None else None for places in ((1, 3), (2, 4))]
    expected = exact_form(wide[0], norm, *pairs, None if rotary is None else [table.double() for table in rotary])
    for each, reference in zip(outputs, expected, strict=True):
        assert each.dtype == dtype
        assert_close(each, reference, limit)
    leaves_, exact_ = ([x for x in side if x is not None] for side in (ours, wide))
    grads = torch.autograd.grad(outputs, leaves_, seeds(dtype))
    for each, reference, x in zip(
        grads, torch.autograd.grad(expected, exact_, [s.double() for s in seeds(dtype)]), leaves_, strict=True
    ):
        assert each.dtype == x.dtype
        assert_close(each, reference, limit if x.dtype == dtype else 1e-6)


def seeds(dtype, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, H, T, D, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["fp32 parameters", "parameters alike"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", [plain, through_op])
def test_values_and_gradients(op, dtype, parameters):
    inputs = make(dtype, parameters)
    ours, wide = leaves(inputs), leaves([x.double() for x in inputs])
    outputs, expected = op(*ours), exact(*wide)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
    for each, reference in zip(outputs, expected, strict=True):
        assert each.dtype == dtype
        assert each.shape == (N, H, T, D)
        assert_close(each, reference, rounding[dtype])
    grads = torch.autograd.grad(outputs, ours, seeds(dtype))
    for each, reference, x in zip(
        grads, torch.autograd.grad(expected, wide, [s.double() for s in seeds(dtype)]), inputs, strict=True
    ):
        assert each.dtype == x.dtype
        assert_close(each, reference, rounding[x.dtype])


@loop_over("op", [plain, through_op])
def test_attention_takes_the_parts_without_a_copy(op):
    """Heads are contiguous in [N, T, H, d], the layout of flash-attn; value is a view of the projection."""
    qkv, *parameters = make()
    query, key, value = op(qkv, *parameters)
    assert query.transpose(1, 2).is_contiguous()
    assert key.transpose(1, 2).is_contiguous()
    assert value.stride()[1:] == (D, 3 * H * D, 1)
    assert value.data_ptr() == qkv[0, 0, 2 * H * D :].data_ptr()


def test_auto_is_the_reference_to_the_bit_on_the_cpu():
    inputs = make()
    for ours, reference in zip(plain(*inputs), qk_norm(inputs[0], H, *inputs[1:], backend="torch"), strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("op", [plain, through_op])
def test_float64_stays_float64(op):
    inputs = make(torch.float64)
    assert torch.autograd.gradcheck(op, leaves(inputs))
    for ours, reference in zip(op(*inputs), exact(*inputs), strict=True):
        assert_close(ours, reference, 1e-13)


@loop_over("op", [plain, through_op])
def test_strided_projection_and_strided_gradients(op):
    """Transposed, sliced and expanded inputs; gradients as attention hands them over, sliced, expanded."""
    row = 3 * H * D
    wide = torch.randn(T, N + 1, row + 3, generator=torch.Generator().manual_seed(2))
    parameters = make()[1:]
    views = [wide[:, :N, :row].transpose(0, 1), wide[:1, :N, 3:].transpose(0, 1).expand(N, T, row)]
    views += [wide[:N].transpose(1, 2).reshape(N, row + 3, N + 1)[:, 3:, :1].expand(N, row, T).transpose(1, 2)]
    contiguous = seeds(torch.float32)
    upstream = [contiguous[0].transpose(1, 2).contiguous().transpose(1, 2), contiguous[1], contiguous[2][:, :1]]
    upstream = [*upstream[:2], upstream[2].expand(N, H, T, D)]
    for view in views:
        ours, reference = leaves([view, *parameters]), leaves([view.contiguous(), *parameters])
        strided = op(view.detach().requires_grad_(), *ours[1:])
        for each, same in zip(strided, exact(*reference), strict=True):
            assert_close(each, same.detach(), 1e-6)
        expected = torch.autograd.grad(exact(*reference), reference, [x.contiguous() for x in upstream])
        for each, same in zip(torch.autograd.grad(op(*ours), ours, upstream), expected, strict=True):
            assert_close(each, same, 1e-6)
        total = sum(part.sum() for part in op(*ours))
        same = sum(part.sum() for part in exact(*reference))
        for each, wanted in zip(torch.autograd.grad(total, ours), torch.autograd.grad(same, reference), strict=True):
            assert_close(each, wanted, 1e-6, extra=1e-5)


@loop_over("op", [plain, through_op])
@loop_over("wanted", [[0], [1], [4], [0, 2], [1, 2, 3, 4]])
def test_only_some_gradients_are_needed(op, wanted):
    inputs = make()
    every = leaves(inputs)
    expected = torch.autograd.grad(exact(*every), every, seeds(torch.float32))
    some = [x.clone().requires_grad_(place in wanted) for place, x in enumerate(inputs)]
    outputs = op(*some)
    used = [place for place in range(3) if outputs[place].requires_grad]
    found = torch.autograd.grad(
        [outputs[p] for p in used], [some[p] for p in wanted], [seeds(torch.float32)[p] for p in used]
    )
    for each, place in zip(found, wanted, strict=True):
        assert_close(each, expected[place], 1e-6)


def test_gradients_that_nobody_needs_are_not_computed():
    qkv, *parameters = make()
    grads = [x.transpose(1, 2) for x in seeds(torch.float32)]
    weights = parameters[0], parameters[2]
    form = (None, None, EPS, "layer", True)
    only_input = backward_op(*grads, qkv, *weights, *form, True, False, "torch")
    only_parameters = backward_op(*grads, qkv, *weights, *form, False, True, "torch")
    assert [x.numel() for x in (*only_input, *only_parameters)] == [qkv.numel(), 0, 0, 4 * D]


@pytest.mark.parametrize(("wanted", "needs"), [([0], (True, False)), ([3], (False, True)), ([0, 1], (True, True))])
def test_the_backward_asks_for_what_is_needed(wanted, needs, monkeypatch):
    asked = []
    module = importlib.import_module("dit_fast.ops.qk_norm")
    monkeypatch.setattr(module, "backward_op", lambda *x: asked.append(x[11:13]) or backward_op(*x))
    inputs = [x.requires_grad_(place in wanted) for place, x in enumerate(make())]
    sum(part.sum() for part in through_op(*inputs)).backward()
    assert asked == [needs]


@loop_over("op", [plain, through_op])
def test_one_part_alone_has_a_gradient(op):
    inputs = make()
    for place in range(3):
        ours, reference = leaves(inputs), leaves(inputs)
        found = torch.autograd.grad(op(*ours)[place].sin().sum(), ours[0])[0]
        assert_close(found, torch.autograd.grad(exact(*reference)[place].sin().sum(), reference[0])[0], 1e-6)


def test_what_is_saved_is_the_projection_and_the_weights():
    inputs = leaves(make())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        through_op(*inputs)
    assert sorted(x.data_ptr() for x in saved) == sorted(inputs[place].data_ptr() for place in (0, 1, 3))


@loop_over("op", [plain, through_op])
def test_empty_batches(op):
    _, *parameters = make()
    for shape in ((0, T, 3 * H * D), (N, 0, 3 * H * D)):
        inputs = leaves([torch.zeros(shape), *parameters])
        outputs = op(*inputs)
        assert [tuple(x.shape) for x in outputs] == [(shape[0], H, shape[1], D)] * 3
        grads = torch.autograd.grad(sum(x.sum() for x in outputs), inputs)
        assert grads[0].shape == shape
        assert all((grad == 0).all() for grad in grads[1:])


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        qkv, *parameters = make(dtype)
        torch.library.opcheck(forward_op.registered, (qkv, *parameters, None, None, H, EPS, "layer", "torch"))
        grads, turn = [x.transpose(1, 2) for x in seeds(dtype)], tables(torch.float32)
        for needs in ((True, True), (True, False), (False, True)):
            saved = (qkv, parameters[0], parameters[2])
            torch.library.opcheck(
                backward_op.registered, (*grads, *saved, None, None, EPS, "layer", True, *needs, "torch")
            )
            torch.library.opcheck(backward_op.registered, (*grads, *saved, *turn, EPS, "rms", False, *needs, "torch"))
        torch.library.opcheck(forward_op.registered, (qkv, None, None, None, None, *turn, H, EPS, "none", "torch"))
        nothing = (qkv, None, None, *turn, EPS, "none", False, True, False, "torch")
        torch.library.opcheck(backward_op.registered, (*grads, *nothing))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_values_and_gradients_equal_eager_ones(compiler):
    def attend(qkv, *parameters):
        return F.scaled_dot_product_attention(*plain(qkv * 1.5, *parameters)).sin()

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=compiler)
    for tokens in (T, T + 4):
        generator = torch.Generator().manual_seed(tokens)
        inputs = [torch.randn(N, tokens, 3 * H * D, generator=generator), *make()[1:]]
        ours, reference = leaves(inputs), leaves(inputs)
        values, expected = compiled(*ours), attend(*reference)
        assert_close(values, expected.detach(), 1e-6)
        for each, same in zip(
            torch.autograd.grad(values.sum(), ours), torch.autograd.grad(expected.sum(), reference), strict=True
        ):
            assert_close(each, same, 1e-5, extra=1e-5)  # the gradient of k_bias is zero: softmax ignores it
        with torch.no_grad():
            assert_close(compiled(*inputs), expected.detach(), 1e-6)


@loop_over("op", [plain, through_op])
@loop_over("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype_of_the_projection(op, dtype):
    """fp32 parameters and a half-precision projection, as under autocast: one rounding, and nothing is cast up."""
    inputs = make(dtype, torch.float32)
    with torch.autocast("cpu", dtype):
        ours = leaves(inputs)
        outputs = op(*ours)
    reference = leaves(inputs)
    for each, same in zip(outputs, op(*reference), strict=True):
        assert each.dtype == dtype
        assert torch.equal(each, same)
    wide = make()
    with torch.autocast("cpu", dtype):
        assert {x.dtype for x in op(*wide)} == {torch.float32}


@loop_over("op", [plain, through_op])
@loop_over("reentrant", [False, True])
def test_inside_an_activation_checkpoint(op, reentrant):
    inputs = make()
    ours, reference = leaves(inputs), leaves(inputs)

    def function(*x):
        return F.scaled_dot_product_attention(*op(*x))

    again = torch.utils.checkpoint.checkpoint(function, *ours, use_reentrant=reentrant)
    for parts in (ours, reference):
        (again if parts is ours else function(*parts)).square().sum().backward()
    for each, same in zip(ours, reference, strict=True):
        assert_close(each.grad, same.grad, 1e-7)


def test_forward_mode_against_differences_and_reverse_mode_over_the_primal():
    """What mean flow does: a directional derivative, with reverse mode on the primal."""
    qkv, *parameters = make(torch.float64)
    directions = make(torch.float64, seed=9)
    trained = [x.requires_grad_() for x in parameters]
    for op in (plain, through_op):

        def loss(*inputs, op=op):
            query, key, value = op(*inputs)
            return ((query @ key.transpose(-2, -1)).softmax(-1) @ value).sin().sum()

        for moved in ([0], [1, 2], [3, 4], [0, 1, 2, 3, 4]):

            def along(*some, moved=moved, loss=loss):
                inputs = [qkv, *trained]
                for place, x in zip(moved, some, strict=True):
                    inputs[place] = x
                return loss(*inputs)

            start = tuple([qkv, *trained][place] for place in moved)
            value, tangent = torch.func.jvp(along, start, tuple(directions[place] for place in moved))
            with torch.no_grad():
                ends = [
                    along(*(x + sign * 1e-6 * directions[place] for x, place in zip(start, moved, strict=True)))
                    for sign in (1, -1)
                ]
            assert_close(tangent, (ends[0] - ends[1]) / 2e-6, 1e-7)
            if moved == [0]:
                reference = leaves([qkv, *parameters])
                expected = torch.autograd.grad(loss(*reference), reference[1:])
                for each, same in zip(torch.autograd.grad(value, trained), expected, strict=True):
                    assert_close(each, same, 1e-9, 1e-12)


@loop_over(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 72)}, r"qkv must be \[N, T, 3HC\] = \[N, T, 9C\], not \[2, 72\]"),
        ({"qkv": torch.zeros(2, 3, 71)}, "qkv must be"),
        ({"num_heads": 0}, "num_heads must be an integer of at least 1, not 0"),
        ({"num_heads": 5}, r"qkv must be .* = \[2, 7, 15C\], not \[2, 7, 72\]"),
        ({"k_bias": torch.zeros(9)}, r"k_bias must be \[C\] = \[8\], not \[9\]"),
        ({"qkv": torch.zeros(2, 3, 72, dtype=torch.int64)}, "qkv must be floating point .*, not torch.int64"),
        ({"q_weight": torch.zeros(8, dtype=torch.complex64)}, "q_weight must be floating point"),
        ({"q_bias": torch.zeros(8, device="meta")}, "q_bias is on meta, qkv on cpu"),
        ({"q_weight": None}, "q_weight must be a tensor, not None; for a norm without one give ones"),
        ({"norm": "batch"}, "norm must be one of layer, rms, none, not 'batch'"),
        ({"norm": "rms"}, 'q_bias must be None, as norm "rms" has none'),
        ({"norm": "none"}, 'q_weight must be None, as norm "none" has none'),
        ({"rotary": torch.zeros(7, 8)}, r"rotary must be a pair \(cos, sin\), not Tensor"),
        ({"rotary": (torch.zeros(7, 8), torch.zeros(6, 8))}, r"sin must be \[T, C\] = \[7, 8\], not \[6, 8\]"),
        (
            {"qkv": torch.zeros(2, 7, 81), "rotary": (torch.zeros(7, 9),) * 2}
            | dict.fromkeys(("q_weight", "q_bias", "k_weight", "k_bias")),
            "heads of width 9 have no pairs to turn",
        ),
    ],
)
def test_complaints_name_the_culprit(change, message):
    names = ("qkv", "q_weight", "q_bias", "k_weight", "k_bias")
    arguments = dict(zip(names, make(), strict=True)) | {"num_heads": H} | change
    with pytest.raises(UserError, match=message):
        qk_norm(**arguments)


def test_backends():
    inputs = make()
    with pytest.raises(ConfigError, match="unknown backend 'cuda'; valid: auto, triton, torch"):
        qk_norm(inputs[0], H, *inputs[1:], backend="cuda")
    with pytest.raises(ConfigError, match="backend 'triton' cannot run"):
        qk_norm(inputs[0], H, *inputs[1:], backend="triton")
