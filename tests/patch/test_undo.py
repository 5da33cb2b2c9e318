"""handle.undo: exact for what `apply` put in, loud for what something else has put over it."""

import copy
import functools
import types

import pytest
import torch

from dit_fast import patch
from dit_fast.errors import UserError
from tests.helpers.published_models import Transformer, inputs, leaves


def _model(kind="input", **options):
    torch.manual_seed(0)
    model = Transformer(kind, **options).eval()
    return model, copy.deepcopy(model)


def _equal(ours, theirs):
    return all(torch.equal(left, right) for left, right in zip(leaves(ours), leaves(theirs), strict=True))


def _patched(model):
    return {path for path, module in model.named_modules() if "forward" in vars(module)}


class ConvertOutputs:
    """What accelerate's mixed precision puts around a forward: an object that says what it wraps."""

    def __init__(self, forward):
        functools.update_wrapper(self, forward)
        self.forward = forward

    def __call__(self, *arguments, **named):
        return self.forward(*arguments, **named)


def _prepare(model):
    """accelerate's prepare_model: the forward is kept, wrapped twice and bound again."""
    model._original_forward = model.forward
    model.forward = types.MethodType(_autocast(model.forward.__func__), model)
    model.forward = types.MethodType(ConvertOutputs(model.forward.__func__), model)


def _autocast(forward):
    @functools.wraps(forward)
    def in_autocast(*arguments, **named):
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            return forward(*arguments, **named)

    return in_autocast


def _unwrap(model):
    model.forward = vars(model).pop("_original_forward")


def test_a_forward_wrapped_since_is_named_and_the_rest_undone():
    model, twin = _model()
    handle = patch.apply(model)
    _prepare(model)
    for _ in range(2):
        with pytest.raises(UserError, match=r"forward of the model is now .*ConvertOutputs around that"):
            handle.undo()
        assert _patched(model) == {""}
    _unwrap(model)
    handle.undo()
    handle.undo()
    assert not _patched(model)
    assert _equal(model(*inputs()), twin(*inputs()))


def test_a_second_apply_says_who_stands_there():
    model, _ = _model()
    patch.apply(model)
    _prepare(model)
    second = patch.apply(model)
    assert list(second.report.refused) == [""]
    assert "already replaced on the instance, by " in second.report.refused[""]
    assert "ConvertOutputs around that of patch.apply" in second.report.refused[""]
    second.undo()
    assert _patched(model) == {""}


def test_a_wrapper_that_copies_attributes_stays():
    model, _ = _model("sit")
    handle = patch.apply(model)
    block, calls = model.blocks[1], []

    @functools.wraps(block.forward)
    def counting(*arguments, forward=block.forward, **named):
        calls.append(1)
        return forward(*arguments, **named)

    block.forward = counting
    with pytest.raises(UserError, match=r"blocks\.1 is now .*test_undo.*counting around"):
        handle.undo()
    assert _patched(model) == {"blocks.1"}
    model(*inputs())
    assert calls


def test_a_forward_put_in_its_place_is_not_removed():
    model, _ = _model("sit")
    handle = patch.apply(model)
    model.blocks[0].forward = lambda x, c: x
    with pytest.raises(UserError, match=r"blocks\.0 is now .*lambda"):
        handle.undo()
    assert model.blocks[0].forward("x", "c") == "x"


def test_handles_undo_what_they_installed_in_any_order():
    model, twin = _model()
    attributes = [set(vars(module)) for module in model.modules()]
    first = patch.apply(model)
    forwards = [vars(module).get("forward") for module in model.modules()]
    second = patch.apply(model)
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    assert second.report.replaced == first.report.replaced
    first.undo()
    assert [set(vars(module)) for module in model.modules()] == attributes
    third = patch.apply(model)
    first.undo()
    second.undo()
    assert _patched(model)
    third.undo()
    assert not _patched(model)
    assert _equal(model(*inputs()), twin(*inputs()))


def test_parts_are_patched_and_undone_one_by_one():
    model, _ = _model(qk_norm=True)
    blocks = patch.apply(model.blocks[0])
    whole = patch.apply(model, ops={"gelu_mlp"})
    everything = patch.apply(model)
    blocks.undo()
    assert {"blocks.0", "blocks.1"} & _patched(model) == {"blocks.1"}
    whole.undo()
    assert {"", "blocks.1", "blocks.1.mlp"} & _patched(model) == {"", "blocks.1"}
    everything.undo()
    assert not _patched(model)


def test_an_average_made_by_copying_keeps_its_own_patch():
    model, twin = _model()
    handle = patch.apply(model)
    average = copy.deepcopy(model)
    handle.undo()
    assert not _patched(model)
    assert "" in _patched(average)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0)
    assert not any(leaf.any() for leaf in leaves(average(*inputs())))
    assert _equal(model(*inputs()), twin(*inputs()))
    patch.apply(average).undo()
    assert not _patched(average)


def test_a_forward_borrowed_from_a_patched_module_is_foreign():
    model, _ = _model("sit")
    patch.apply(model)
    other, _ = _model("sit")
    other.blocks[0].forward = model.blocks[0].forward
    assert "already replaced" in patch.apply(other).report.refused["blocks.0"]


def test_hooks_dtype_and_state_survive():
    model, twin = _model()
    seen = []
    model.blocks[0].register_forward_hook(lambda *_: seen.append("hook"))
    model.blocks[0].mlp.register_forward_pre_hook(lambda *_: seen.append("pre-hook"))
    handle = patch.apply(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.double().load_state_dict(before)
    batch = inputs(dtype=torch.float64)
    for ours, theirs in zip(leaves(model(*batch)), leaves(twin.double()(*batch)), strict=True):
        torch.testing.assert_close(ours, theirs)
    handle.undo()
    model(*batch)
    assert seen == 2 * ["pre-hook", "hook"]
    assert list(before) == list(model.state_dict())


@pytest.mark.parametrize("first", ["apply", "compile"])
def test_compiled_before_or_after(first):
    model, twin = _model("sit", depth=1)
    torch._dynamo.reset()
    handle = patch.apply(model) if first == "apply" else None
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    results = [compiled(*inputs())]
    handle = handle or patch.apply(model)
    results.append(compiled(*inputs()))
    handle.undo()
    results.append(compiled(*inputs()))
    for result in results:
        for ours, theirs in zip(leaves(result), leaves(twin(*inputs())), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_compiled_code_falls_back_as_one_graph_too(caplog):
    model, twin = _model("sit", depth=1)
    patch.apply(model)
    for one in (model, twin):
        one.blocks[0].mlp.fc1.weight.data.mul_(5)
        one.blocks[0].mlp.act.approximate = "none"
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs()), twin(*inputs()), rtol=1e-5, atol=1e-5)
    assert "act approximate changed" in caplog.text


def test_exported():
    model, twin = _model("sit", depth=1)
    patch.apply(model)
    program = torch.export.export(model, inputs())
    torch.testing.assert_close(program.module()(*inputs()), twin(*inputs()), rtol=1e-5, atol=1e-5)
