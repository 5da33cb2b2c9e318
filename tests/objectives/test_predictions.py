"""Flow matching by velocity, score, noise or x: losses, times and refusals of a run, and the plain function."""

import pytest
import torch

from dit_fast.diffusion import Path, sample, velocity_error
from dit_fast.diffusion.conversions import convert
from dit_fast.errors import ConfigError, UserError
from dit_fast.models import Taps
from dit_fast.objectives import Flow, flow
from dit_fast.objectives.flow import flow_losses
from dit_fast.objectives.x_prediction import x_prediction_losses
from dit_fast.ops.draws import Key
from dit_fast.philox import Stream
from dit_fast.tree import leaves
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close
from tests.objectives.test_flow import KEY, Scale, Y, clean

CASES = [(path, prediction) for path in Path.NAMES for prediction in ("velocity", "score", "noise", "x")]
T = torch.tensor([0.02, 0.4, 0.7, 0.99], dtype=torch.float64)


def bound(**config):
    return Flow(Flow.Config(**config), Scale())


def output(x_t, t, y):
    return 0.3 * x_t + t.view(-1, 1, 1, 1)


@loop_over(("path", "prediction"), CASES)
def test_weighted_by_velocity_a_loss_is_that_of_the_velocity(path, prediction):
    x, noise = clean("image").double(), KEY.normal(Stream.NOISE, (3, 8, 8)).double()
    x_t, velocity = Path(path).interpolate(x, noise, T)
    late = {"t_eps": 0.01} if prediction == "x" else {}
    ours = flow_losses(output, x, Y, T, noise, path, prediction, "velocity", **late)
    made = convert(output(x_t, T, Y), x_t, T, path, prediction, "velocity", **late)
    assert_close(ours, velocity_error(made, velocity), 1e-9)
    likelihood = flow_losses(output, x, Y, T, noise, path, prediction, "likelihood", **late)
    c = Path(path).coefficients(T)
    half_variance = c.sigma * (c.d_sigma - c.d_alpha * c.sigma / c.alpha)  # d(sigma^2)/dt / 2 of the forward process
    assert_close(likelihood, ours if prediction == "velocity" else ours / half_variance, 1e-9)


@loop_over(("path", "prediction", "form"), [(*case, form) for case in CASES for form in ("image", "tree")])
def test_a_run_has_the_loss_of_the_plain_function_for_each_leaf(path, prediction, form):
    weighting = "none" if prediction == "velocity" else "likelihood"
    model, x = Scale(), clean(form)
    context = bound(path=path, prediction=prediction, weighting=weighting).run(model, x, Y, KEY, Taps(), {}, 3)
    for name, leaf in leaves(x).items():
        noise = leaves(context.noise)[name]
        alone = flow_losses(model, leaf, Y, context.t, noise, path, prediction, weighting)
        assert torch.equal(context.losses[name], alone)
        target = {"velocity": Path(path).interpolate(leaf, noise, context.t)[1], "noise": noise, "x": leaf}
        if prediction in target:
            assert torch.equal(leaves(context.target)[name], target[prediction])
        else:
            sigma = Path(path).coefficients(context.t).sigma.view(-1, *[1] * (leaf.dim() - 1))
            assert_close(leaves(context.target)[name] * -sigma, noise, 1e-6)
        assert torch.equal(leaves(context.noised_at(context.t))[name], leaves(context.noised)[name])


@loop_over(("path", "prediction"), [("linear", "noise"), ("cosine", "x"), ("vp", "velocity")])
def test_what_the_fused_ops_do_not_know_is_computed_without_them(path, prediction, monkeypatch):
    plain = bound(path=path, prediction=prediction).run(Scale(), clean("image"), Y, KEY, Taps(), {}, 3)
    monkeypatch.setattr(flow, "draws_noise_in_registers", lambda latents: True)
    context = bound(path=path, prediction=prediction).run(Scale(), clean("image"), Y, KEY, Taps(), {}, 3)
    assert torch.equal(context.losses["image"], plain.losses["image"])


