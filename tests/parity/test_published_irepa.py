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

KINDS = ("train", "one")


@pytest.mark.parametrize("name", golden_names("irepa_"))
def test_losses_and_gradients(name):
    file = golden(name)
    meta, state = file.meta, file.group("state/")
    model = load_official(state, family="irepa", num_heads=meta["num_heads"], encoder_depth=meta["encoder_depth"])
    model.requires_grad_(True)
    x, noise, t, y, z = (file.tensor(f"in/{each}") for each in ("x", "noise", "t", "y", "z"))
    block = meta["encoder_depth"] - 1
    x_t, v = Path(meta["path_type"]).interpolate(x, noise, t)
    output, features = model(x_t, t, y, taps=(block,))
    projected = model.projectors[0](features[block])
    for ours, theirs in ((output, "v"), (features[block], "feature"), (projected, "zs")):
        assert_close(ours.detach(), file.tensor(f"out/{theirs}"), 1e-5)
    flow = velocity_error(output, v)
    assert_close(flow.detach(), file.tensor("out/denoising"), 1e-5)
    for kind in KINDS:
        target = spatial_normalize(z, strength=meta["alphas"][kind], eps=meta["eps"])
        assert_close(target, file.tensor(f"out/z_{kind}"), 1e-5)
        projection = repa_loss(projected, target)
        # a mean of cosines of both signs: what is left of them may be smaller than their own rounding
        assert_close(projection.detach(), file.tensor(f"out/projection_{kind}"), 1e-5, extra=1e-7)
        loss = flow.mean() + meta["proj_coeff"] * projection
        assert_close(loss.detach(), file.tensor(f"out/loss_{kind}"), 1e-5)
        model.zero_grad()
        loss.backward(retain_graph=True)
        check_gradients(file, model, kind)


def check_gradients(file, model, kind):
    norms = file.group(f"gradnorm_{kind}/")
    whole = torch.stack([value.double() for value in norms.values()]).norm()
    assert len(norms) > 10
    for name, norm in norms.items():
        ours = model.get_parameter(name).grad.norm().double()
        assert abs(ours - norm) <= 1e-5 * norm + 1e-7 * whole, name
    for name, gradient in file.group(f"grad_{kind}/").items():
        error = (model.get_parameter(name).grad - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-7 * whole, name


@pytest.mark.parametrize("name", golden_names("irepaparts_", "irepa_"))
def test_projector_and_targets(name):
    """On the recorded features; `irepaparts_` files hold no more of a model than its projector."""
    file = golden(name)
    head = file.group("state/projectors.0.")
    features, _, kernel, _ = head["projection_layer.weight"].shape
    feature, z = file.tensor("out/feature"), file.tensor("in/z")
    side = math.isqrt(feature.shape[1])
    projector = ConvProjector(feature.shape[-1], features, (side, side), kernel)
    projector.load_state_dict(head)
    projected = projector(feature)
    assert_close(projected.detach(), file.tensor("out/zs"), 1e-5)
    for kind in KINDS:
        target = spatial_normalize(z, strength=file.meta["alphas"][kind], eps=file.meta["eps"])
        assert_close(target, file.tensor(f"out/z_{kind}"), 1e-5)
        projection = repa_loss(projected, target)
        assert_close(projection.detach(), file.tensor(f"out/projection_{kind}"), 1e-5, extra=1e-7)
        projector.zero_grad()
        (file.meta["proj_coeff"] * projection).backward(retain_graph=True)
        for parameter, gradient in file.group(f"grad_{kind}/projectors.0.").items():
            assert_close(projector.get_parameter(parameter).grad, gradient, 1e-5)


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
    assert spatial_normalize(torch.randn(2, 5, 4).half()).dtype == torch.float16
    assert torch.equal(spatial_normalize(torch.ones(1, 4, 2), 1.0), torch.zeros(1, 4, 2))
