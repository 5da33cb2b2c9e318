"""Improved mean flow: the authors' code on a small network with a velocity head, the paper's boundary form on a SiT."""

import pytest
import torch

from dit_fast.checkpoint import load_official
from dit_fast.diffusion import sample
from dit_fast.objectives.improved_mean_flow import (
    guidance_scale,
    improved_mean_flow_losses,
    improved_mean_flow_sample,
    interval_times,
)
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close, assert_gradient_norms, golden, golden_names

FIELDS = {
    "u": "u", "v": "v", "dudt": "dudt", "v_c": "velocity", "v_g": "target", "sq_error_u": "squared_error",
    "sq_error_v": "squared_error_velocity", "loss_per_sample": "loss",
}  # fmt: skip


def small_network(weights):
    """The network N2 of the golden numbers: a function of x, (t, r) and conditions with two outputs, in float64."""

    def network(x, times, y):
        told = {"ut": times[:, 0], "uh": times[:, 0] - times[:, 1], "uw": 1 - 1 / y["omega"], "ua": y["t_min"]}
        shift = sum(value[:, None] * weights[key] for key, value in {**told, "ub": y["t_max"]}.items())
        inner = torch.einsum("hc,ncij->nhij", weights["W0"], x) + (shift + weights["E"][y["label"]])[:, :, None, None]
        return tuple(torch.einsum("ch,nhij->ncij", weights[key], inner.tanh()) for key in ("Wu", "Wv"))

    return network


def published(name):
    """The file, its network with parameters that take gradients, and its inputs in float64."""
    reference = golden(name)
    weights = {key: value.double().requires_grad_() for key, value in reference.group("state/").items()}
    return reference, weights, {key: value.double() for key, value in reference.group("in/").items()}


@loop_over("name", golden_names("imf_"))
def test_times_and_guidance_are_drawn_as_published(name):
    reference, _, given = published(name)
    meta = reference.meta
    t, r = interval_times(
        given["time_normals_t"], given["time_normals_r"], meta["P_mean"], meta["P_std"], meta["data_proportion"]
    )
    omega = guidance_scale(given["uniform_omega"], beta=meta["cfg_beta"], maximum=meta["s_max"])
    for ours, theirs in ((t, "t"), (r, "r"), (omega, "omega")):
        assert_close(ours, reference.tensor(f"out/{theirs}"), 1e-6)
    assert (t == r).sum() == int(len(t) * meta["data_proportion"])


@loop_over("name", golden_names("imf_"))
def test_losses_with_a_velocity_head(name):
    reference, weights, given = published(name)
    meta, labels = reference.meta, reference.tensor("in/y")
    count = int((given["uniform_drop"] < meta["class_dropout_prob"]).sum())
    losses = improved_mean_flow_losses(
        small_network(weights), given["x"], labels, *(reference.tensor(f"out/{key}").double() for key in "tr"),
        given["noise"], velocity="head",
        **{key: reference.tensor(f"out/{key}").double() for key in ("omega", "t_min", "t_max")},
        dropped=torch.arange(len(labels)) < count, null_label=meta["num_classes"],
        norm_p=meta["norm_p"], norm_eps=meta["norm_eps"],
    )  # fmt: skip
    for theirs, ours in FIELDS.items():
        assert_close(getattr(losses, ours), reference.tensor(f"out/{theirs}"), 2e-6)
    losses.loss.mean().backward()
    for key, gradient in reference.group("grad/").items():
        assert_close(weights[key].grad, gradient, 2e-6)


@loop_over("name", golden_names("imf_"))
def test_samples_of_a_guided_condition(name):
    reference, weights, given = published(name)
    options = reference.meta["sample"]
    for key in [key for key in reference.names if key.startswith("out/sample_")]:
        steps = int(key.removeprefix("out/sample_"))
        with torch.no_grad():
            ours = improved_mean_flow_sample(
                small_network(weights), given["start"], reference.tensor("in/y"), num_steps=steps, **options
            )
        assert_close(ours, reference.tensor(key), 2e-6)


# 380 kB, so not in tests/data
NO_FILE = pytest.param("", marks=pytest.mark.skip(reason="DIT_FAST_GOLDEN names no folder with an imfsit file"))
BOUNDARY = golden_names("imfsit_") or [NO_FILE]


@pytest.mark.parametrize("guidance", ["plain", "guided"])
@pytest.mark.parametrize("name", BOUNDARY)
def test_losses_at_the_boundary(name, guidance):
    reference = golden(name)
    meta = reference.meta
    model = load_official(reference.group("state/"), "mean_flow", num_heads=meta["num_heads"]).double()
    x, noise, t, r = (reference.tensor(f"in/{key}").double() for key in ("x", "noise", "t", "r"))
    losses = improved_mean_flow_losses(
        model, x, reference.tensor("in/y"), t, r, noise, velocity="boundary",
        omega=meta["guided_omega"] if guidance == "guided" else None,
        **{key: meta[key] for key in ("norm_p", "norm_eps")},
    )  # fmt: skip
    names = {"u": "u", "dudt": "dudt", "v": "velocity", "target": "target", "sq_error": "squared_error", "loss": "loss"}
    for theirs, ours in names.items():
        assert_close(getattr(losses, ours), reference.tensor(f"out/{theirs}_{guidance}"), 1e-5)
    losses.loss.mean().backward()
    assert_gradient_norms(model, reference.group(f"gradnorm_{guidance}/"), 1e-5)
    for key, gradient in reference.group(f"grad_{guidance}/").items():
        assert_close(model.get_parameter(key).grad, gradient, 1e-5)


@pytest.mark.parametrize("name", BOUNDARY)
def test_samples_in_one_step_and_two(name):
    reference = golden(name)
    model = load_official(reference.group("state/"), "mean_flow", num_heads=reference.meta["num_heads"]).double()
    for steps, key in ((1, "one_step"), (2, "two_step")):
        ours = sample(model, reference.tensor("in/start"), reference.tensor("in/y"), "mean_flow", steps)
        assert_close(ours, reference.tensor(f"out/{key}"), 1e-5)
