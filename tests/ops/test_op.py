"""The declaration of an op: shapes from their text, and one decision per call that the backward keeps."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dit_fast import _C, backend, ops
from dit_fast.errors import ConfigError, UserError
from dit_fast.ops._op import Op
from tests.helpers.cases import loop_over
from tests.helpers.op_cases import CALLS, inputs, tapped

needs_library = pytest.mark.skipif(_C.unavailable() is not None, reason=f"{_C.unavailable()}")


@loop_over("name", [*CALLS, "diversity_loss taps"])
def test_one_decision_per_call(name, monkeypatch):
    made, choose = [], Op.choose
    monkeypatch.setattr(Op, "choose", lambda op, *rest, **given: made.append(op.name) or choose(op, *rest, **given))
    {**CALLS, "diversity_loss taps": tapped}[name](*(x.float().requires_grad_() for x in inputs(name))).sum().backward()
    assert made == ["diversity_loss" if "diversity" in name else name.split()[0]]


def test_what_was_checked_and_chosen_once_is_remembered_until_something_decides_anew(toy, monkeypatch):
    made, choose = [], backend.choose
    monkeypatch.setattr(backend, "choose", lambda *arguments: made.append(arguments) or choose(*arguments))
    x = Z(2, 4)

    def call(x, *scalars, **options):
        toy.choose("auto", x.device, x, *scalars, given=toy.check("auto", 0.0, x=x), **options)
        return len(made)

    assert call(x) == call(x) == call(Z(2, 4)) == 1
    assert [call(x.double()), call(Z(4, 2).T), call(x, "rms")] == [2, 3, 4]
    with backend.force("torch"):
        assert call(x) == 5
    with torch.autocast("cpu", torch.bfloat16):
        assert call(x) == 6
    assert call(x) == 6
    with pytest.raises(UserError, match="eps"):
        toy.check("auto", True, x=x)
    with pytest.raises(UserError, match="x must be"):
        toy.check("auto", 0.0, x=Z(4))


@needs_library
@pytest.mark.parametrize("forward", ["cpp", "torch"])
def test_a_backward_takes_what_its_forward_took(forward, monkeypatch):
    used = []
    native = torch.ops.dit_fast_native.adaln_backward
    monkeypatch.setattr(torch.ops.dit_fast_native, "adaln_backward", lambda *x: used.append(x) or native(*x))
    leaves = [x.float().requires_grad_() for x in inputs("layer_norm_modulate")]
    with backend.force(forward):
        out = ops.layer_norm_modulate(*leaves)
    with backend.force("torch" if forward == "cpp" else "cpp"):
        out.sum().backward()
    assert len(used) == (forward == "cpp")


def test_compiled_code_follows_force():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(ops.layer_norm_modulate, fullgraph=True, backend=counter)
    tensors = [x.float() for x in inputs("layer_norm_modulate")]
    for _ in range(2):
        compiled(*tensors)
    with backend.force("torch"):
        compiled(*tensors)
    assert counter.frame_count == 2


@needs_library
def test_a_result_that_the_compiled_code_cannot_write_is_left_to_the_reference():
    x, shift, scale = (x.float() for x in inputs("layer_norm_modulate"))
    assert ops.layer_norm_modulate(x, shift, scale, out_dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ConfigError, match=r"out_dtype is torch\.float64"):
        ops.layer_norm_modulate(x, shift, scale, out_dtype=torch.float64, backend="cpp")


Z = torch.zeros


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(backend, "_REGISTRY", {})
    return Op("toy", "x[N, ..., D] weight[2D, 3HC] int64 index[N] y[N, ..., D]")


@pytest.mark.parametrize(
    "given",
    [
        {"x": Z(2, 5, 7, 4), "weight": Z(8, 12), "index": Z(2).long(), "y": Z(2, 5, 7, 4)},
        {"x": Z(2, 4), "y": Z(2, 4)},
        {"weight": Z(8, 6), "x": Z(0, 3, 4).bfloat16()},
    ],
)
def test_shapes_that_fit(toy, given):
    toy.check("auto", 0, {"H": 2}, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": Z(4)}, r"x must be \[N, ..., D\], not \[4\]"),
        ({"x": Z(2, 5, 4), "y": Z(2, 6, 4)}, r"y must be \[N, ..., D\] = \[2, 5, 4\], not \[2, 6, 4\]"),
        ({"x": Z(2, 5, 4), "y": Z(2, 4)}, r"y must be \[N, ..., D\] = \[2, 5, 4\], not \[2, 4\]"),
        ({"x": Z(2, 4), "weight": Z(4, 6)}, r"weight must be \[2D, 3HC\] = \[8, 6C\], not \[4, 6\]"),
        ({"x": Z(2, 4), "weight": Z(8, 7)}, r"weight must be \[2D, 3HC\] = \[8, 6C\], not \[8, 7\]"),
        ({"weight": Z(7, 6)}, r"weight must be \[2D, 3HC\] = \[2D, 6C\], not \[7, 6\]"),
        ({"x": Z(2, 4), "index": Z(3).long()}, r"index must be \[N\] = \[2\], not \[3\]"),
        ({"index": Z(3)}, "index must be int64, not torch.float32"),
        ({"x": Z(3, 0)}, r"x must be \[N, ..., D\] with at least one channel, not \[3, 0\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(toy, given, message):
    with pytest.raises(UserError, match=f"^toy: {message}$"):
        toy.check("auto", 0, {"H": 2}, **given)
