"""DDT's encoder and decoder, loss and sample with a kept condition, as published."""

import pytest
import torch

from dit_fast.checkpoint import export_official, load_official
from dit_fast.diffusion import sample
from dit_fast.objectives.flow import flow_losses
from tests.helpers.golden import assert_close, assert_gradient_norms, assert_same_state, golden, golden_names

NAMES = golden_names("ddt_")


def published_model(data):
    meta = data.meta
    return load_official(
        data.group("state/"), family="ddt", num_heads=meta["num_heads"], encoder_depth=meta["encoder_depth"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_velocity_condition_loss_and_gradients(name):
    data = golden(name)
    model, t = published_model(data), 1 - data.tensor("in/t_sit")
    x, noise, y = (data.tensor(f"in/{key}") for key in ("x", "noise", "y"))
    noised = x + t[:, None, None, None] * (noise - x)
    assert_close(-model(noised, t, y), data.tensor("out/v"), 1e-5)
    assert_close(model.encode(noised, t, y), data.tensor("out/condition"), 1e-5)
    loss = flow_losses(model, x, y, t, noise)
    assert_close(loss, data.tensor("out/loss"), 1e-5)
    loss.mean().backward()
    assert_gradient_norms(model, data.group("gradnorm/"), 1e-4)
    whole = torch.stack(list(data.group("gradnorm/").values())).norm().item()
    for key, value in data.group("grad/").items():
        assert_close(model.get_parameter(key).grad, value, 1e-4, 1e-7 * whole)


@pytest.mark.parametrize("name", NAMES)
def test_sample_with_a_kept_condition(name):
    data = golden(name)
    meta = data.meta
    low, high = meta["guidance_interval_ddt"]
    found = sample(
        published_model(data),
        data.tensor("in/start"),
        data.tensor("in/y"),
        sampler="euler",
        times=1 - data.tensor("out64/grid"),
        cfg_scale=meta["cfg_scale"],
        guidance_bounds="exclusive",
        guidance_low=1 - high,
        guidance_high=1 - low,
        state_refresh=meta["refresh"],
    )
    assert_close(found, data.tensor("out/sample"), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_come_back(name):
    state = golden(name).group("state/")
    assert_same_state(export_official(published_model(golden(name))), state)
