"""DiT: noise and variance at whole steps, and what it shares with SiT."""

import pytest
import torch

from dit_fast.checkpoint import export_official, load_official
from dit_fast.errors import CheckpointError, UserError
from dit_fast.models import build_model
from dit_fast.models.registry import PRESETS
from dit_fast.nn.embeddings import TimestepEmbedder
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_same_state
from tests.helpers.tiny_sit import inputs_for, tiny_sit


def tiny_dit(**arguments):
    return tiny_sit(name="DiT-S/2", **arguments)


@loop_over(
    ("name", "parameters"),
    [("DiT-S/2", 32963360), ("DiT-B/2", 130512416), ("DiT-L/2", 458102816), ("DiT-XL/2", 675129632)],
)
def test_sizes_are_the_published_ones(name, parameters):
    with torch.device("meta"):
        model = build_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert PRESETS[name] == PRESETS[name.replace("DiT", "SiT")]


@loop_over("wiring", ["off", "input", "output"])
def test_it_is_a_sit_with_twice_the_channels_at_whole_steps(wiring):
    """Equal weights, a head cut to its first channels: SiT at t = 731.0 returns the same noise."""
    model, plain = (make(skip_wiring=wiring, qk_norm=True) for make in (tiny_dit, tiny_sit))
    rows = [pixel * 6 + channel for pixel in range(4) for channel in range(3)]
    state = {key: value[rows] if "final_layer.linear" in key else value for key, value in model.state_dict().items()}
    plain.load_state_dict(state)
    x, t, y = inputs_for(model)
    output, features = model(x, t, y, taps=(1, 3))
    assert t.dtype == torch.int64
    assert output.shape == (3, 6, 8, 8)
    torch.testing.assert_close(output[:, :3], plain(x, t.float(), y))
    assert list(features) == [1, 3]
    assert model.flops_per_sample() == plain.flops_per_sample() + 2 * 16 * 32 * 12


def test_steps_are_not_scaled_and_must_be_whole():
    model = tiny_dit()
    x, t, y = inputs_for(model)
    assert torch.equal(TimestepEmbedder.frequencies(t), TimestepEmbedder.frequencies(t.float()))
    with pytest.raises(UserError, match=r"t must hold whole steps 0 \.\. 999 for this model, not torch.float32"):
        model(x, t / 1000, y)


def test_published_weights_keep_their_head_and_belong_to_one_family():
    state = export_official(tiny_dit())
    model = load_official(state, "dit", num_heads=4)
    assert_same_state(export_official(model), state)
    assert (model.cfg_channels, tiny_dit().cfg_channels) == ("first_three", "all")
    inputs = inputs_for(model)
    assert torch.equal(model(*inputs), tiny_dit()(*inputs))
    with pytest.raises(CheckpointError, match="3 output channels; a DiT with a learned variance on 3-channel latents"):
        load_official(export_official(tiny_sit()), "dit", num_heads=4)
    with pytest.raises(CheckpointError, match=r"6 output channels, but family 'repa'.*family='sit' or family='dit'"):
        load_official(state, "repa", num_heads=4)
    for wrong, family in ((model, "sit"), (model, "repa"), (tiny_sit(), "dit")):
        with pytest.raises(CheckpointError, match=f"family '{family}' cannot hold a .iT; only 'dit' learns a variance"):
            export_official(wrong, family)
    with pytest.raises(CheckpointError, match=r"'skip_linears\.0.* has no place in a checkpoint of family 'dit'"):
        export_official(tiny_dit(skip_wiring="input"))
