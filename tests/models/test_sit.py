import copy

import pytest
import torch

from dit_fast.errors import ConfigError, UserError
from dit_fast.models import SiT, build_model
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close
from tests.helpers.tiny_sit import TINY, WIRINGS, inputs_for, tiny_sit


@loop_over("wiring", WIRINGS)
def test_wiring_follows_its_definition(wiring):
    """The two definitions written out with the model's own modules."""
    model = tiny_sit(skip_wiring=wiring, depth=6)
    x, t, y = inputs_for(model)
    c = model.t_embedder(t) + model.y_embedder(y)
    stream, inputs, outputs = model.x_embedder(x) + model.pos_embed, [], []
    for b in range(6):
        if wiring == "input" and b >= 3:
            stream = model.skip_norms[b - 3](stream, inputs[5 - b], model.skip_linears[b - 3])
        inputs.append(stream)
        stream, _ = model.blocks[b](stream, c)
        if wiring == "output" and b >= 3:
            stream = model.skip_norms[b - 3](stream, outputs[5 - b], model.skip_linears[b - 3])
        outputs.append(stream)
    v, features = model(x, t, y, taps=range(6))
    for b in range(6):
        assert torch.equal(features[b], outputs[b])
    patches = model.final_layer(stream, c)
    token = patches[2, 1 * 4 + 3].view(2, 2, 3)  # patch row, patch column, channel
    assert torch.equal(v[2, :, 2:4, 6:8], token.permute(2, 0, 1))


def test_the_two_wirings_share_keys_and_shapes_but_not_outputs():
    first, second = tiny_sit(skip_wiring="input"), tiny_sit(skip_wiring="output")
    state = first.state_dict()
    assert [(key, value.shape) for key, value in state.items()] == [
        (key, value.shape) for key, value in second.state_dict().items()
    ]
    second.load_state_dict(state)
    inputs = inputs_for(first)
    assert (first(*inputs) - second(*inputs)).norm() > 1e-2 * first(*inputs).norm()


@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_new_model_says_zero_and_its_loss_is_the_targets_power(wiring):
    model = build_model("SiT-S/2", input_size=8, num_classes=10, depth=2, skip_wiring=wiring)
    x, t, y = inputs_for(model, n=64)
    assert model(x, t, y).abs().max() == 0
    target = torch.randn_like(x) - 0.5 * x
    assert ((model(x, t, y) - target) ** 2).mean().item() == pytest.approx(1.25, rel=0.1)


def test_patchify_and_unpatchify_are_inverse():
    """With an identity head, tokens that hold pixels come back as the image they were cut from."""
    model = tiny_sit(in_channels=5, input_size=6, hidden_size=20)
    x = torch.randn(2, 5, 6, 6)
    pixels = x.view(2, 5, 3, 2, 3, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 9, 20)  # channel fastest
    assert torch.equal(model._unpatchify(pixels), x)


@pytest.mark.parametrize(
    ("name", "parameters", "skips", "gmacs"),
    [
        ("SiT-S/2", 32_957_200, 1_780_992, 6.06),
        ("SiT-B/2", 130_500_112, 7_100_928, 23.0),
        ("SiT-L/2", 458_086_416, 25_227_264, 80.7),
        ("SiT-XL/2", 675_111_184, 37_239_552, 118.6),
    ],
)
def test_parameters_and_flops_of_the_published_sizes(name, parameters, skips, gmacs):
    with torch.device("meta"):
        plain, fused = build_model(name), build_model(name, skip_wiring="input")
    count = sum(parameter.numel() for parameter in plain.parameters())
    assert count == parameters
    assert count - sum(p.numel() for p in plain.parameters() if p.requires_grad) == plain.pos_embed.numel()
    assert sum(parameter.numel() for parameter in fused.parameters()) == parameters + skips
    assert plain.flops_per_sample() / 2e9 == pytest.approx(gmacs, rel=2e-3)
    assert fused.flops_per_sample() / plain.flops_per_sample() == pytest.approx(1.08, abs=0.01)
    assert len(plain.state_dict()) == 12 + 10 * plain.depth
    assert len(fused.state_dict()) == 12 + 12 * plain.depth


@loop_over("wiring", WIRINGS)
@loop_over("more", [{}, {"class_token": 6}, {"times": 2}, {"input_width": 12}, {"auxiliary_depth": 3}])
def test_flops_equal_what_torch_counts(wiring, more):
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_sit(skip_wiring=wiring, attention="math", qk_norm=True, **more)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs_for(model, n=1))
    assert model.flops_per_sample() == counter.get_total_flops()


