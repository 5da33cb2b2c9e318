"""Pretrained transformers against what timm gives for the same weights, how they are found, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dit_fast.encoders import load_encoder
from dit_fast.encoders.pretrained import check_size, head_count
from dit_fast.errors import UserError
from tests.helpers.encoder_weights import DEPTH, GRID, SPECS, STORED, WIDTH, official, pictures
from tests.helpers.golden import assert_close

RECORDED = np.load(Path(__file__).parents[1] / "data" / "encoders.npz")
IMAGES = pictures().float() / 127.5 - 1


@pytest.fixture
def weights(tmp_path):
    def save(spec, content=None, name="weights.pth"):
        torch.save(official(spec) if content is None else content, tmp_path / name)
        return f"{spec}:{tmp_path / name}"

    return save


@pytest.mark.parametrize("spec", SPECS)
def test_it_gives_what_the_library_gives(spec, weights):
    encoder = load_encoder(weights(spec))
    given = encoder(IMAGES, GRID)
    assert {name: value.shape[1:] for name, value in given.items()} == encoder.shapes(GRID)
    assert {f"{spec}/{name}" for name in given} <= set(RECORDED.files)
    for name, value in given.items():
        assert value.dtype == torch.float32
        assert_close(value, torch.from_numpy(RECORDED[f"{spec}/{name}"]), 1e-5)
    assert "class_token" in given or spec == "ijepa-vit-h"


@pytest.mark.parametrize("spec", ["dinov2-vit-b-reg", "clip-vit-l"])
def test_queries_and_keys_of_chosen_blocks(spec, weights):
    encoder = load_encoder(weights(spec))
    (last,) = encoder.attention(IMAGES, GRID, [DEPTH - 1])
    for name, value in zip(("query", "key"), last, strict=True):
        assert_close(value, torch.from_numpy(RECORDED[f"{spec}/{name}"]), 1e-5)
    assert last[0].shape[2] == encoder.prefix + GRID**2
    given, (again, first) = encoder.encode(IMAGES, GRID, [1, 0])
    assert torch.equal(again[0], last[0])
    assert not torch.equal(first[0], last[0])
    assert torch.equal(given["features"], encoder(IMAGES, GRID)["features"])
    with pytest.raises(UserError, match=r"has blocks 0..1, no 2"):
        encoder.attention(IMAGES, GRID, [2])


def test_attention_ends_at_the_block_that_was_asked_for(weights):
    encoder, runs = load_encoder(weights("dino-vit-b")), []
    for block in encoder.network.blocks:
        block.register_forward_hook(lambda module, given, output: runs.append(module))
    encoder.attention(IMAGES, GRID, [1])
    assert runs == [encoder.network.blocks[0]]


def test_it_is_frozen_and_draws_nothing(weights):
    spec, state = weights("dinov2-vit-b"), torch.get_rng_state()
    encoder = load_encoder(spec)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(each.requires_grad for each in encoder.network.parameters())
    assert not encoder(IMAGES.requires_grad_(), GRID)["features"].requires_grad
    assert not any(module.training for module in encoder.network.modules())


@pytest.mark.parametrize("spec", ["dinov2-vit-b-reg", "dinov2-vit-g", "clip-vit-l", "ijepa-vit-h"])
def test_names_and_shapes_of_timm_mean_the_same(spec, tmp_path, weights):
    """timm's snapshot is a folder; its DINOv2 with registers has no position for the class token."""
    expected = load_encoder(weights(spec))(IMAGES, GRID)["features"]
    state = official(spec)
    state = {name.removeprefix("module."): value for name, value in state.get("encoder", state).items()}
    for old, new in {
        "visual.class_embedding": "cls_token", "visual.positional_embedding": "pos_embed", "conv1": "patch_embed.proj",
        "transformer.resblocks": "blocks", "ln_pre": "norm_pre", "ln_post": "norm", "ln_": "norm", "in_proj_": "qkv.",
        "out_proj": "proj", "c_fc": "fc1", "c_proj": "fc2", "visual.": "", "w12": "fc1", "w3": "fc2",
    }.items():  # fmt: skip
        state = {name.replace(old, new): value for name, value in state.items()}
    if spec == "clip-vit-l":
        state = {"cls_token": state.pop("cls_token")[None, None], "pos_embed": state.pop("pos_embed")[None], **state}
        del state["proj"], state["logit_scale"]
    if spec == "ijepa-vit-h":
        state = {re.sub("^norm", "fc_norm", name): value for name, value in state.items()}
    if spec == "dinov2-vit-b-reg":
        positions = state.pop("pos_embed")
        state["reg_token"], state["pos_embed"] = state.pop("register_tokens"), positions[:, 1:].contiguous()
        state["cls_token"] = state["cls_token"] + positions[:, :1]
    (tmp_path / "snapshot").mkdir()
    save_file(state, tmp_path / "snapshot" / "model.safetensors")
    assert_close(load_encoder(f"{spec}:{tmp_path / 'snapshot'}")(IMAGES, GRID)["features"], expected, 1e-6)


def test_positions_of_the_stored_grid_are_taken_as_they_are(weights):
    encoder = load_encoder(weights("dino-vit-b"))
    assert encoder.network._positions(STORED) is encoder.network.pos_embed
    assert encoder(IMAGES, STORED)["features"].shape == (2, STORED**2, WIDTH)


