import copy

import pytest
import torch

from dit_fast.errors import ConfigError, UserError
from dit_fast.models import SiT, Taps, build_model
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close

TINY = {
    "input_size": 8,
    "in_channels": 3,
    "hidden_size": 32,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
}
WIRINGS = ("off", "input", "output")


def _model(seed=0, **arguments) -> SiT:
    """A model whose zero-initialised layers are filled, so that every part shows in the output."""
    torch.manual_seed(seed)
    model = build_model("SiT-S/2", **{**TINY, **arguments})
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.abs().max() == 0:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def _inputs(model, n=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    shape = (n, *model.shapes["image"])
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    t = torch.rand(n, generator=generator, dtype=torch.float64).to(dtype)
    return x, t, torch.randint(0, model.num_classes + 1, (n,), generator=generator)


@loop_over("wiring", WIRINGS)
def test_wiring_follows_its_definition(wiring):
    """The two definitions written out with the model's own modules."""
    model = _model(skip_wiring=wiring, depth=6)
    x, t, y = _inputs(model)
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
    first, second = _model(skip_wiring="input"), _model(skip_wiring="output")
    state = first.state_dict()
    assert [(key, value.shape) for key, value in state.items()] == [
        (key, value.shape) for key, value in second.state_dict().items()
    ]
    second.load_state_dict(state)
    inputs = _inputs(first)
    assert (first(*inputs) - second(*inputs)).norm() > 1e-2 * first(*inputs).norm()


@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_new_model_says_zero_and_its_loss_is_the_targets_power(wiring):
    model = build_model("SiT-S/2", input_size=8, num_classes=10, depth=2, skip_wiring=wiring)
    x, t, y = _inputs(model, n=64)
    assert model(x, t, y).abs().max() == 0
    target = torch.randn_like(x) - 0.5 * x
    assert ((model(x, t, y) - target) ** 2).mean().item() == pytest.approx(1.25, rel=0.1)


def test_patchify_and_unpatchify_are_inverse():
    """With an identity head, tokens that hold pixels come back as the image they were cut from."""
    model = _model(in_channels=5, input_size=6, hidden_size=20)
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
def test_flops_equal_what_torch_counts(wiring):
    from torch.utils.flop_counter import FlopCounterMode

    model = _model(skip_wiring=wiring, attention="math", qk_norm=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*_inputs(model, n=1))
    assert model.flops_per_sample() == counter.get_total_flops()


@loop_over("patch", [2, 4, 8])
def test_small_sizes_run_at_any_patch_latent_size_and_channel_count(patch):
    model = build_model(f"SiT-S/{patch}", input_size=24, in_channels=7, num_classes=3, depth=2, skip_wiring="input")
    assert model.num_tokens == (24 // patch) ** 2
    assert model(*_inputs(model, n=1)).shape == (1, 7, 24, 24)


def test_cpu_preset_has_one_to_four_million_parameters():
    model = build_model("SiT-Nano/2", input_size=8, in_channels=12, num_classes=10, skip_wiring="input")
    assert model.num_tokens == 16
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 4e6


def test_taps_hand_out_only_what_was_asked_for():
    model = _model(skip_wiring="input")
    inputs = _inputs(model)
    v = model(*inputs)
    assert isinstance(v, torch.Tensor)
    tapped, features = model(*inputs, taps={3, 1})
    assert torch.equal(v, tapped)
    assert list(features) == [1, 3]
    assert features[1].shape == (3, model.num_tokens, 32)
    assert not model._forward_hooks
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(UserError, match=r"tap 4 .*0 \.\. 3"):
        model(*inputs, taps=[4])
    with pytest.raises(UserError, match="tap -1"):
        model(*inputs, taps=[-1])


@loop_over("wiring", WIRINGS)
def test_activation_checkpointing_changes_neither_taps_nor_gradients(wiring):
    plain = _model(skip_wiring=wiring)
    saving = _model(skip_wiring=wiring, checkpoint_blocks=True)
    saving.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, saving):
        v, features = model(*_inputs(model), taps=(0, 3))
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
    for keep in (False, True):
        model = _model(skip_wiring="input", checkpoint_blocks=keep)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            model(*_inputs(model))
        counts.append(sum(saved))
    assert counts[1] < counts[0] / 3


@pytest.mark.parametrize("wiring", WIRINGS)
def test_compiles_without_graph_breaks(wiring):
    torch._dynamo.reset()
    model = _model(skip_wiring=wiring, qk_norm=True, depth=2)
    inputs = _inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    v, features = compiled(*inputs, taps=(1,))
    expected, expected_features = model(*inputs, taps=(1,))
    assert_close(v, expected, 1e-5)
    assert_close(features[1], expected_features[1], 1e-5)
    v.square().mean().backward()
    assert model.x_embedder.proj.weight.grad is not None


def test_compiles_in_train_mode_with_label_dropout_and_checkpointing():
    torch._dynamo.reset()
    model = _model(skip_wiring="input", checkpoint_blocks=True, depth=2).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(*_inputs(model)).square().mean().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0


@loop_over("wiring", WIRINGS)
def test_float64_model_agrees_with_float32(wiring):
    single = _model(skip_wiring=wiring, qk_norm=True)
    double = copy.deepcopy(single).double()
    v = double(*_inputs(double, dtype=torch.float64))
    assert v.dtype == torch.float64
    assert_close(single(*_inputs(single)), v, 1e-5)


@loop_over("wiring", ["input", "output"])
def test_residual_stream_dtype_under_autocast(wiring):
    """The published code keeps fp32 until the first fusion and half precision from there on (methods.md §2.7)."""
    for residual, late in (("autocast", torch.bfloat16), ("fp32", torch.float32)):
        model = _model(skip_wiring=wiring, residual_dtype=residual)
        exact = model(*_inputs(model))
        with torch.autocast("cpu", torch.bfloat16):
            v, features = model(*_inputs(model), taps=range(4))
        assert [features[index].dtype for index in range(4)] == [torch.float32, torch.float32, late, late]
        assert_close(v, exact, 3e-2)
        v.float().square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_bf16_model_runs_without_autocast():
    model = _model(skip_wiring="input", qk_norm=True)
    exact = model(*_inputs(model))
    half = copy.deepcopy(model).bfloat16()
    x, t, y = _inputs(half)
    assert_close(half(x.bfloat16(), t, y), exact, 5e-2)


@pytest.mark.parametrize("samples", [1, 2])
def test_the_first_tokens_lie_row_by_row_like_all_others(samples):
    model, layouts = _model(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].is_contiguous()))
    x = torch.randn(samples, *model.shapes["image"])
    model(x, torch.rand(samples), torch.zeros(samples, dtype=torch.int64))
    assert layouts == [True] * model.depth


