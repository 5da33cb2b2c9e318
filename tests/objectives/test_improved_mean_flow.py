"""Improved mean flow: its losses against the written-out equations, what it draws, trees, and what it refuses."""

import math

import pytest
import torch

from dit_fast.errors import ConfigError
from dit_fast.models import Taps, guidance_conditions, split
from dit_fast.objectives import ImprovedMeanFlow, MeanFlow
from dit_fast.objectives.improved_mean_flow import (
    guidance_scale,
    improved_mean_flow_losses,
    improved_mean_flow_sample,
    interval_times,
)
from dit_fast.objectives.mean_flow import total_derivative
from dit_fast.ops.draws import Key
from dit_fast.tree import each, leaves
from tests.helpers.cases import loop_over, refused
from tests.helpers.tiny_sit import WIRINGS, tiny_sit
from tests.objectives.test_mean_flow import KEY, Y, clean, small

FORMS = {"head": {"velocity_head": True, "guidance_condition": True}, "boundary": {}}
T, R = torch.linspace(0.2, 0.95, 6, dtype=torch.float64), torch.tensor([0.2, 0.1, 0.0, 0.5, 0.3, 0.1]).double()
OMEGA = torch.tensor([1.0, 2.0, 8.0, 4.0, 3.0, 1.5]).double()
DROPPED = torch.tensor([True, False, False, True, False, False])


def run(model, x, y=Y, **config):
    return ImprovedMeanFlow(ImprovedMeanFlow.Config(**config), model).run(model, x, y, KEY, Taps(), {}, 0)


def outputs(model, z, t, r, y):
    with torch.no_grad():
        return split(model(z, torch.stack((t, r), 1), y))


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("form", FORMS)
def test_losses_are_those_of_the_equations(form, wiring):
    """Written out, with du/dt by central differences in float64; some labels dropped, some times outside."""
    model, head = small(qk_norm=True, skip_wiring=wiring, **FORMS[form]), form == "head"
    x, noise = clean(), clean().flip(0)
    y, null, low, high = torch.arange(6) % 5, torch.full((6,), 5), 0.3, 0.8
    found = improved_mean_flow_losses(
        model, x, y, T, R, noise, form, omega=OMEGA, t_min=low, t_max=high, dropped=DROPPED, norm_p=0.7, norm_eps=0.2
    )
    wide = lambda value: value[:, None, None, None]  # noqa: E731
    z, ones = x + wide(T) * (noise - x), torch.ones_like(T)
    weight = torch.where((low <= T) & (high >= T), OMEGA, ones)
    told = lambda labels, omega: guidance_conditions(labels, omega, 0 * T, ones) if head else labels  # noqa: E731
    label, free = (outputs(model, z, T, T, told(*pair))[head] for pair in ((y, weight), (null, ones)))
    guided = noise - x + wide(1 - 1 / weight) * (label - free)
    target = torch.where(wide(DROPPED), noise - x, guided)
    labels = torch.where(DROPPED, null, y)
    given = guidance_conditions(labels, OMEGA, low, high) if head else labels
    u, v = outputs(model, z, T, R, given)
    ends = [outputs(model, z + h * label, T + h, R, given)[0] for h in (1e-5, -1e-5)]
    dudt = (ends[0] - ends[1]) / 2e-5
    errors = [(u + wide(T - R) * dudt - target).square().flatten(1).sum(1)]
    errors += [(v - target).square().flatten(1).sum(1)] if head else []
    for ours, theirs in ((found.u, u), (found.velocity, label), (found.target, target), (found.dudt, dudt)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.v, v if head else label)
    torch.testing.assert_close(found.squared_error, errors[0], rtol=1e-6, atol=1e-8)
    assert (found.squared_error_velocity is None) != head
    torch.testing.assert_close(found.loss, sum(e / (e + 0.2) ** 0.7 for e in errors), rtol=1e-6, atol=1e-8)


def exact(z, times, y):
    """The mean velocity of data drawn from N(0.5, 0.25): its flow keeps how far z is from the mean, in deviations."""
    t, r = (time[:, None] for time in times.unbind(1))
    mean, spread = lambda t: (1 - t) / 2, lambda t: ((1 - t).square() / 4 + t.square()).sqrt()
    off = (z - mean(t)) / spread(t)
    at_once = -0.5 + (t - (1 - t) / 4) / spread(t) * off
    span = torch.where(t == r, 1.0, t - r)
    return torch.where(t == r, at_once, (z - mean(r) - spread(r) * off) / span)


