"""DiT's losses, their gradients and its samplers, from fast-DiT's model and diffusion."""

import torch

from dit_fast.checkpoint import load_official
from dit_fast.diffusion import sample
from dit_fast.objectives.ddpm import ddpm_losses
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close, assert_gradient_norms, golden, golden_names


def official(reference):
    return load_official(reference.group("state/"), "dit", num_heads=reference.meta["num_heads"])


@loop_over("name", golden_names("dit_"))
def test_losses_and_gradients(name):
    reference = golden(name)
    model = official(reference)
    losses = ddpm_losses(model, *(reference.tensor(f"in/{key}") for key in ("x", "y", "t", "noise")))
    assert_close(losses.mse, reference.tensor("out/mse"), 1e-5)
    assert_close(losses.variational, reference.tensor("out/vb"), 1e-4)
    assert_close(losses.total, reference.tensor("out/loss_per_sample"), 1e-5)
    losses.total.mean().backward()
    assert_gradient_norms(model, reference.group("gradnorm/"), 2e-4)


@loop_over("name", golden_names("dit_"))
def test_samples(name):
    """The released sampler guides three channels, by default of such weights; it draws float32 normals."""
    reference = golden(name)
    meta, model = reference.meta, official(reference)
    given = {"model": model, "noise": reference.tensor("in/noise"), "y": reference.tensor("in/y")}
    generator = torch.Generator().manual_seed(meta["noise_seed"])
    steps, scale = meta["respacing"], meta["cfg_scale"]
    for call, options in (
        ("ddpm", {"sampler": "ddpm", "generator": generator}),
        ("ddim", {"sampler": "ddim"}),
        ("ddim_cfg", {"sampler": "ddim", "cfg_scale": scale}),
        ("ddim_cfg", {"sampler": "ddim", "cfg_scale": scale, "cfg_channels": "first_three"}),
    ):
        assert_close(sample(**given, num_steps=steps, **options), reference.tensor(f"out/{call}"), 1e-5)
    everywhere = sample(**given, sampler="ddim", num_steps=steps, cfg_scale=scale, cfg_channels="all")
    difference = (everywhere - reference.tensor("out/ddim_cfg")).flatten(2).norm(dim=2)
    assert difference[:, 3].min() > 0.01
