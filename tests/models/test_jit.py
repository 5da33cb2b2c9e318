"""JiT's own parts: tokens of the label that nothing outside sees, its time, sizes, and what it refuses."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dit_fast.checkpoint import export_official, load_official, save_official
from dit_fast.diffusion import sample
from dit_fast.errors import CheckpointError, ConfigError, UserError
from dit_fast.models import Taps, build_model
from dit_fast.models.jit import JiT
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_same_state, golden
from tests.helpers.tiny_sit import WIRINGS, inputs_for, tiny_sit

OWN = {"bottleneck": 6, "in_context_len": 3, "in_context_start": 1}


def tiny_jit(**arguments):
    return tiny_sit(name="JiT-Nano/2", **{**OWN, **arguments})


@loop_over("wiring", WIRINGS)
@loop_over("start", [0, 1, 2, 3])
@loop_over("more", [{}, {"class_token": 6}, {"times": 2}, {"auxiliary_depth": 2}])
def test_features_heads_and_outputs_hold_no_token_of_the_label(wiring, start, more):
    model = tiny_jit(skip_wiring=wiring, in_context_start=start, **more)
    x, t, y = inputs_for(model)
    taps = Taps(range(4), attention=range(4))
    output = model(x, t, y, taps=taps)
    tokens = 16 + bool(model.class_token)
    assert {feature.shape for feature in taps.features.values()} == {(3, tokens, 32)}
    assert {part.shape for heads in taps.heads.values() for part in heads} == {(3, 4, tokens, 8)}
    untapped = model(x, t, y)
    pairs = zip(tree_leaves(output), tree_leaves(untapped), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@loop_over("wiring", WIRINGS)
@loop_over("start", [0, 1, 3])
def test_recomputing_blocks_and_an_early_exit_change_no_bits(wiring, start):
    model = tiny_jit(skip_wiring=wiring, in_context_start=start)
    again = tiny_jit(skip_wiring=wiring, in_context_start=start, recompute="full")
    gradients = []
    for each in (model, again):
        each(*inputs_for(each)).square().mean().backward()
        gradients.append([parameter.grad for parameter in each.parameters() if parameter.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    _, whole = model(*inputs_for(model), taps=range(4))
    for stop in range(4):
        _, early = model(*inputs_for(model), taps=[stop], stop=stop)
        assert torch.equal(early[stop], whole[stop])


def test_without_tokens_of_the_label_it_is_the_plain_modern_block():
    model = tiny_jit(in_context_len=0)
    assert not hasattr(model, "in_context_posemb")
    assert torch.equal(model(*inputs_for(model)), tiny_jit(in_context_len=0, in_context_start=3)(*inputs_for(model)))
    with_tokens = tiny_jit()
    state = {**with_tokens.state_dict(), **model.state_dict()}
    with_tokens.load_state_dict(state)
    assert not torch.allclose(with_tokens(*inputs_for(model)), model(*inputs_for(model)))


def test_a_long_skip_joins_patches_across_the_block_where_the_tokens_come_in():
    model = tiny_jit(skip_wiring="input", in_context_start=2)  # pairs of blocks without and with them
    seen = []
    for norm in model.skip_norms:
        norm.register_forward_hook(
            lambda module, given, result: seen.append((given[0].shape, given[1].shape, result.shape))
        )
    model(*inputs_for(model))
    assert seen == [((3, 16, 32),) * 3] * 2


def test_the_network_is_shown_the_published_time():
    model, shown = tiny_jit(), []
    model.t_embedder.register_forward_pre_hook(lambda module, given: shown.append(given[0]))
    x, t, y = inputs_for(model)
    model(x, t, y)
    assert torch.equal(shown[0], 1 - t)
    mean = tiny_jit(times=2)
    mean.r_embedder.register_forward_pre_hook(lambda module, given: shown.append(given[0]))
    x, times, y = inputs_for(mean)
    mean(x, times, y)
    assert torch.equal(shown[1], times[:, 0] - times[:, 1])


@pytest.mark.parametrize(
    ("name", "parameters", "depth", "start"),
    [("JiT-B/16", 131, 12, 4), ("JiT-L/16", 459, 24, 8), ("JiT-H/16", 953, 32, 10), ("JiT-H/32", 956, 32, 10)],
)
def test_published_sizes(name, parameters, depth, start):
    with torch.device("meta"):
        model = build_model(name, input_size=512 if name.endswith("32") else 256, in_channels=3)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == parameters  # millions, Tab. 9
    assert (model.num_tokens, model.depth, model.config.in_context_start) == (256, depth, start)


@loop_over("wiring", WIRINGS)
@loop_over("more", [{}, {"class_token": 6}, {"times": 2}, {"in_context_start": 0}, {"in_context_len": 0}, {"depth": 2}])
def test_flops_equal_what_torch_counts(wiring, more):
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_jit(skip_wiring=wiring, attention="math", **more)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs_for(model, n=1))
    assert model.flops_per_sample() == counter.get_total_flops()


def test_refusals():
    sizes = {"patch_size": 2, "hidden_size": 32, "depth": 4, "num_heads": 4}
    data = {"input_size": 8, "in_channels": 3, "num_classes": 10}
    for given, named in (
        ({"name": "JiT-Nano/2", "in_context_start": 6}, r"in_context_start=6 is not one of this model's blocks 0\.\.5"),
        ({"name": "JiT-Nano/2", "num_heads": 16, "hidden_size": 32}, "heads of width 2"),
        ({"name": "own", **sizes}, "bottleneck must be at least 1"),
        ({"name": "own", **sizes, "bottleneck": 4}, "in_context_len must be at least 0, not None"),
        ({"name": "JiT-S/16"}, "unknown model 'JiT-S/16'"),
    ):
        with pytest.raises(ConfigError, match=named):
            JiT(JiT.Config(**data, **given))


def test_checkpoints_ask_for_what_they_do_not_say(tmp_path):
    data = golden("jit_small")
    state = data.group("state/")
    with pytest.raises(CheckpointError, match="its 2 tokens of the label; pass in_context_start"):
        load_official(state, family="jit")
    with pytest.raises(CheckpointError, match=r"in_context_start=3 is not one of this model's blocks 0\.\.2"):
        load_official(state, family="jit", in_context_start=3)
    bare = {key: value for key, value in state.items() if key != "in_context_posemb"}
    assert load_official(bare, family="jit").config.in_context_len == 0
    model = load_official(state, family="jit", in_context_start=2)
    save_official(model, tmp_path / "jit.safetensors")
    again = load_official(tmp_path / "jit.safetensors", family="jit")
    x, t, y = inputs_for(model)
    assert torch.equal(model(x, t, y), again(x, t, y))
    with pytest.raises(CheckpointError, match="cannot hold a JiT; use family='jit'"):
        export_official(model, "repa")


def test_a_model_of_ours_goes_out_in_the_published_order():
    state = golden("jit_small").group("state/")
    sizes = {"hidden_size": 16, "num_heads": 2, "depth": 3, "num_classes": 4}
    model = tiny_jit(**sizes, bottleneck=5, in_context_len=2)
    assert {key: value.shape for key, value in export_official(model).items()} == {
        key: value.shape for key, value in state.items()
    }
    assert list(export_official(model)) == list(state)
    again = load_official(export_official(model), "jit", in_context_start=1)
    assert_same_state(export_official(again), export_official(model))
    assert torch.equal(again(*inputs_for(model)), model(*inputs_for(model)))


def test_a_model_with_published_weights_says_that_it_predicts_x():
    model = load_official(golden("jit_small").group("state/"), "jit", in_context_start=1)
    x, _, y = inputs_for(model)
    assert torch.equal(sample(model, x, y, num_steps=2), sample(model, x, y, num_steps=2, prediction="x"))
    with pytest.raises(UserError, match="this JiT predicts 'x', not 'velocity'; give prediction='x' where"):
        sample(model, x, y, num_steps=2, prediction="velocity")