@loop_over("patch", [2, 4, 8])
def test_small_sizes_run_at_any_patch_latent_size_and_channel_count(patch):
    model = build_model(f"SiT-S/{patch}", input_size=24, in_channels=7, num_classes=3, depth=2, skip_wiring="input")
    assert model.num_tokens == (24 // patch) ** 2
    assert model(*inputs_for(model, n=1)).shape == (1, 7, 24, 24)


def test_cpu_preset_has_one_to_four_million_parameters():
    model = build_model("SiT-Nano/2", input_size=8, in_channels=12, num_classes=10, skip_wiring="input")
    assert model.num_tokens == 16
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 4e6


@loop_over("wiring", WIRINGS)
@loop_over("recompute", ["selective", "full"])
def test_activation_checkpointing_changes_neither_taps_nor_gradients(wiring, recompute):
    plain = tiny_sit(skip_wiring=wiring)
    saving = tiny_sit(skip_wiring=wiring, recompute=recompute)
    saving.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, saving):
        v, features = model(*inputs_for(model), taps=(0, 3))
        (v.square().mean() + features[0].mean() * features[3].square().mean()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((v, features, gradients))
    (v, features, gradients), (v2, features2, gradients2) = results
    assert torch.equal(v, v2)
    assert all(torch.equal(features[index], features2[index]) for index in (0, 3))
    assert gradients
    assert all(torch.equal(gradients[name], gradients2[name]) for name in gradients)
    assert plain.pos_embed.grad is None


def test_activation_checkpointing_keeps_fewer_activations():
    counts = []
    for recompute in ("none", "full"):
        model = tiny_sit(skip_wiring="input", recompute=recompute)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            model(*inputs_for(model))
        counts.append(sum(saved))
    assert counts[1] < counts[0] / 3


@pytest.mark.parametrize("wiring", WIRINGS)
def test_compiles_without_graph_breaks(wiring):
    torch._dynamo.reset()
    model = tiny_sit(skip_wiring=wiring, qk_norm=True, depth=2)
    inputs = inputs_for(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    v, features = compiled(*inputs, taps=(1,))
    expected, expected_features = model(*inputs, taps=(1,))
    assert_close(v, expected, 1e-5)
    assert_close(features[1], expected_features[1], 1e-5)
    v.square().mean().backward()
    assert model.x_embedder.proj.weight.grad is not None


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_compiles_in_train_mode_with_label_dropout_and_checkpointing(recompute):
    torch._dynamo.reset()
    model = tiny_sit(skip_wiring="input", recompute=recompute, depth=2).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(*inputs_for(model)).square().mean().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0


@loop_over("wiring", WIRINGS)
def test_float64_model_agrees_with_float32(wiring):
    single = tiny_sit(skip_wiring=wiring, qk_norm=True)
    double = copy.deepcopy(single).double()
    v = double(*inputs_for(double, dtype=torch.float64))
    assert v.dtype == torch.float64
    assert_close(single(*inputs_for(single)), v, 1e-5)


@loop_over("wiring", ["input", "output"])
def test_residual_stream_dtype_under_autocast(wiring):
    """The published code keeps fp32 until the first fusion and half precision from there on (methods.md §2.7)."""
    half, single = torch.bfloat16, torch.float32
    for residual, early, late in (("autocast", single, half), ("fp32", single, single), ("bf16", half, half)):
        model = tiny_sit(skip_wiring=wiring, residual_dtype=residual)
        exact = model(*inputs_for(model))
        with torch.autocast("cpu", torch.bfloat16):
            v, features = model(*inputs_for(model), taps=range(4))
        assert [features[index].dtype for index in range(4)] == [early, early, late, late]
        assert_close(v, exact, 3e-2)
        v.float().square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_bf16_model_runs_without_autocast():
    model = tiny_sit(skip_wiring="input", qk_norm=True)
    exact = model(*inputs_for(model))
    half = copy.deepcopy(model).bfloat16()
    x, t, y = inputs_for(half)
    assert_close(half(x.bfloat16(), t, y), exact, 5e-2)


@pytest.mark.parametrize("samples", [1, 2])
def test_the_first_tokens_lie_row_by_row_like_all_others(samples):
    model, layouts = tiny_sit(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].is_contiguous()))
    x = torch.randn(samples, *model.shapes["image"])
    model(x, torch.rand(samples), torch.zeros(samples, dtype=torch.int64))
    assert layouts == [True] * model.depth