def test_names_that_are_wrong_in_the_published_moco_files(weights):
    expected, state = load_encoder(weights("mocov3-vit-b"))(IMAGES, GRID)["features"], {}
    for name, value in official("mocov3-vit-b")["state_dict"].items():
        for old, new in (("norm1.", "norm13."), ("norm2.", "norm14."), ("fc1.", "fc13."), ("fc2.", "fc14.")):
            name = name.replace(f"blocks.1.{old}", f"blocks.1.{new}").replace(
                f"blocks.1.mlp.{old}", f"blocks.1.mlp.{new}"
            )
        state[name] = value
    assert "module.base_encoder.blocks.1.mlp.fc14.bias" in state
    assert torch.equal(load_encoder(weights("mocov3-vit-b", {"state_dict": state}))(IMAGES, GRID)["features"], expected)


def test_a_folder_gives_the_file_of_the_official_name(tmp_path, weights):
    weights("dinov2-vit-b", name="dinov2_vitb14_pretrain.pth")
    assert load_encoder(f"dinov2-vit-b:{tmp_path}").width == WIDTH  # the only one
    weights("dinov2-vit-b-reg", name="dinov2_vitb14_reg4_pretrain.pth")
    assert load_encoder(f"dinov2-vit-b:{tmp_path}").prefix == 1
    assert load_encoder(f"dinov2-vit-b-reg:{tmp_path}").prefix == 5
    with pytest.raises(UserError, match=r"holds 2 files of weights, none of them named mae_pretrain_vit_large.pth or"):
        load_encoder(f"mae-vit-l:{tmp_path}")


def test_the_heads_of_the_released_sizes():
    widths = {
        "dinov2-s": (384, 6),
        "mocov3-s": (384, 12),
        "mocov3-l": (1024, 16),
        "ijepa-h": (1280, 16),
        "dinov2-g": (1536, 24),
    }
    for name, (width, heads) in widths.items():
        assert head_count(name.partition("-")[0], width) == heads


def without(name):
    content = official("dino-vit-b")
    del content[name]
    return content


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        ("dinov2-vit-b", official("dinov2-vit-b-reg"), "holds 4 registers; the spec is dinov2-vit-b-reg:PATH"),
        ("dinov2-vit-b-reg", official("dinov2-vit-b"), "holds no registers; the spec is dinov2-vit-b:PATH"),
        ("dino-vit-b", without("blocks.1.norm2.bias"), "weights.pth: lacks 'blocks.1.norm2.bias'"),
        ("dino-vit-b", {**official("dino-vit-b"), "blocks.0.x": torch.ones(2)}, "has a further 'blocks.0.x'"),
        ("dino-vit-b", without("pos_embed"), "is no vision transformer under names of dino or timm"),
        ("dino-vit-b", {"norm.weight": torch.ones(2)}, "is no vision transformer under names of dino or timm"),
        ("dino-vit-b", {**official("dino-vit-b"), "norm.bias": torch.ones(3)}, "'norm.bias' is .3. where"),
        ("dino-vit-b", {**official("dino-vit-b"), "norm.bias": torch.full((128,), torch.nan)}, "or not finite; fetch"),
        ("mae-vit-b", official("dinov2-vit-b"), "has 'blocks.0.ls1.gamma', which mae lacks; name the encoder that it"),
        ("dinov2-vit-b", official("mae-vit-l"), "lacks 'blocks.0.ls1.gamma', which dinov2 has; name the encoder"),
        ("mae-vit-h", official("ijepa-vit-h"), "lacks 'cls_token', which mae has"),
        ("ijepa-vit-h", official("dino-vit-b"), "has 'cls_token', which ijepa lacks"),
        ("dino-vit-b", {"a": print}, "holds '.*print', which is neither a tensor nor a plain value"),
    ],
)  # fmt: skip
def test_another_file_is_refused_in_one_line(spec, content, message, weights):
    with pytest.raises(UserError, match=message) as caught:
        load_encoder(weights(spec, content))
    assert "\n" not in str(caught.value)


def test_the_width_of_another_size_is_told():
    with pytest.raises(UserError, match=r"is 768 wide, as size 'b' is; write dinov2-vit-b"):
        check_size("dinov2-vit-s:x", "dinov2", "s", 768)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dinov2-vit-h:x", "unknown encoder 'dinov2-vit-h'; valid forms: dinov2-vit-s|b|l|g:PATH"),
        ("mae-vit-l-reg:x", "unknown encoder 'mae-vit-l-reg'"),
        ("resnet:x", "unknown encoder 'resnet:x'; valid forms: .*ijepa-vit-h:PATH"),
        ("dinov2-vit-b", "needs its weights; give dinov2-vit-b:PATH, a file or its folder"),
        ("dinov2-vit-b:/nowhere.pth", "/nowhere.pth: no such checkpoint file"),
    ],
)
def test_another_spec_is_refused(spec, message):
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        load_encoder(spec)


def test_a_program_is_not_opened(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT-L-14.pt")
    with pytest.raises(UserError, match=r"ViT-L-14.pt: is a TorchScript program, as OpenAI's CLIP files are, and not"):
        load_encoder(f"clip-vit-l:{tmp_path}")
