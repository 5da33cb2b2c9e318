"""Checkpoints of REPA-E."""

import pytest
import torch

from dit_fast.checkpoint import export_official, load_official
from dit_fast.errors import UserError
from dit_fast.nn.projector import projector
from tests.helpers.tiny_sit import tiny_sit


def test_published_checkpoints_go_in_and_out_bit_for_bit():
    model = tiny_sit(in_channels=4, num_classes=5)
    model.add_projector(projector(model.hidden_size, 8, 6))
    statistics = {"running_mean": torch.randn(4), "running_var": torch.rand(4), "num_batches_tracked": torch.tensor(7)}
    state = {**model.state_dict(), **{f"bn.{name}": tensor for name, tensor in statistics.items()}}
    published = {"model": state, "ema": state, "vae": {"a": torch.ones(1)}, "discriminator": {}, "steps": 3}
    loaded = load_official(published, "repa_e", num_heads=4, num_classes=5)
    assert torch.equal(loaded.bn.running_var, statistics["running_var"])
    given = export_official(loaded)
    assert list(given) == list(state)
    assert all(torch.equal(given[name], state[name]) and given[name].dtype == state[name].dtype for name in state)
    with pytest.raises(UserError, match=r"use family='repa_e'"):
        load_official(state, "repa", num_heads=4)
    with pytest.raises(UserError, match=r"missing key 'bn\.running_mean'"):
        load_official(model.state_dict(), "repa_e", num_heads=4)
