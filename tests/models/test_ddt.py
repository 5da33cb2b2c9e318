"""DDT's own parts: an encoder and a decoder that may run apart, taps over both, sizes, and what it refuses."""

import pytest
import torch

from dit_fast.checkpoint import export_official, load_official, save_official
from dit_fast.errors import CheckpointError, ConfigError, UserError
from dit_fast.models import Taps, build_model
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_same_state, golden
from tests.helpers.tiny_sit import inputs_for, tiny_sit


def tiny_ddt(**arguments):
    return tiny_sit(name="DDT-Nano/2", **{"encoder_depth": 3, **arguments})


@loop_over("encoder", [1, 2, 3])
def test_encoder_and_decoder_are_the_model(encoder):
    model = tiny_ddt(encoder_depth=encoder)
    x, t, y = inputs_for(model)
    assert model.encode(x, t, y).shape == (3, 16, 32)
    assert torch.equal(model.decode(x, model.encode(x, t, y)), model(x, t, y))
    other = model.decode(x, model.encode(x, t, (y + 1) % 10))
    assert not torch.allclose(other, model(x, t, y))


@loop_over("encoder", [1, 3])
@loop_over("recompute", ["none", "selective", "full"])
def test_taps_and_an_early_exit_count_on_from_encoder_to_decoder(encoder, recompute):
    model, ran = tiny_ddt(encoder_depth=encoder, recompute=recompute), []
    inputs = inputs_for(model)
    taps = Taps(range(4), attention=[0, 3])
    assert torch.equal(model(*inputs, taps=taps), model(*inputs))
    assert {feature.shape for feature in taps.features.values()} == {(3, 16, 32)}
    assert list(taps.features) == [0, 1, 2, 3]
    assert [heads.query.shape for heads in taps.heads.values()] == [(3, 4, 16, 8)] * 2
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    for stop in range(4):
        ran.clear()
        output, early = model(*inputs, taps=[stop], stop=stop)
        assert output is None
        assert ran == list(range(stop + 1))
        assert torch.equal(early[stop], taps.features[stop])


def test_recomputing_blocks_changes_no_gradient():
    gradients = []
    for model in (tiny_ddt(recompute=which) for which in ("none", "selective", "full")):
        model(*inputs_for(model)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for others in gradients[1:]:
        assert all(torch.equal(*pair) for pair in zip(gradients[0], others, strict=True))


def test_the_stream_under_autocast_is_that_of_its_setting():
    for residual, expected in (("autocast", torch.bfloat16), ("fp32", torch.float32)):
        model = tiny_ddt(residual_dtype=residual)
        with torch.autocast("cpu", torch.bfloat16):
            _, features = model(*inputs_for(model), taps=range(4))
        assert {feature.dtype for feature in features.values()} == {expected}


def test_a_trunk_holds_the_decoder_only_as_far_as_it_runs():
    model = tiny_ddt()
    inputs = inputs_for(model)
    for last in range(4):
        trunk = model.trunk(last)
        assert torch.equal(trunk(*inputs, taps=[last], stop=last)[1][last], model(*inputs, taps=[last])[1][last])
        names = {name.split(".")[0] for name, _ in trunk.named_parameters()}
        assert ("x_embedder" in names) == (last == 3)
        assert "final_layer" not in names


def test_initial_values_are_the_published_ones():
    model = build_model("DDT-Nano/2", input_size=8, in_channels=12, num_classes=10)
    assert model.final_layer.linear.weight.abs().max() == 0
    assert model.final_layer.adaLN_modulation[0].weight.abs().max() == 0
    bound = model.hidden_size**-0.5  # torch's own, in the blocks: gates are open from the start
    for layer in (model.blocks[0].adaLN_modulation[0], model.blocks[5].attn.qkv):
        assert bound * 0.99 < layer.weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("name", "parameters", "encoder"), [("DDT-B/2", 130, 8), ("DDT-L/2", 458, 20), ("DDT-XL/2", 675, 22)]
)
def test_published_sizes(name, parameters, encoder):
    with torch.device("meta"):
        model = build_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=0.01)
    assert model.encoder_depth == encoder


@loop_over("more", [{}, {"encoder_depth": 1}, {"input_width": 12}])
def test_flops_equal_what_torch_counts(more):
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_ddt(attention="math", **more)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs_for(model, n=1))
    assert model.flops_per_sample() == counter.get_total_flops()


def test_refusals():
    for given, named in (
        ({"encoder_depth": 4}, "encoder_depth=4 leaves the decoder none of 4 blocks"),
        ({"class_token": 6}, "DDT denoises an image alone, at one time; set model.class_token=0"),
        ({"times": 2}, "set model.times=1"),
        ({"input_size": 9}, "input_size 9 must be a multiple of patch_size 2"),
        ({"hidden_size": 40, "num_heads": 4}, "heads of width 10"),
        ({"skip_wiring": "input"}, "unknown model setting 'skip_wiring'"),
    ):
        with pytest.raises(ConfigError, match=named):
            tiny_ddt(**given)


def test_an_official_one_takes_images_of_every_size():
    data = golden("ddt_small")
    model = load_official(data.group("state/"), family="ddt", encoder_depth=1)
    for shape in ((3, 8, 12), (12, 5, 6), (3, 8, 8)):  # 3 x 2 x 2 values in a patch, 12 x 1 x 1
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        assert model(x, torch.rand(2), torch.tensor([0, 4])).shape == x.shape
        assert model.shapes == {"image": shape}
        assert model.num_tokens * 12 == x[0].numel()
    with pytest.raises(UserError, match=r"x must be \[N, 3, 8, 8\]"):
        model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 4]))
    with pytest.raises(UserError, match=r"x must be \[N, 3, 8, 8\]"):
        model(torch.randn(2, 3, 8, 7), torch.rand(2), torch.tensor([0, 4]))


def test_checkpoints_ask_for_what_they_do_not_say(tmp_path):
    state = golden("ddt_small").group("state/")
    with pytest.raises(CheckpointError, match="how many of its 3 blocks are the encoder's; pass encoder_depth"):
        load_official(state, family="ddt")
    with pytest.raises(CheckpointError, match="encoder_depth=3 leaves the decoder none"):
        load_official(state, family="ddt", encoder_depth=3)
    save_official(load_official(state, family="ddt", encoder_depth=1), tmp_path / "ddt.safetensors")
    assert load_official(tmp_path / "ddt.safetensors", family="ddt").encoder_depth == 1


def test_a_model_of_ours_goes_out_in_the_published_order():
    state = golden("ddt_small").group("state/")
    model = tiny_ddt(hidden_size=16, num_heads=2, depth=3, encoder_depth=1, num_classes=4)
    ours = export_official(model)
    assert [(key, value.shape) for key, value in ours.items()] == [(key, value.shape) for key, value in state.items()]
    again = load_official(ours, "ddt", encoder_depth=1)
    assert_same_state(export_official(again), ours)
    assert torch.equal(again(*inputs_for(model)), model(*inputs_for(model)))
