"""LightningDiT: its switches, what it shares with SiT, sizes and FLOPs."""

import pytest
import torch

from dit_fast.errors import ConfigError
from dit_fast.models import build_model
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close
from tests.helpers.tiny_sit import WIRINGS, inputs_for, tiny_sit

PLAIN = {"norm": "layer", "mlp": "gelu", "rope": False}


def tiny(**options):
    return tiny_sit(name="LightningDiT-B/2", **options)


@loop_over("more", [{}, {"class_token": 6}, {"times": 2}, {"skip_wiring": "output", "qk_norm": True}])
def test_without_its_parts_it_is_sit(more):
    sit, ours = tiny_sit(**more), tiny(**PLAIN, **more)
    ours.load_state_dict(sit.state_dict())
    inputs = inputs_for(sit)
    expected, found = sit(*inputs, taps=(1,)), ours(*inputs, taps=(1,))
    assert torch.equal(expected[1][1], found[1][1])


@loop_over("wiring", WIRINGS)
@loop_over("recompute", ["none", "selective", "full"])
def test_long_skips_taps_and_recomputed_blocks_are_those_of_sit(wiring, recompute):
    model = tiny(skip_wiring=wiring, qk_norm=True, recompute=recompute)
    v, features = model(*inputs_for(model), taps=range(4))
    v.square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    _, first = model(*inputs_for(model), taps=(0, 1), stop=1)
    assert_close(first[1], features[1], 1e-6)


def test_a_class_token_is_not_turned():
    tables = tiny(class_token=6).rotary(0)
    assert tables[0].shape == (1 + 16, 8)
    assert torch.equal(tables[0][0], torch.ones(8))
    assert torch.equal(tables[1][0], torch.zeros(8))
    assert torch.equal(tables[0][1:], tiny().rotary(0)[0])


@loop_over("wiring", ["off", "input"])
@loop_over("more", [{}, {"qk_norm": True, "adaln_shift": False}, {**PLAIN, "times": 2}, {"class_token": 6}])
def test_flops_equal_what_torch_counts(wiring, more):
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny(attention="math", skip_wiring=wiring, **more)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs_for(model, n=1))
    assert model.flops_per_sample() == counter.get_total_flops()


def test_under_autocast_it_computes_nearly_the_same():
    """The weight of an RMSNorm is folded into a scale of half precision, in fp32."""
    model = tiny(qk_norm=True, skip_wiring="input")
    expected = model(*inputs_for(model))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*inputs_for(model))
    assert_close(found.float(), expected, 3e-2)
    found.float().square().mean().backward()
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())


def test_published_sizes():
    with torch.device("meta"):
        xl, nano = build_model("LightningDiT-XL/1", input_size=16, in_channels=32), build_model("LightningDiT-Nano/2")
    assert (xl.depth, xl.hidden_size, xl.num_heads, xl.num_tokens) == (28, 1152, 16, 256)
    assert sum(p.numel() for p in xl.parameters()) == 675_256_736  # of the published class
    assert sum(p.numel() for p in nano.parameters()) < 4e6


def test_what_cannot_run_is_refused():
    with pytest.raises(ConfigError, match="heads of width 6: rotary positions need a multiple of 4"):
        tiny(hidden_size=24)
    with pytest.raises(ConfigError, match="norm must be one of rms, layer, not 'batch'"):
        tiny(norm="batch")