def test_strided_and_channels_last_latents():
    model = tiny_sit(skip_wiring="output")
    x, t, y = inputs_for(model)
    expected = model(x, t, y)
    assert_close(model(x.to(memory_format=torch.channels_last), t, y), expected, 1e-6)
    assert_close(model(torch.stack([x, x], -1)[..., 1], torch.stack([t, t], 1)[:, 0], y), expected, 1e-6)
    assert_close(model(x[:0], t[:0], y[:0]), expected[:0], 0.0)


@loop_over(
    ("arguments", "named"),
    [
        ({"depth": 5, "skip_wiring": "input"}, "depth 5 is odd"),
        ({"skip_wiring": "both"}, "off, input, output"),
        ({"residual_dtype": "fp16"}, "fp32, autocast, bf16"),
        ({"input_size": 9}, "input_size 9"),
        ({"input_width": 9}, "input_width 9"),
        ({"class_token": -1}, "class_token must be at least 0"),
        ({"times": 3}, "times must be one of 1, 2, not '3'"),
        ({"label_dropout": 1.5}, "label_dropout"),
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": "ten"}, "num_classes must be at least 1, not 'ten'"),
        ({"depth": 2.5}, "depth must be at least 1, not 2.5"),
        ({"num_heads": 5}, "num_heads 5"),
        ({"skip_layer_connection": True}, "unknown model setting 'skip_layer_connection'"),
        ({"cross_layer_connection": True}, "cross_layer_connection"),
        ({"skip_wirings": "input"}, "did you mean 'skip_wiring'"),
        ({"qknorm": True}, "did you mean 'qk_norm'"),
    ],
)
def test_bad_arguments_raise_one_line(arguments, named):
    with pytest.raises(ConfigError, match=named) as caught:
        build_model("SiT-S/2", **{**TINY, **arguments})
    assert "\n" not in str(caught.value)


def test_a_configuration_makes_its_model_alone():
    """`SiT(SiT.Config(...))`: sizes from the name, or given; what only a data set knows has no default."""
    data = {"input_size": 8, "in_channels": 4, "num_classes": 3}
    config = SiT(SiT.Config(name="SiT-S/4", depth=2, **data)).config
    assert (config.hidden_size, config.patch_size, config.depth, config.num_heads) == (384, 4, 2, 6)
    sizes = {"patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2}
    assert SiT(SiT.Config(name="SiT-own/4", **sizes, **data)).num_tokens == 4
    with pytest.raises(ConfigError, match="num_classes must be at least 1, not 0"):
        SiT(SiT.Config(name="SiT-S/4"))
    with pytest.raises(
        ConfigError, match=r"unknown model 'SiT-own/4'.*set all of patch_size, hidden_size, depth, num_heads"
    ):
        SiT.Config(name="SiT-own/4", **{**sizes, "depth": 0})


def test_odd_depth_is_fine_without_skips():
    model = tiny_sit(depth=3)
    assert model(*inputs_for(model)).shape == (3, 3, 8, 8)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ConfigError, match="unknown model 'SiT-XXL/2'; did you mean 'SiT-XL/2'"):
        build_model("SiT-XXL/2")
    with pytest.raises(ConfigError, match=r"unknown model 'xyz'; valid here: .*SiT-Nano/2, SiT-S/2"):
        build_model("xyz")
    with pytest.raises(ConfigError, match="patchsize"):
        build_model("SiT-S/2", patchsize=4)


def test_a_rectangle_is_cut_row_by_row():
    """Height input_size, width input_width: positions as in a square of either size, tokens and images row-major."""
    model, wide, high = tiny_sit(input_width=12), tiny_sit(input_size=12), tiny_sit(input_size=8)
    assert (model.grid, model.num_tokens, model.shapes) == ((4, 6), 24, {"image": (3, 8, 12)})
    positions = model.pos_embed.view(4, 6, 32)
    assert torch.equal(positions, wide.pos_embed.view(6, 6, 32)[:4])
    assert torch.equal(positions[:, :4], high.pos_embed.view(4, 4, 32))
    x, t, y = inputs_for(model)
    v, features = model(x, t, y, taps=[3])
    token = model.final_layer(features[3], model.t_embedder(t) + model.y_embedder(y))[2, 1 * 6 + 5].view(2, 2, 3)
    assert torch.equal(v[2, :, 2:4, 10:12], token.permute(2, 0, 1))
    with pytest.raises(UserError, match=r"x must be \[N, 3, 8, 12\]"):
        model(x.mT, t, y)
