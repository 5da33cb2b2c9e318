"""Outputs, losses and gradients of the official implementations, through public functions only."""

import torch

from dit_fast.checkpoint import load_official
from dit_fast.diffusion import Path, flow_loss
from dit_fast.methods.diversedit import adaptive_weight, select_pairs
from dit_fast.methods.repa import repa_loss
from dit_fast.ops import diversity_loss
from tests.helpers.cases import loop_over
from tests.helpers.golden import Golden, assert_close, golden, golden_names

NAMES = golden_names("sit_", "repa_", "diversedit_")


def _load(reference: Golden):
    wiring = reference.meta["skip_wiring"] if reference.path.stem.startswith("diversedit_") else None
    family = "diversedit" if wiring else "repa"
    return load_official(reference.group("state/"), family, num_heads=reference.meta["num_heads"], skip_wiring=wiring)


def _forward(reference: Golden, model, taps=()):
    x, t, y, noise = (reference.tensor(f"in/{name}") for name in ("x", "t", "y", "noise"))
    x_t, _ = Path(reference.meta["path_type"]).interpolate(x, noise, t)
    return model(x_t, t, y, taps=taps)


@loop_over("name", NAMES)
def test_velocity_projection_and_block_features(name):
    reference = golden(name)
    model = _load(reference)
    with torch.no_grad():
        v, features = _forward(reference, model, taps=range(model.depth))
        projected = model.projectors[0](features[reference.meta["encoder_depth"] - 1])
    assert_close(v, reference.tensor("out/v"), 1e-5)
    assert_close(projected, reference.tensor("out/zs"), 1e-5)
    if "out/block_features" in reference.names:
        published = reference.tensor("out/block_features")
        for index in range(model.depth):
            assert_close(features[index], published[index], 1e-5)


@loop_over("name", NAMES)
def test_loss_and_every_gradient(name):
    reference = golden(name)
    meta = reference.meta
    model = _load(reference)
    outputs = {}

    def velocity(x_t, t, y):
        v, outputs["features"] = model(x_t, t, y, taps=range(model.depth))
        return v

    denoising = flow_loss(
        velocity,
        *(reference.tensor(f"in/{key}") for key in ("x", "y", "t", "noise")),
        path=Path(meta["path_type"]),
    )
    assert_close(denoising, reference.tensor("out/denoising"), 1e-5)
    loss = denoising.mean()
    projected = model.projectors[0](outputs["features"][meta["encoder_depth"] - 1])
    projection = repa_loss(projected, reference.tensor("in/z"))
    assert_close(projection, reference.tensor("out/projection"), 1e-5)
    if meta["projection"]:
        loss = loss + meta["proj_coeff"] * projection
    if "pairs" in meta:
        pairs = [tuple(pair) for pair in meta["pairs"]]
        depth = meta["encoder_depth"] if meta["projection"] else None
        assert [tuple(pair) for pair in select_pairs("release", model.depth, encoder_depth=depth)] == pairs
        diversity = diversity_loss([outputs["features"][index] for index in range(model.depth)], pairs=pairs)
        weight = adaptive_weight(diversity.total, detach=False)
        # Means of cosines of either sign: a term may nearly cancel, and the published fp32 value is then itself only
        # good to a rounding of its summands (1.3e-8 from the fp64 value where the bound would be 1.2e-8).
        for ours, key in (
            (diversity.orthogonality, "orthogonality"),
            (diversity.mutual_information, "mutual_information"),
            (diversity.dispersion, "dispersion"),
            (diversity.total, "diversity"),
        ):
            assert_close(ours, reference.tensor(f"out/{key}"), 1e-5, extra=5e-8)
        assert_close(weight, reference.tensor("out/diversity_weight"), 1e-5, extra=1e-7)
        loss = loss + weight * diversity.total
    assert_close(loss, reference.tensor("out/loss"), 1e-5)

    loss.backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    norms = reference.group("gradnorm/")
    everything = torch.stack([norm.double() for norm in norms.values()]).norm().item()
    assert set(gradients) == set(norms)
    for key, norm in norms.items():
        assert_close(gradients[key].double().norm(), norm, 1e-4, extra=1e-7 * everything)
    for key, gradient in reference.group("grad/").items():
        assert_close(gradients[key], gradient, 1e-4, extra=1e-7 * everything)
