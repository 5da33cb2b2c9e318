"""Losses and gradients of mean flow from published code (diffusion-bench) and from the published equations."""

import torch

from dit_fast.checkpoint import load_official
from dit_fast.objectives.mean_flow import mean_flow_losses
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close, assert_gradient_norms, golden, golden_names

CASES = [
    (name, prediction, kind)
    for name in golden_names("benchmeanflow_")
    for prediction in ("velocity", "x")
    for kind in ("fm", "mf")
]


def small_network(weights, skip):
    """The network N3 of the golden numbers: a function of x, (t, r) and labels, in float64."""

    def network(x, times, y):
        span = (times[:, 0] - times[:, 1])[:, None] * weights["uh"]
        shift = times[:, :1] * weights["ut"] + span + weights["E"][y]
        inner = torch.einsum("hc,ncij->nhij", weights["W0"], x) + shift[:, :, None, None]
        return skip * x + torch.einsum("ch,nhij->ncij", weights["W1"], inner.tanh())

    return network


@loop_over(("name", "prediction", "kind"), CASES)
def test_guided_losses_of_a_small_network(name, prediction, kind):
    reference = golden(name)
    meta = reference.meta
    weights = {key: value.double().requires_grad_() for key, value in reference.group("state/").items()}
    given = {key: value.double() for key, value in reference.group("in/").items()}
    first, second = (torch.sigmoid(given[key] + meta["mu"]) for key in ("time_normals", "time_normals_2"))
    t, r = (first, first) if kind == "fm" else (torch.maximum(first, second), torch.minimum(first, second))
    losses = mean_flow_losses(
        small_network(weights, meta["skip"][prediction]),
        given["x"],
        reference.tensor("in/y"),
        t,
        r,
        given["noise"],
        dropped=reference.tensor("in/dropped").bool(),
        null_label=meta["num_classes"],
        prediction=prediction,
        **{key: meta[key] for key in ("omega", "kappa", "interval", "t_eps", "norm_p", "norm_eps")},
    )
    assert_close(losses.squared_error, reference.tensor(f"out/sq_error_{prediction}_{kind}"), 1e-6)
    assert_close(losses.loss, reference.tensor(f"out/loss_{prediction}_{kind}").mean(), 1e-6)
    if kind == "mf":
        assert_close(losses.dudt.flatten(1).norm(dim=1), reference.tensor(f"out/dudt_norm_{prediction}_mf"), 1e-5)
    losses.loss.backward()
    for key, gradient in reference.group(f"grad_{prediction}_{kind}/").items():
        assert_close(weights[key].grad, gradient, 1e-6)


def official(reference):
    """The published network in float64, in which the numbers were computed."""
    return load_official(reference.group("state/"), "mean_flow", num_heads=reference.meta["num_heads"]).double()


@loop_over(
    ("name", "guidance"), [(name, g) for name in golden_names("meanflow_") for g in ("plain", "cfg", "cfg_kappa0")]
)
def test_losses_and_gradients_of_the_transformer(name, guidance):
    reference = golden(name)
    model, meta = official(reference), reference.meta
    x, noise, t, r = (reference.tensor(f"in/{key}").double() for key in ("x", "noise", "t", "r"))
    norms = {key: meta[key] for key in ("norm_p", "norm_eps")}
    found = mean_flow_losses(
        model, x, reference.tensor("in/y"), t, r, noise, **(meta["guidance"][guidance] or {}), **norms
    )
    for ours, theirs in (("u", "u"), ("dudt", "dudt"), ("squared_error", "sq_error"), ("loss", "loss")):
        assert_close(getattr(found, ours), reference.tensor(f"out/{theirs}_{guidance}"), 1e-5)
    found.loss.backward()
    assert_gradient_norms(model, reference.group(f"gradnorm_{guidance}/"), 1e-5)
