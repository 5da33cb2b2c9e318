"""LightningDiT's network, losses, times and samples, as published."""

import pytest
import torch

from dit_fast.checkpoint import load_official
from dit_fast.diffusion import sample
from dit_fast.diffusion.flow import velocity_error
from dit_fast.diffusion.paths import Path
from dit_fast.diffusion.times import logit_normal, shift_times
from dit_fast.objectives.flow import velocity_cosine
from tests.helpers.golden import assert_close, assert_gradient_norms, golden, golden_names

NAMES = golden_names("lightningdit_")


def published_model(data):
    return load_official(data.group("state/"), family="lightningdit", num_heads=data.meta["num_heads"])


@pytest.mark.parametrize("name", NAMES)
def test_velocity_losses_and_gradients(name):
    data = golden(name)
    model, t = published_model(data), 1 - data.tensor("in/t_sit")
    noised, target = Path("linear").interpolate(data.tensor("in/x"), data.tensor("in/noise"), t)
    v = model(noised, t, data.tensor("in/y"))
    assert_close(-v, data.tensor("out/v"), 1e-5)
    error, cosine = velocity_error(v, target), velocity_cosine(v, target)
    assert_close(error, data.tensor("out/loss"), 1e-5)
    assert_close(cosine, data.tensor("out/cos_loss"), 1e-5)
    for loss, group in ((error.mean(), "gradnorm_mse/"), (error.mean() + cosine.mean(), "gradnorm_total/")):
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert_gradient_norms(model, data.group(group), 1e-4)
        whole = torch.stack(list(data.group(group).values())).norm().item()
        for key, value in data.group(group.replace("norm", "")).items():
            assert_close(model.get_parameter(key).grad, value, 1e-4, 1e-7 * whole)


@pytest.mark.parametrize("name", NAMES)
def test_samples_at_shifted_times_with_guidance_of_three_channels_in_an_interval(name):
    data = golden(name)
    options, model = data.meta["sample"], published_model(data)
    shift = 1 / options["timestep_shift"]
    if "out64/grid" in data.names:
        grid = torch.linspace(1, 0, options["points"], dtype=torch.float64)
        assert_close(1 - shift_times(grid, shift), data.tensor("out64/grid"), 1e-6)
    arguments = (model, data.tensor("in/start"), data.tensor("in/y"), options["method"], options["intervals"])
    assert_close(sample(*arguments, time_shift=shift), data.tensor("out/ode_plain"), 1e-5)
    guided = sample(
        *arguments, data.meta["cfg_scale"], time_shift=shift, guidance_high=1 - options["cfg_interval_start"],
        cfg_channels=options["cfg_channels"],
    )  # fmt: skip
    assert_close(guided, data.tensor("out/ode_cfg"), 1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if "in/normals" in golden(name).names])
def test_times_are_normals_through_a_sigmoid(name):
    data = golden(name)
    for mean in (0, -0.7):
        assert_close(logit_normal(mean, 1).transform(data.tensor("in/normals")), data.tensor(f"out/t_mu{mean}"), 1e-6)
