"""DiT's losses, their gradients and its samplers, from fast-DiT's model and diffusion."""

import torch

from dit_fast.checkpoint import load_official
from dit_fast.objectives.ddpm import ddpm_losses
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close, golden, golden_names


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
    norms = reference.group("gradnorm/")
    whole = torch.stack(list(norms.values())).norm()
    for key, expected in norms.items():
        assert abs(model.get_parameter(key).grad.norm() - expected) <= 2e-4 * expected + 1e-7 * whole, key
