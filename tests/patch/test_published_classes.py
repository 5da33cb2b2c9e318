"""patch.apply on the published modules: the same losses, the same gradients, and nothing left behind."""

import copy
import io

import pytest
import torch
from torch import nn

from dit_fast import _C, patch
from dit_fast.errors import ConfigError, UserError
from dit_fast.patch import published
from tests.helpers.cases import loop_over
from tests.helpers.published_models import (
    KINDS,
    Transformer,
    check_bf16_autocast,
    check_fifty_steps,
    inputs,
    leaves,
    loss_of,
)


def _pair(kind, **options):
    torch.manual_seed(0)
    model = Transformer(kind, **options)
    return model, copy.deepcopy(model)


def _loss(model, number):
    return loss_of(model(*inputs(seed=number)))


@loop_over("kind", KINDS)
def test_fifty_steps_have_the_same_losses(kind):
    model, patched = _pair(kind, qk_norm=kind == "sit")
    handle = patch.apply(patched, ops=patch.OPS)
    assert not handle.report.refused
    assert ("long_skip" in handle.report.replaced.values()) == (kind in ("input", "output"))
    assert list(patched.state_dict()) == list(model.state_dict())
    check_fifty_steps(model, patched, _loss)


@loop_over("kind", ["repa", "input", "output"])
def test_bf16_autocast_trains_alike(kind):
    model, patched = _pair(kind, qk_norm=True)
    patch.apply(patched, ops=patch.OPS)
    check_bf16_autocast(model, patched, _loss)


@loop_over("kind", ["repa", "output"])
def test_weights_in_bf16(kind):
    model, patched = (module.bfloat16().eval() for module in _pair(kind, qk_norm=True))
    patch.apply(patched, ops=patch.OPS)
    batch = inputs(dtype=torch.bfloat16)
    for ours, theirs in zip(leaves(patched(*batch)), leaves(model(*batch)), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).float().norm() <= 2e-2 * theirs.float().norm()


@loop_over("kind", KINDS)
def test_fp64_gradients_of_every_parameter(kind):
    model, patched = (module.double() for module in _pair(kind, qk_norm=True))
    patch.apply(patched, ops=patch.OPS)
    for module in (model.eval(), patched.eval()):
        loss_of(module(*inputs(dtype=torch.float64))).backward()
    for (name, ours), theirs in zip(patched.named_parameters(), model.parameters(), strict=True):
        if theirs.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_a_pickled_model_comes_back_unpatched_and_can_be_patched():
    model, patched = _pair("input")
    handle = patch.apply(patched, ops=patch.OPS)
    buffer = io.BytesIO()
    torch.save(patched, buffer)
    back = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    for ours, theirs in zip(leaves(back.eval()(*inputs())), leaves(model.eval()(*inputs())), strict=True):
        assert torch.equal(ours, theirs)
    assert patch.apply(back, ops=patch.OPS).report == handle.report


def test_the_report_reads_well():
    _, patched = _pair("input")
    _dropout(patched)
    assert str(patch.apply(patched)).splitlines() == [
        "long_skip: the model",
        "adaln: blocks.0, blocks.1, blocks.2, ... (5 in all)",
        "gelu_mlp: blocks.0.mlp, blocks.2.mlp, blocks.3.mlp",
        "on a CPU the model's own forward stays for long_skip: plain torch would run it, at no gain",
        "unchanged: blocks.1.mlp (gelu_mlp: drop1 has p = 0.1, which the op does not apply)",
    ]


@pytest.mark.skipif(_C.unavailable() is not None, reason="needs the C++ operators")
@pytest.mark.parametrize(
    ("options", "device", "runs"),
    [({}, "cpu", False), ({}, "meta", True), ({"ops": patch.OPS}, "cpu", True), ({"backend": "torch"}, "cpu", True)],
)
def test_what_plain_torch_would_run_on_a_cpu_is_left_to_the_model_there(monkeypatch, options, device, runs):
    """By the tensors of the call, as models are moved later; what is asked for by name runs."""
    _, patched = _pair("sit", qk_norm=True)
    handle = patch.apply(patched, **options)
    assert handle.report.not_on_cpu == (set() if options else {"qk_norm"})
    assert patch.apply(patched, **options).report == handle.report
    called, op = [], published.qk_norm
    monkeypatch.setattr(published, "qk_norm", lambda *given, **named: called.append(1) or op(*given, **named))
    patched.blocks[0].attn.to(device)(torch.zeros(2, 16, 32, device=device))
    assert bool(called) == runs


