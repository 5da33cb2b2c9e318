"""iREPA against its published code: projector, targets, losses and gradients."""

import math

import pytest
import torch

from dit_fast.checkpoint import export_official, load_official
from dit_fast.diffusion import Path, velocity_error
from dit_fast.errors import UserError
from dit_fast.methods.irepa import spatial_normalize
from dit_fast.methods.repa import repa_loss
from dit_fast.models import build_model
from dit_fast.nn.projector import ConvProjector
from tests.helpers.golden import assert_close, golden, golden_names


def whole(file):
    """The model of a file, its projection, and its denoising loss [N], all held to what was recorded."""
    meta = file.meta
    model = load_official(
        file.group("state/"), family="irepa", num_heads=meta["num_heads"], encoder_depth=meta["encoder_depth"]
    )
    x, noise, t, y = (file.tensor(f"in/{each}") for each in ("x", "noise", "t", "y"))
    block = meta["encoder_depth"] - 1
    x_t, v = Path(meta["path_type"]).interpolate(x, noise, t)
    output, features = model.requires_grad_(True)(x_t, t, y, taps=(block,))
    flow = velocity_error(output, v)
    for ours, theirs in ((output, "v"), (features[block], "feature"), (flow, "denoising")):
        assert_close(ours.detach(), file.tensor(f"out/{theirs}"), 1e-5)
    return model, model.projectors[0](features[block]), flow


def part(file):
    """The projector alone under its name in a model, and its projection of the recorded features."""
    feature, state = file.tensor("out/feature"), file.group("state/projectors.0.")
    features, width, kernel, _ = state["projection_layer.weight"].shape
    side = math.isqrt(feature.shape[1])
    model = torch.nn.Module()
    model.projectors = torch.nn.ModuleList([ConvProjector(width, features, (side, side), kernel)])
    model.projectors[0].load_state_dict(state)
    return model, model.projectors[0](feature), torch.zeros(1)


@pytest.mark.parametrize("name", golden_names("irepaparts_", "irepa_"))
def test_losses_and_gradients(name):
    """`irepaparts_` files, of tests/data, are others without the model, of which they keep the projector."""
    file = golden(name)
    meta = file.meta
    model, projected, flow = (whole if "in/x" in file.names else part)(file)
    assert_close(projected.detach(), file.tensor("out/zs"), 1e-5)
    for kind in ("train", "one"):
        target = spatial_normalize(file.tensor("in/z"), strength=meta["alphas"][kind], eps=meta["eps"])
        assert_close(target, file.tensor(f"out/z_{kind}"), 1e-5)
        projection = repa_loss(projected, target)
        # a mean of cosines of both signs: what is left of them may be smaller than their own rounding
        assert_close(projection.detach(), file.tensor(f"out/projection_{kind}"), 1e-5, extra=1e-7)
        loss = flow.mean() + meta["proj_coeff"] * projection
        if "in/x" in file.names:
            assert_close(loss.detach(), file.tensor(f"out/loss_{kind}"), 1e-5)
        model.zero_grad()
        loss.backward(retain_graph=True)
        norms, gradients = file.group(f"gradnorm_{kind}/"), file.group(f"grad_{kind}/")
        total = torch.stack([value.double() for value in norms.values()]).norm().item() if norms else 0.0
        for each, norm in norms.items():
            assert_close(model.get_parameter(each).grad.norm(), norm, 1e-5, extra=1e-7 * total)
        for each, gradient in gradients.items():
            assert_close(model.get_parameter(each).grad, gradient, 1e-5, extra=1e-7 * total)
        assert gradients


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_model_comes_out_as_it_went_in(kernel):
    model = build_model("SiT-Nano/2", input_size=8, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=5)
    for width in (6, 9):
        model.add_projector(ConvProjector(32, width, model.grid, kernel))
    state = export_official(model)
    again = load_official(state, family="irepa", num_heads=2, encoder_depth=2)
    assert list(state) == list(export_official(again)) == list(export_official(again, "irepa"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in export_official(again).items())
    feature = torch.randn(2, 16, 32)
    assert [head(feature).shape for head in again.projectors] == [(2, 16, 6), (2, 16, 9)]


def test_targets_need_tokens():
    with pytest.raises(UserError, match=r"at least two tokens, not \[3, 1, 4\]"):
        spatial_normalize(torch.zeros(3, 1, 4))
    for bad in ({"strength": float("nan")}, {"strength": float("inf")}, {"eps": float("nan")}, {"eps": -1.0}):
        with pytest.raises(UserError, match=r"strength=.* must be a finite number, eps=.* 0 or more"):
            spatial_normalize(torch.ones(1, 4, 2), **bad)
    assert spatial_normalize(torch.randn(2, 5, 4).half()).dtype == torch.float16
    assert torch.equal(spatial_normalize(torch.ones(1, 4, 2), 1.0), torch.zeros(1, 4, 2))