def test_an_exact_mean_velocity_gives_the_exact_velocity():
    """V is then the velocity at t whatever r is, so that its error is that of flow matching; one step is the flow."""
    x, noise = clean().flatten(1), clean().flip(0).flatten(1)
    found = improved_mean_flow_losses(exact, x, Y, T, R, noise, "boundary")
    torch.testing.assert_close(found.u + (T - R)[:, None] * found.dudt, found.velocity)
    torch.testing.assert_close(found.squared_error, (found.velocity - (noise - x)).square().sum(1))
    torch.testing.assert_close(improved_mean_flow_sample(exact, noise, Y), 0.5 + noise / 2)


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_flows_through_target_and_derivative(form):
    """The gradient is that of |u - fixed|^2 + |v - fixed|^2."""
    model, x, noise = small(**FORMS[form]), clean(), clean().flip(0)
    found = improved_mean_flow_losses(model, x, Y, T, R, noise, form, omega=2.0, norm_p=0.0)
    assert not any(leaf.requires_grad for leaf in (found.velocity, found.target, found.dudt))
    found.loss.sum().backward()
    gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    given = guidance_conditions(Y, torch.full_like(T, 2.0)) if form == "head" else Y
    u, v = split(
        model((1 - T)[:, None, None, None] * x + T[:, None, None, None] * noise, torch.stack((T, R), 1), given)
    )
    fixed = found.target - (T - R)[:, None, None, None] * found.dudt
    ((u - fixed).square().sum() + (0 if v is None else (v - found.target).square().sum())).backward()
    for name, value in gradient.items():
        torch.testing.assert_close(model.get_parameter(name).grad, value)


