"""Queries and keys of blocks, handed out where they are asked for."""

import pytest
import torch

from dit_fast.errors import UserError
from dit_fast.models import Taps, build_model
from dit_fast.models.registry import BACKBONES
from tests.helpers.golden import assert_close
from tests.helpers.tiny_sit import WIRINGS, inputs_for, tiny_sit


def seen(model):
    """Inputs of each block's attention."""
    found = {}
    for index, block in enumerate(model.blocks):
        block.attn.register_forward_pre_hook(lambda _, given, index=index: found.setdefault(index, given[0]))
    return found


@pytest.mark.parametrize("wiring", WIRINGS)
def test_they_are_those_that_the_softmax_gets_and_change_no_output(wiring):
    model = tiny_sit(skip_wiring=wiring, qk_norm=True)
    plain, found, taps = model(*inputs_for(model)), seen(model), Taps([3], attention=[1, 3])
    assert torch.equal(model(*inputs_for(model), taps=taps), plain)
    assert sorted(taps.heads) == [1, 3]
    assert sorted(taps.features) == [3]
    for block, heads in taps.heads.items():
        attention = model.blocks[block].attn
        query, key, value = attention.qkv(found[block]).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        assert_close(heads.query, attention.q_norm(query), 1e-6)
        assert_close(heads.key, attention.k_norm(key), 1e-6)
        mixed = (heads.query @ heads.key.mT / 8**0.5).softmax(-1) @ value
        assert_close(attention(found[block]), attention.proj(mixed.transpose(1, 2).flatten(2)), 1e-5)


def test_gradients_through_them_are_those_without_recomputed_blocks():
    gradients = []
    for recompute in ("none", "selective", "full"):
        model, taps = tiny_sit(recompute=recompute), Taps(attention=[0, 2])
        v = model(*inputs_for(model), taps=taps)
        loss = v.square().mean() + sum((q @ k.mT).square().mean() for q, k in taps.heads.values())
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert all(torch.equal(other[name], gradient) for other in gradients[1:])


def test_compiled_blocks_hand_them_out():
    model, plain, compiled = tiny_sit(qk_norm=True), Taps(attention=[1]), Taps(attention=[1])
    model(*inputs_for(model), taps=plain)
    for block in model.blocks:
        block.compile(backend="eager")
    model(*inputs_for(model))
    model(*inputs_for(model), taps=compiled)
    assert_close(compiled.heads[1].query, plain.heads[1].query, 1e-6)


def test_a_block_that_is_not_there_is_named():
    model = tiny_sit()
    with pytest.raises(UserError, match=r"tap 4 is not a block of this model \(0 \.\. 3\)"):
        model(*inputs_for(model), taps=Taps(attention=[4]))


def test_a_model_that_hands_none_out_is_named(monkeypatch):
    model = tiny_sit()
    monkeypatch.setattr(type(model), "compute", lambda self, *given: given[0])
    with pytest.raises(UserError, match=r"SiT-S/2 hands out no queries and keys of block 2"):
        model(*inputs_for(model), taps=Taps(attention=[2]))


@pytest.mark.parametrize("name", [f"{kind}-Nano/2" for kind in BACKBONES])
def test_every_backbone_hands_them_out(name):
    """Those of the patches last, whatever tokens are in front."""
    model = build_model(name, input_size=8, in_channels=4, num_classes=10)
    taps = Taps(attention=[0, model.depth - 1])
    model(*inputs_for(model), taps=taps)
    for heads in taps.heads.values():
        assert heads.query.shape == heads.key.shape
        assert heads.query.shape[:2] == (3, model.num_heads)
        assert heads.query.shape[2] >= model.num_tokens
        assert heads.query.shape[3] == model.hidden_size // model.num_heads
    assert sorted(taps.heads) == [0, model.depth - 1]
