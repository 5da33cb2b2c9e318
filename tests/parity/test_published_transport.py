"""Losses, drifts, scores and diffusion of SiT's transport code, and the x prediction of JiT, on a small network."""

import torch

from dit_fast.checkpoint import load_official
from dit_fast.diffusion import Path, logit_normal
from dit_fast.diffusion.conversions import convert, diffusion_coefficient
from dit_fast.objectives.flow import flow_losses
from dit_fast.objectives.x_prediction import x_prediction_losses
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close, assert_gradient_norms, golden, golden_names
from tests.helpers.small_network import network, weights

OUR_PATH = {"linear": "linear", "gvp": "cosine", "vp": "vp"}
TRANSPORT = [(name, path) for name in golden_names("transport_") for path in OUR_PATH]


def given(name):
    """Golden file, its inputs in float64, and t in our direction."""
    reference = golden(name)
    inputs = {key: reference.tensor(f"in/{key}").double() for key in ("x", "noise", "t_sit")}
    return reference, inputs["x"], inputs["noise"], 1 - inputs["t_sit"], reference.tensor("in/y")


@loop_over(("name", "path"), TRANSPORT)
def test_drifts_scores_and_conversions(name, path):
    reference, x, noise, t, y = given(name)
    x_t, v = Path(OUR_PATH[path]).interpolate(x, noise, t)
    assert_close(x_t, reference.tensor(f"out/xt_{path}"), 1e-6)
    assert_close(-v, reference.tensor(f"out/ut_{path}"), 1e-6)

    def converted(value, source, target):
        return convert(value, x_t, t, path=OUR_PATH[path], source=source, target=target)

    for prediction in ("velocity", "score", "noise"):
        output = network(weights(reference), reference.meta["skip"][prediction])(x_t, t, y).detach()
        output = -output if prediction == "velocity" else output
        assert_close(
            -converted(output, prediction, "velocity"), reference.tensor(f"out/drift_{path}_{prediction}"), 1e-6
        )
        assert_close(converted(output, prediction, "score"), reference.tensor(f"out/score_{path}_{prediction}"), 1e-6)
    output = network(weights(reference), reference.meta["skip"]["velocity"])(x_t, t, y).detach()
    ours = converted(-output, "velocity", "noise")
    assert_close(ours, reference.tensor(f"out/noise_from_velocity_{path}"), 1e-6)
    ours = -converted(output, "score", "velocity")
    assert_close(ours, reference.tensor(f"out/velocity_from_score_{path}"), 1e-6)


@loop_over(("name", "path"), TRANSPORT)
def test_diffusion_coefficients(name, path):
    reference, *_, t, _ = given(name)
    for form in ("constant", "sbdm", "sigma", "linear", "decreasing", "inccreasing-decreasing"):
        ours = diffusion_coefficient(form.replace("incc", "inc"), t, path=OUR_PATH[path], norm=0.7)
        assert_close(ours, reference.tensor(f"out/diffusion_{path}_{form}"), 1e-6)


def assert_same_gradients(parameters, reference, prefix, sign=1.0):
    gradients = reference.group(prefix)
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    for key, gradient in gradients.items():
        assert_close(sign * parameters[key].grad, gradient, 1e-6, 1e-8 * whole)


@loop_over(("name", "path", "prediction"), [(*case, p) for case in TRANSPORT for p in ("velocity", "score", "noise")])
def test_losses_and_gradients(name, path, prediction):
    """The published weightings; a velocity has the same loss with each of them."""
    reference, x, noise, t, y = given(name)
    sign = -1 if prediction == "velocity" else 1
    for weighting in ("none", "velocity", "likelihood"):
        parameters = weights(reference)
        f = network(parameters, reference.meta["skip"][prediction])
        losses = flow_losses(
            lambda x, t, y, f=f: sign * f(x, t, y), x, y, t, noise, OUR_PATH[path], prediction, weighting
        )
        recorded = "none" if prediction == "velocity" else weighting
        assert_close(losses, reference.tensor(f"out/loss_{path}_{prediction}_{recorded}"), 1e-6)
        losses.mean().backward()
        assert_same_gradients(parameters, reference, f"grad_{path}_{prediction}_{recorded}/")


@loop_over("name", golden_names("xpred_"))
def test_x_prediction(name):
    reference = golden(name)
    meta, t, y = reference.meta, 1 - reference.tensor("in/t_jit").double(), reference.tensor("in/y")
    x, noise = (reference.tensor(f"in/{key}").double() for key in ("x", "noise"))
    parameters = weights(reference)
    options = {key: meta[key] for key in ("noise_scale", "t_eps")}
    found = x_prediction_losses(network(parameters, meta["skip"]), x, y, t, noise, **options)
    assert_close(found.x_prediction, reference.tensor("out/x_pred"), 1e-6)
    assert_close(-found.velocity, reference.tensor("out/v_pred"), 1e-6)
    assert_close(found.loss, reference.tensor("out/loss_per_sample"), 1e-6)
    unclamped = found.loss[reference.tensor("in/unclamped").bool()].mean()
    assert_close(unclamped, reference.tensor("out/loss_unclamped"), 1e-6)
    unclamped.backward(retain_graph=True)
    assert_same_gradients(parameters, reference, "grad_unclamped/")
    for value in parameters.values():
        value.grad = None
    found.loss.mean().backward()
    assert_same_gradients(parameters, reference, "grad/")


@loop_over("name", golden_names("xpred_"))
def test_times_of_the_x_prediction(name):
    """JiT's t runs from noise to data: its logit-normal has the other sign in ours."""
    reference = golden(name)
    ours = logit_normal(-reference.meta["P_mean"], reference.meta["P_std"])
    assert_close(1 - ours.transform(-reference.tensor("in/time_normals")), reference.tensor("out/time"), 1e-6)


@loop_over(("name", "path"), [(name, path) for name in golden_names("officialsit_") for path in ("linear", "gvp")])
def test_losses_and_gradients_of_the_official_sit(name, path):
    reference = golden(name)
    model = load_official(reference.group("state/"), family="sit", num_heads=reference.meta["num_heads"])
    x, noise, t, y = (reference.tensor(f"in/{key}") for key in ("x", "noise", "t_sit", "y"))
    losses = flow_losses(model, x, y, 1 - t, noise, OUR_PATH[path])
    assert_close(losses, reference.tensor(f"out/loss_{path}"), 2e-6)
    losses.mean().backward()
    assert_gradient_norms(model, reference.group(f"gradnorm_{path}/"), 1e-5)