@loop_over("wiring", WIRINGS)
@loop_over("class_token", [0, 12])
def test_the_derivative_of_a_model_with_two_outputs_and_conditions(wiring, class_token):
    model = small(skip_wiring=wiring, class_token=class_token, qk_norm=True, **FORMS["head"])
    x, told, step = clean(bool(class_token)), guidance_conditions(Y, OMEGA, 0.1, 0.9), 1e-5
    direction = each(torch.cos, x)
    found = total_derivative(model, x, direction, T, R, told)
    ends = [outputs(model, each(lambda a, d, s=s: a + s * d, x, direction), T + s, R, told)[0] for s in (step, -step)]
    for name, leaf in leaves(found).items():
        difference = (leaves(ends[0])[name] - leaves(ends[1])[name]) / (2 * step)
        torch.testing.assert_close(leaf, difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_run_has_the_losses_of_the_plain_function(form, tree):
    """The labels that it is given were dropped before, so that du/dt of such a sample follows its own velocity."""
    model, x = small(skip_wiring="input", class_token=12 * tree, **FORMS[form]), clean(tree)
    options, fixed = {"norm_p": 0.8, "norm_eps": 0.1}, {"omega": 3.0, "guidance_low": 0.1, "guidance_high": 0.6}
    context = run(model, x, **options, **({} if form == "head" else fixed))
    t, r = context.times.unbind(1)
    told = {"omega": 3.0, "t_min": 0.1, "t_max": 0.6}
    told = {name: context.y[name] for name in told} if form == "head" else told
    expected = improved_mean_flow_losses(model, x, Y, t, r, context.noise, form, **told, dropped=Y == 5, **options)
    torch.testing.assert_close(context.losses["image"], expected.loss)
    assert leaves(context.losses).keys() == leaves(x).keys()
    for name, error in (
        ("squared_error", expected.squared_error), ("squared_error_velocity", expected.squared_error_velocity)
    ):  # fmt: skip
        if error is None:
            assert f"improved_mean_flow/{name}" not in context.logs
        else:
            torch.testing.assert_close(context.logs[f"improved_mean_flow/{name}"], leaves(error)["image"].mean())
    assert (context.second is None) == (form == "boundary")
    sum(loss.sum() for loss in context.losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_what_is_drawn_depends_on_the_position_alone():
    objective = ImprovedMeanFlow(ImprovedMeanFlow.Config(maximum=3.0, data_proportion=0.3), small(**FORMS["head"]))
    key = Key(0, torch.arange(4000))
    t, r = objective.draw_times(key)
    drawn = objective.draw_guidance(key, t, r)
    half = Key(0, torch.arange(2000, 4000))
    later = objective.draw_guidance(half, *objective.draw_times(half))
    assert all(torch.equal(one[2000:], two) for one, two in zip(drawn, later, strict=True))
    omega, low, high = drawn
    assert 1 <= omega.min() < 1.01
    assert 3.99 < omega.max() <= 4
    assert abs(omega.log().mean() - math.log(4) / 2) < 3 * math.log(4) / (12 * 4000) ** 0.5
    same = r == t
    assert abs(same.double().mean() - 0.3) < 3 * (0.21 / 4000) ** 0.5
    assert (low[same] == 0).all()
    assert (high[same] == 1).all()
    for value, shift in ((low, 0.0), (high, 0.5)):
        free = value[~same] - shift
        assert free.min() >= 0
        assert free.max() <= 0.5
        assert abs(free.mean() - 0.25) < 0.02


@loop_over(("beta", "maximum"), [(1.0, 7.0), (2.0, 3.0), (0.0, 7.0), (0.5, 1.0)])
def test_a_scale_of_guidance_has_a_density_that_falls_by_a_power(beta, maximum):
    """The share below omega is the integral of s^-beta, as a fraction."""
    uniform = torch.linspace(0, 1, 11, dtype=torch.float64)
    omega = guidance_scale(uniform, beta=beta, maximum=maximum)
    area = lambda s: s.log() if beta == 1 else (s ** (1 - beta) - 1) / (1 - beta)  # noqa: E731
    torch.testing.assert_close(area(omega) / area(torch.tensor(1 + maximum).double()), uniform)


def test_what_it_cannot_train_is_refused():
    told = small(**FORMS["head"])
    for model, config, message in (
        (small(times=1), {}, r"objective=improved_mean_flow needs a model of two times; set model\.times=2"),
        (small(label_dropout=0.0), {"omega": 2.0}, r"model\.label_dropout=0 trains none"),
        (small(label_dropout=0.0, guidance_condition=True), {}, r"model\.label_dropout=0 trains none"),
        (told, {"omega": 2.0}, r"set model\.guidance_condition=false"),
        (small(), {"guidance_high": 0.5}, r"guidance_high=0\.5 are of a guided target"),
        (small(), {"maximum": 3.0}, r"objective\.maximum=7, or model\.guidance_condition=true"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(model, clean(), **config)
    with pytest.raises(ConfigError, match="swap them"):
        ImprovedMeanFlow.Config(guidance_low=0.6, guidance_high=0.5)
    for option in FORMS["head"]:
        with pytest.raises(ConfigError, match=f"objective=mean_flow has no use for model.{option}"):
            MeanFlow(MeanFlow.Config(), small(**{option: True}))
    losses = lambda model, **options: refused(  # noqa: E731
        improved_mean_flow_losses, model, **{"x": clean(), "y": Y, "t": T, "r": R, "noise": clean(), **options}
    )
    assert "a network that returns (u, v); use velocity='boundary'" in losses(small())
    assert "velocity" in losses(told, velocity="both")
    for outputs in (lambda z: (z[:, :1], z), lambda z: (z, z[:, :1])):
        assert "it must be like" in losses(lambda z, t, y, outputs=outputs: outputs(z))
    assert losses(told, omega=0.0) == "omega=0.0 must be a finite number, above 0"
    assert "t_min must be a number or a tensor [6]" in losses(told, t_min=torch.zeros(2))
    assert losses(told, t_min=0.7, t_max=0.2) == "t_min[0] = 0.7 lies above t_max[0] = 0.2; swap them"
    assert "swap them" in refused(improved_mean_flow_sample, told, clean(), Y, omega=2.0, t_min=0.7, t_max=0.2)
    assert "omega must hold finite numbers, above 0" in losses(told, omega=0 * T)
    assert "t_max is of guidance" in losses(small(), velocity="boundary", t_max=0.5)
    assert "give null_label=" in losses(small(label_dropout=0.0, velocity_head=True), omega=2.0, y=Y % 5)
    assert "dropped must be bool [6]" in losses(told, dropped=DROPPED[:1])
    for omega, message in ((0.0, "omega=0.0 must be"), (torch.ones(2), "omega must be a number or a tensor [6]")):
        assert message in refused(improved_mean_flow_sample, told, clean(), Y, omega=omega)
    assert "a maximum above 0" in refused(guidance_scale, T, maximum=0.0)
    assert "data_proportion=2 must lie in [0, 1]" in refused(interval_times, T, R, data_proportion=2)
    assert "needs normals [N] twice" in refused(interval_times, T, R[:1])


def test_without_guidance_no_null_label_is_needed():
    """In the target, in a run, and in samples of a model that is told none."""
    model = small(label_dropout=0.0)
    plain, one = (improved_mean_flow_losses(model, clean(), Y % 5, T, R, clean(), "boundary", w) for w in (None, 1.0))
    assert torch.equal(plain.loss, one.loss)
    assert run(model, clean(), Y % 5).losses["image"].isfinite().all()
    told = tiny_sit(times=2, **FORMS["head"])
    start, y = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    drawn = [improved_mean_flow_sample(told, start, y, 2, omega) for omega in (None, 1.0, 4.0)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[1], drawn[2])