def test_compiles_as_one_graph():
    model, patched = _pair("input", depth=2)
    patch.apply(patched.eval(), ops=patch.OPS)
    torch._dynamo.reset()
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(leaves(compiled(*inputs())), leaves(model.eval()(*inputs())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_runs_under_ddp(tmp_path):
    model, patched = _pair("repa")
    patch.apply(patched, ops=patch.OPS)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(patched.eval())
        loss_of(wrapped(*inputs())).backward()
    finally:
        torch.distributed.destroy_process_group()
    loss_of(model.eval()(*inputs())).backward()
    torch.testing.assert_close(patched.blocks[0].mlp.fc1.weight.grad, model.blocks[0].mlp.fc1.weight.grad)


def test_the_random_state_and_the_mode_are_kept():
    _, patched = _pair("output")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    weight = patched.blocks[0].mlp.fc1.weight.clone()
    patch.apply(patched, ops=patch.OPS)
    assert torch.equal(torch.get_rng_state(), state)
    assert patched.training
    assert torch.equal(patched.blocks[0].mlp.fc1.weight, weight)


def _hook(model):
    model.blocks[1].norm1.register_forward_hook(lambda *_: None)
    return "blocks.1", "norm1 has hooks"


def _dropout(model):
    model.blocks[1].mlp.drop1.p = 0.1
    return "blocks.1.mlp", "drop1 has p = 0.1"


def _adapter(model):
    class Adapter(nn.Linear):
        pass

    model.blocks[1].mlp.fc2 = Adapter(128, 32)
    return "blocks.1.mlp", "Adapter, not exactly nn.Linear"


def _other_gelu(model):
    model.blocks[1].mlp.act = nn.GELU()
    return "blocks.1.mlp", "not GELU in its tanh form"


def _affine(model):
    model.final_layer.norm_final = nn.LayerNorm(32)
    return "final_layer", "norm_final has affine parameters"


def _own_forward(model):
    model.blocks[1].forward = lambda x, c: x
    return "blocks.1", "already replaced on the instance"


def _skip_hook(model):
    model.skip_linears[0].linear.register_forward_pre_hook(lambda *_: None)
    return "", "skip_linears.0.linear has hooks"


def _rms_without_eps(model):
    model.final_layer.norm_final = nn.RMSNorm(32)
    return "final_layer", "RMSNorm, neither nn.LayerNorm nor an RMSNorm of one weight and a number for eps"


def _odd(model):
    del model.skip_linears[1]
    return "", "4 blocks do not go with 2 skip_norms and 1 skip_linears"


@loop_over("spoil", [_hook, _dropout, _adapter, _other_gelu, _affine, _rms_without_eps, _own_forward, _skip_hook, _odd])
def test_refuses_with_the_reason(spoil):
    _, model = _pair("input")
    path, reason = spoil(model)
    refused = patch.apply(model).report.refused
    assert list(refused) == [path]
    assert reason in refused[path]


def test_errors_name_the_culprit():
    _, model = _pair("sit")
    with pytest.raises(ConfigError, match="unknown op 'gelu_mpl'; did you mean 'gelu_mlp'"):
        patch.apply(model, ops=["gelu_mpl"])
    with pytest.raises(ConfigError, match="unknown backend 'fast'"):
        patch.apply(model, backend="fast")
    with pytest.raises(ConfigError, match="skip_wiring must be"):
        patch.apply(model, skip_wiring="both")
    for ops, message in (([], "ops is empty; give some"), (5, "unknown op '5'"), ([None], "unknown op 'None'")):
        with pytest.raises(ConfigError, match=message):
            patch.apply(model, ops=ops)
    with pytest.raises(ConfigError, match='backend must be a name such as "auto", not NoneType'):
        patch.apply(model, backend=None)
    with pytest.raises(ConfigError, match="skip_wiring='input' is for long skips, and Transformer has none"):
        patch.apply(model, skip_wiring="input")
    with pytest.raises(ConfigError, match="skip_wiring='input' is for long skips, and ops leaves long_skip out"):
        patch.apply(_pair("input")[1], ops=["gelu_mlp"], skip_wiring="input")
    with pytest.raises(UserError, match="nothing to replace in Linear; looked for blocks with norm1"):
        patch.apply(nn.Linear(2, 2))
    with pytest.raises(UserError, match="in Transformer; what it has is for adaln, gelu_mlp, which ops leaves out"):
        patch.apply(model, ops=["long_skip"])
    for wrong, given in ((None, "NoneType"), (model.state_dict(), "OrderedDict"), (Transformer, "the class Transf")):
        with pytest.raises(UserError, match=f"model must be a torch.nn.Module, not {given}"):
            patch.apply(wrong)
    patch.apply(model)
    with pytest.raises(UserError, match="is patched with backend 'auto'"):
        patch.apply(model, backend="torch")


def test_our_own_model_needs_no_patch():
    from dit_fast.models import build_model

    with pytest.raises(UserError, match="uses the ops already"):
        patch.apply(build_model("SiT-S/2", input_size=8))