@loop_over(("path", "prediction"), CASES)
def test_samplers_follow_the_velocity_made_from_the_prediction(path, prediction):
    """A model that knows the one point x there is: every kind of prediction leads along the path to it."""
    x, start = clean("image").double(), KEY.normal(Stream.NOISE, (3, 8, 8)).double()

    def model(x_t, t, y):
        c = Path(path).coefficients(t.view(-1, 1, 1, 1))
        noise = (x_t - c.alpha * x) / c.sigma
        kinds = {"velocity": c.d_alpha * x + c.d_sigma * noise, "score": -noise / c.sigma, "noise": noise, "x": x}
        return kinds[prediction]

    model.times, model.learns_variance = 1, False
    first, last = (Path(path).coefficients(t) for t in (0.99, 0.02))
    late = {"t_eps": 0.01} if prediction == "x" else {}
    objective = Flow(Flow.Config(path=path, prediction=prediction, **late), model)
    options = {"path": path, "prediction": prediction, "field": objective.field, "time_range": (0.99, 0.02)}
    found = sample(model, start, Y, "rk4", 60, **options)
    assert_close(found, last.alpha * x + last.sigma / first.sigma * (start - first.alpha * x), 1e-4)


def test_times_keep_to_the_published_ranges():
    key = Key(3, torch.arange(20_000))
    for path, prediction, low, high in (
        ("linear", "velocity", 0, 1),
        ("cosine", "score", 0.001, 0.999),
        ("vp", "velocity", 1e-5, 1),
        ("vp", "x", 0, 1),
    ):
        t, whole = bound(path=path, prediction=prediction).draw_times(key), bound().draw_times(key)
        assert t.dtype == torch.float32
        assert_close(t, low + (high - low) * whole, 1e-6)
        assert low <= t.min() < low + 1e-3
        assert high - 1e-3 < t.max() <= high
        assert (low, high) != (0, 1) or torch.equal(t, whole)


@loop_over(
    ("config", "message"),
    [
        (
            {"weighting": "velocity"},
            "objective.weighting=velocity.*velocity has no weight",
        ),
        ({"prediction": "noise", "t_eps": 0.1}, "objective.t_eps=0.1 is for a prediction of x, not for .*=noise"),
        ({"path": "vp", "prediction": "noise", "time": "lognormal"}, "objective.time=lognormal.*not for vp"),
        (
            {"time_std": 0.8},
            "objective.time_mean=0.0 and time_std=0.8 are of objective.time=logit_normal, not of uniform",
        ),
    ],
)
def test_void_combinations_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        Flow.Config(**config)


ONE, TIME = torch.ones(4, 3, 2, 2), torch.ones(4)


@loop_over(
    ("call", "message"),
    [
        (lambda: flow_losses(output, ONE, Y, TIME, ONE, prediction="eps"), "prediction 'eps'.*score, noise, x"),
        (lambda: flow_losses(output, ONE, Y, TIME, ONE, "linear", "noise", "snr"), "weighting 'snr'.*likelihood"),
        (lambda: flow_losses(lambda x, t, y: x[:, :1], ONE, Y, TIME, ONE), r"returned .*\[4, 1, 2, 2\]"),
        (lambda: flow_losses(output, ONE, Y, TIME[:2], ONE), r"t must be floats \[4\], one time for each sample"),
        (lambda: flow_losses(output, ONE, Y, TIME * 2, ONE), r"t\[0\] = 2; a time lies in \[0, 1\]"),
        (
            lambda: flow_losses(output, ONE, Y[:3], TIME, ONE),
            r"y must be int64 \[4\], .* \[3\]",
        ),
        *[
            (
                lambda eps=eps: flow_losses(output, ONE, Y, TIME, ONE, "linear", "x", "velocity", eps),
                f"t_eps={eps} must",
            )
            for eps in (-0.1, 0.0, 1.0, float("nan"), float("inf"))
        ],
        (lambda: flow_losses(output, ONE, Y, TIME, ONE, t_eps=0.1), "t_eps=0.1 has no effect here"),
        (lambda: flow_losses(output, ONE, Y, TIME, ONE, "linear", "x", t_eps=0.1), "t_eps=0.1 has no effect here"),
        (lambda: convert(ONE, ONE, TIME, source="x", t_eps=float("nan")), "t_eps=nan must be a time"),
        (lambda: x_prediction_losses(output, ONE, Y, TIME, ONE, t_eps=1.5), "t_eps=1.5 must be a time"),
        (lambda: x_prediction_losses(output, ONE, Y, TIME, ONE, noise_scale=float("nan")), "noise_scale=nan must"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