def test_strided_and_channels_last_latents():
    model = _model(skip_wiring="output")
    x, t, y = _inputs(model)
    expected = model(x, t, y)
    assert_close(model(x.to(memory_format=torch.channels_last), t, y), expected, 1e-6)
    assert_close(model(torch.stack([x, x], -1)[..., 1], torch.stack([t, t], 1)[:, 0], y), expected, 1e-6)
    assert_close(model(x[:0], t[:0], y[:0]), expected[:0], 0.0)


def test_the_null_label_is_the_last_row_where_it_was_trained():
    y = torch.tensor([1, 2])
    assert _model().null(y).tolist() == [10, 10]
    never = _model(label_dropout=0.0)
    assert never.null_label == -1
    with pytest.raises(UserError, match="no trained null label"):
        never.null(y)


def test_nothing_in_the_forward_is_random():
    model = _model(skip_wiring="input", label_dropout=0.9).train()
    before = torch.get_rng_state()
    assert torch.equal(model(*_inputs(model)), model.eval()(*_inputs(model)))
    assert torch.equal(before, torch.get_rng_state())


class _Doubler:
    def __init__(self):
        self.seen = []

    def tap(self, x, stats):
        self.seen.append((x, stats))
        return 2 * x


def test_blocks_pass_the_collectors_that_want_them_on_their_way_to_the_next():
    model, doubler = _model(), _Doubler()
    taps = Taps([3], {"doubler": (doubler, frozenset({1}))})
    v = model(*_inputs(model), taps=taps)
    assert (list(taps.features), taps.collectors) == ([1, 3], {"doubler": doubler})
    _, plain = model(*_inputs(model), taps=(1, 3))
    assert torch.equal(doubler.seen[0][0], plain[1])
    assert torch.equal(taps.features[1], 2 * plain[1])
    assert not torch.equal(taps.features[3], plain[3])
    assert not torch.equal(v, model(*_inputs(model)))


