"""A block: who holds the parameters that an op reads, the published names, attention's parts, compilation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dit_fast.models import build_model
from dit_fast.models.sit import SiT
from dit_fast.nn import attention, final_layer, long_skip, mlp
from dit_fast.nn import block as block_file
from dit_fast.nn.attention import Attention
from dit_fast.nn.block import Block
from dit_fast.nn.final_layer import FinalLayer
from dit_fast.nn.mlp import Mlp
from tests.helpers.golden import assert_close


def hold_parameters_during_calls(module: nn.Module) -> set[int]:
    """What ZeRO-3 does around forward; returns the identities of what is held at any time."""
    held: set[int] = set()
    needs = {child: {id(p) for p in child.parameters(recurse=False)} for child in module.modules()}
    for child in module.modules():
        for reader, owner in getattr(child, "reads", list)():
            needs[reader] |= {id(p) for p in owner.parameters()}
    for child, own in needs.items():
        child.register_forward_pre_hook(lambda *_, own=own: held.update(own))
        child.register_forward_hook(lambda *_, own=own: held.difference_update(own))
    return held


@pytest.mark.parametrize(
    ("module", "place", "op"),
    [
        (Mlp(8), mlp, "gelu_mlp"),
        (Attention(8, 2, qk_norm=True), attention, "normalise_heads"),
        (None, long_skip, "long_skip"),
    ],
    ids=["mlp", "attention", "long skips"],
)
def test_every_parameter_is_held_while_the_op_runs(monkeypatch, module, place, op):
    """By the calls of its module, or because `reads` says that another's forward uses it."""
    module = module or build_model("SiT-Nano/2", input_size=2, in_channels=8, skip_wiring="input")
    held, real, calls = hold_parameters_during_calls(module), getattr(place, op), []

    def checked(*arguments, **options):
        given = [x for x in arguments if isinstance(x, nn.Parameter)]
        assert len(given) == 4
        assert {id(x) for x in given} <= held
        calls.append(op)
        return real(*arguments, **options)

    monkeypatch.setattr(place, op, checked)
    if isinstance(module, SiT):
        module(torch.randn(2, 8, 2, 2), torch.ones(2), torch.zeros(2).long())
    else:
        module(torch.randn(2, 3, 8)).sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
    assert calls
    assert not held


@pytest.mark.parametrize("place", [block_file, final_layer])
def test_the_weight_of_an_rms_norm_is_held_where_it_is_folded(monkeypatch, place):
    module = Block(8, 2, norm="rms") if place is block_file else FinalLayer(8, 2, 3, norm="rms")
    held, real, calls = hold_parameters_during_calls(module), place.folded, []

    def checked(norm, scale):
        assert id(norm.weight) in held
        calls.append(norm)
        return real(norm, scale)

    monkeypatch.setattr(place, "folded", checked)
    module(torch.randn(2, 3, 8), torch.randn(2, 8))
    assert len(set(calls)) == (2 if place is block_file else 1)


def test_the_names_of_a_block_are_the_published_ones():
    names = set(Block(8, 2, qk_norm=True).state_dict())
    assert {"mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"} <= names
    assert {f"attn.{part}_norm.{kind}" for part in "qk" for kind in ("weight", "bias")} <= names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_parts_of_attention_agree_under_autocast(qk_norm, dtype, monkeypatch):
    seen = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *parts: seen.extend(parts) or real(*parts))
    module, x = Attention(12, 3, qk_norm, "sdpa"), torch.randn(2, 5, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        module(x).float().sum().backward()
    assert [part.dtype for part in seen] == [dtype] * 3
    assert [tuple(part.shape) for part in seen] == [(2, 3, 5, 4)] * 3


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_block_compiles_as_a_whole(qk_norm):
    generator = torch.Generator().manual_seed(0)
    block = Block(8, 2, qk_norm, "sdpa")
    for parameter in block.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    x, c = torch.randn(2, 3, 8, generator=generator), torch.randn(2, 8, generator=generator)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    grads = []
    for each in (compiled, block):
        y, _ = each(x, c)
        grads.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(block.parameters()))])
    for ours, reference in zip(*grads, strict=True):
        assert_close(ours, reference, 1e-5, extra=1e-5)
