"""JiT's network, loss and sample, as published."""

import pytest
import torch

from dit_fast.checkpoint import export_official, load_official
from dit_fast.diffusion import sample
from dit_fast.objectives.x_prediction import x_prediction_losses
from tests.helpers.golden import assert_close, assert_gradient_norms, assert_same_state, golden, golden_names

NAMES = golden_names("jit_")


def published_model(data):
    meta = data.meta
    return load_official(
        data.group("state/"), family="jit", num_heads=meta["num_heads"], in_context_start=meta["in_context_start"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_clean_data_loss_and_gradients(name):
    data = golden(name)
    model, t = published_model(data), 1 - data.tensor("in/t_jit")
    losses = x_prediction_losses(
        model,
        *(data.tensor(f"in/{key}") for key in ("x", "y")),
        t,
        data.tensor("in/noise"),
        noise_scale=data.meta["noise_scale"],
        t_eps=data.meta["t_eps"],
    )
    assert_close(losses.x_prediction, data.tensor("out/x_pred"), 1e-5)
    assert_close(losses.loss.mean(), data.tensor("out/loss"), 1e-5)
    losses.loss.mean().backward()
    assert_gradient_norms(model, data.group("gradnorm/"), 1e-4)
    whole = torch.stack(list(data.group("gradnorm/").values())).norm().item()
    for key, value in data.group("grad/").items():
        assert_close(model.get_parameter(key).grad, value, 1e-4, 1e-7 * whole)


@pytest.mark.parametrize("name", NAMES)
def test_guided_sample(name):
    data = golden(name)
    meta = data.meta
    low, high = meta["cfg_interval_jit"]
    found = sample(
        published_model(data),
        meta["noise_scale"] * data.tensor("in/start"),
        data.tensor("in/y"),
        sampler="heun",
        num_steps=meta["num_steps"],
        cfg_scale=meta["cfg_scale"],
        prediction="x",
        t_eps=meta["t_eps"],
        null_label=meta["num_classes"],
        guidance_bounds="exclusive",
        heun_guidance="each",
        guidance_low=1 - high,
        guidance_high=1 - low,
    )
    assert_close(found, data.tensor("out/heun_cfg"), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_come_back(name):
    state = golden(name).group("state/")
    assert_same_state(export_official(published_model(golden(name))), state)