@loop_over("wiring", WIRINGS)
@loop_over("checkpoint_blocks", [False, True])
def test_an_early_exit_runs_the_first_blocks_alone(wiring, checkpoint_blocks):
    model, ran = _model(skip_wiring=wiring, depth=6, checkpoint_blocks=checkpoint_blocks), []
    _, whole = model(*_inputs(model), taps=range(6))
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    for stop in (0, 2, 4):
        taps = Taps([0, stop])
        ran.clear()
        assert model(*_inputs(model), taps=taps, stop=stop) is None
        assert ran == list(range(stop + 1))
        assert torch.equal(taps.features[stop], whole[stop])
    assert model(*_inputs(model), taps=[1], stop=1)[0] is None
    for call, named in (({"stop": 6}, "stop=6"), ({"stop": -1}, "stop=-1"), ({"stop": 1, "taps": [2]}, "tap 2")):
        with pytest.raises(UserError, match=named):
            model(*_inputs(model), **call)


def test_forward_mode_through_the_whole_model_with_plain_attention():
    """Time derivative with long skips on, against central differences (float64, 1e-6)."""
    for wiring in WIRINGS:
        model = _model(skip_wiring=wiring, attention="math").double()
        x, t, y = _inputs(model, dtype=torch.float64)
        _, tangent = torch.func.jvp(
            lambda x, t, model=model, y=y: model(x, t, y), (x, t), (x.flip(0), torch.ones(3).double())
        )
        step = 1e-5
        later, earlier = (model(x + s * x.flip(0), t + s, y) for s in (step, -step))
        assert_close(tangent, (later - earlier) / (2 * step), 1e-6)


def test_added_modules_stand_before_the_head():
    model = _model(skip_wiring="input")
    model.add_head("projectors", torch.nn.ModuleList([torch.nn.Linear(32, 2)]))
    assert [name for name, _ in model.named_children()] == [
        "skip_linears",
        "skip_norms",
        "x_embedder",
        "t_embedder",
        "y_embedder",
        "blocks",
        "projectors",
        "final_layer",
    ]
    assert next(iter(model.named_parameters()))[0] == "pos_embed"
    with pytest.raises(ConfigError, match="projectors"):
        model.add_head("projectors", torch.nn.Identity())
    assert (model.block(4, "a.depth"), model.block(1, "a.depth")) == (3, 0)
    for depth in (0, 5):
        with pytest.raises(ConfigError, match=rf"a\.depth={depth} is not one of this model's blocks 1\.\.4"):
            model.block(depth, "a.depth")


@loop_over(
    ("arguments", "named"),
    [
        ({"depth": 5, "skip_wiring": "input"}, "depth 5 is odd"),
        ({"skip_wiring": "both"}, "off, input, output"),
        ({"residual_dtype": "bf16"}, "fp32, autocast"),
        ({"input_size": 9}, "input_size 9"),
        ({"label_dropout": 1.5}, "label_dropout"),
        ({"num_classes": 0}, "num_classes"),
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
    with pytest.raises(ConfigError, match="input_size must be at least 1, not 0"):
        SiT(SiT.Config(name="SiT-S/4"))
    with pytest.raises(
        ConfigError, match=r"unknown model 'SiT-own/4'.*set all of patch_size, hidden_size, depth, num_heads"
    ):
        SiT.Config(name="SiT-own/4", **{**sizes, "depth": 0})


def test_odd_depth_is_fine_without_skips():
    model = _model(depth=3)
    assert model(*_inputs(model)).shape == (3, 3, 8, 8)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ConfigError, match="unknown model 'SiT-XXL/2'; did you mean 'SiT-XL/2'"):
        build_model("SiT-XXL/2")
    with pytest.raises(ConfigError, match="unknown model 'xyz'; valid here: SiT-Nano/2, SiT-S/2"):
        build_model("xyz")
    with pytest.raises(ConfigError, match="patchsize"):
        build_model("SiT-S/2", patchsize=4)


def test_bad_inputs_raise_one_line():
    model = _model()
    x, t, y = _inputs(model)
    cases = [
        (lambda: model(x[:, :2], t, y), r"x must be \[N, 3, 8, 8\]"),
        (lambda: model(x[..., :6], t, y), "x must be"),
        (lambda: model(x, t[:1], y), "t must be"),
        (lambda: model(x, t, y[:, None]), "y must be"),
        (lambda: model(x, t, y.float()), "integer labels"),
        (lambda: model(x.double(), t, y), "float64"),
    ]
    for call, named in cases:
        with pytest.raises(UserError, match=named) as caught:
            call()
        assert "\n" not in str(caught.value)
