"""patch.apply on diffusers' DiT and HunyuanDiT: the same losses at every step, and the same gradients."""

import copy

import pytest
import torch

from dit_fast import patch
from tests.helpers.cases import loop_over
from tests.helpers.published_models import check_bf16_autocast, check_fifty_steps

pytest.importorskip("diffusers")


def _dit(**options):
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
    return DiTTransformer2DModel(**sizes, num_embeds_ada_norm=10, norm_num_groups=1, **options)


def _hunyuan(**options):
    from diffusers import HunyuanDiT2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 32, "num_layers": 4, "sample_size": 8}
    text = {"cross_attention_dim": 16, "cross_attention_dim_t5": 16, "pooled_projection_dim": 8}
    lengths = {"text_len": 3, "text_len_t5": 2, "use_style_cond_and_image_meta_size": False}
    return HunyuanDiT2DModel(in_channels=4, patch_size=2, **sizes, **text, **lengths, **options)


def _call(model, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(model.dtype)

    x, t = normal(2, 4, 8, 8), torch.tensor([3, 700])
    if type(model).__name__ == "DiTTransformer2DModel":
        return model(x, timestep=t, class_labels=torch.tensor([1, 4])).sample
    return model(
        x,
        t.to(model.dtype),
        encoder_hidden_states=normal(2, 3, 16),
        text_embedding_mask=torch.ones(2, 3),
        encoder_hidden_states_t5=normal(2, 2, 16),
        text_embedding_mask_t5=torch.ones(2, 2),
        image_meta_size=None,
        style=None,
        image_rotary_emb=(torch.ones(16, 16), torch.zeros(16, 16)),
    ).sample


def _loss(model, number):
    return (_call(model, number).float() - 0.5).square().mean()


def _pair(build, **options):
    torch.manual_seed(0)
    model = build(**options)
    return model, copy.deepcopy(model)


@loop_over("build", [_dit, _hunyuan])
def test_fifty_steps_have_the_same_losses(build):
    model, patched = _pair(build)
    handle = patch.apply(patched, ops=patch.OPS)
    assert not handle.report.refused
    wanted = {"adaln", "gelu_mlp"} if build is _dit else {"long_skip", "gelu_mlp"}
    assert set(handle.report.replaced.values()) == wanted
    assert list(patched.state_dict()) == list(model.state_dict())
    check_fifty_steps(model.train(), patched.train(), _loss)


@loop_over("build", [_dit, _hunyuan])
def test_bf16_autocast_trains_alike(build):
    model, patched = _pair(build)
    patch.apply(patched, ops=patch.OPS)
    check_bf16_autocast(model.train(), patched.train(), _loss)


@loop_over("build", [_dit, _hunyuan])
def test_weights_in_bf16(build):
    model, patched = (module.bfloat16().eval() for module in _pair(build))
    patch.apply(patched, ops=patch.OPS)
    ours, theirs = _call(patched), _call(model)
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).float().norm() <= 2e-2 * theirs.float().norm()


def test_a_subclass_with_a_forward_of_its_own_stays():
    from diffusers.models.attention import FeedForward

    class Halved(FeedForward):
        def forward(self, *arguments, **named):
            return 0.5 * super().forward(*arguments, **named)

    model = _dit()
    model.transformer_blocks[1].ff.__class__ = Halved
    refused = patch.apply(model).report.refused
    assert list(refused) == ["transformer_blocks.1.ff"]
    assert "differ on a small input" in refused["transformer_blocks.1.ff"]


@loop_over("build", [_dit, _hunyuan])
def test_gradients_also_with_checkpointing_and_undo(build):
    model, patched = _pair(build)
    handle = patch.apply(patched, ops=patch.OPS)
    if build is _dit:
        patched.enable_gradient_checkpointing()
    for module in (model.train(), patched.train()):
        torch.manual_seed(2)
        _call(module).square().mean().backward()
    for (name, ours), theirs in zip(patched.named_parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    handle.undo()
    assert all("forward" not in vars(module) for module in patched.modules())
    assert torch.equal(_call(patched.eval()), _call(model.eval()))


def test_other_activations_and_dropout_stay():
    torch.manual_seed(0)
    refused = patch.apply(_dit(activation_fn="geglu", dropout=0.1)).report.refused
    assert set(refused) == {f"transformer_blocks.{b}.ff" for b in range(2)}
    assert all("GEGLU" in reason and "p = 0.1" in reason for reason in refused.values())


def test_feed_forward_chunks_take_the_blocks_own_forward():
    model, patched = _pair(_dit)
    patch.apply(patched, ops=patch.OPS)
    for module in (model, patched):
        module.eval()
        module.transformer_blocks[0].set_chunk_feed_forward(2, 1)
    torch.testing.assert_close(_call(patched), _call(model), rtol=1e-5, atol=1e-5)
