"""REG's three losses and the gradients of their published sum."""

import pytest

from dit_fast.checkpoint import load_official
from dit_fast.errors import UserError
from dit_fast.methods.reg import reg_losses
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close, assert_gradient_norms, golden, golden_names


@loop_over("name", golden_names("reg_"))
def test_losses_and_gradients(name):
    reference = golden(name)
    meta = reference.meta
    model = load_official(reference.group("state/"), "reg", num_heads=meta["num_heads"])
    given = (reference.tensor(f"in/{key}") for key in ("x", "y", "t", "noise", "cls_noise", "z"))
    losses = reg_losses(model, *given, encoder_depth=meta["encoder_depth"])
    for ours, theirs in (("flow", "denoising"), ("class_token", "denoising_cls"), ("alignment", "projection")):
        assert_close(getattr(losses, ours), reference.tensor(f"out/{theirs}"), 1e-5)
    total = losses.flow.mean() + meta["cls_coeff"] * losses.class_token.mean() + meta["proj_coeff"] * losses.alignment
    assert_close(total, reference.tensor("out/loss"), 1e-5)
    total.backward()
    assert_gradient_norms(model, reference.group("gradnorm/"), 1e-5)


@pytest.mark.parametrize("depth", [0, 9])
def test_a_block_that_the_model_does_not_have_is_named(depth):
    reference = golden("reg_a")
    model = load_official(reference.group("state/"), "reg", num_heads=reference.meta["num_heads"])
    given = (reference.tensor(f"in/{key}") for key in ("x", "y", "t", "noise", "cls_noise", "z"))
    with pytest.raises(UserError, match=rf"encoder_depth={depth} is not one of this model's blocks 1\.\.8"):
        reg_losses(model, *given, encoder_depth=depth)
