"""Mean flow as an objective: its two times, its losses, trees, and what it refuses."""

import pytest
import torch

from dit_fast.errors import ConfigError, UserError
from dit_fast.models import Taps
from dit_fast.objectives import MeanFlow
from dit_fast.objectives.mean_flow import mean_flow_losses, total_derivative
from dit_fast.ops.draws import Key
from dit_fast.philox import Stream
from dit_fast.tree import each, leaves
from tests.helpers.tiny_sit import tiny_sit

KEY, Y = Key(7, torch.arange(6) + 3), torch.tensor([0, 5, 2, 3, 5, 1])  # 5: the null label


def small(**changes):
    return tiny_sit(**{"in_channels": 2, "num_classes": 5, "times": 2, **changes}).double()


def clean(tree=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 8, 8, generator=generator, dtype=torch.float64)
    return {"image": x, "class_token": torch.randn(6, 12, generator=generator, dtype=torch.float64)} if tree else x


def run(model, x, **config):
    return MeanFlow(MeanFlow.Config(**config), model).run(model, x, Y, KEY, Taps(), {}, 0)


def test_times_are_two_draws_in_order_and_one_for_the_share_of_the_data():
    key = Key(0, torch.arange(4000))
    t, r = MeanFlow(MeanFlow.Config(data_proportion=0.3), small()).draw_times(key)
    assert (r <= t).all()
    assert abs((r == t).double().mean() - 0.3) < 3 * (0.3 * 0.7 / 4000) ** 0.5
    draws = torch.stack([torch.sigmoid(key.normal(stream, ()) - 0.4) for stream in (Stream.TIME, Stream.SECOND_TIME)])
    assert torch.equal(t, draws.amax(0))
    assert torch.equal(r[r < t], draws.amin(0)[r < t])


@pytest.mark.parametrize("tree", [False, True])
def test_losses_are_those_of_the_plain_function(tree):
    """Guided inside an interval; samples without a label keep the velocity; beside long skips and a class token."""
    model, x = small(skip_wiring="input", class_token=12 * tree), clean(tree)
    options = {"omega": 0.7, "kappa": 0.4, "norm_p": 0.8, "norm_eps": 0.1}
    context = run(model, x, **options, guidance_low=0.1, guidance_high=0.6)
    t, r = MeanFlow(MeanFlow.Config(), model).draw_times(KEY)
    expected = mean_flow_losses(
        model, x, Y, t, r, context.noise, **options, interval=(0.1, 0.6), dropped=Y == 5, null_label=5
    )
    torch.testing.assert_close(context.losses["image"].mean(), expected.loss)
    assert leaves(context.losses).keys() == leaves(x).keys()
    torch.testing.assert_close(context.logs["mean_flow/squared_error"], leaves(expected.squared_error)["image"].mean())
    assert torch.equal(context.t, t)
    sum(loss.sum() for loss in context.losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("omega", [None, 2.0])
def test_dropped_samples_learn_with_the_null_label(omega):
    """Whatever label they come with, and without guidance too; they keep the data's velocity."""
    model, x, noise = small(), clean(), torch.sin(3 * clean())
    t, dropped = torch.linspace(0.2, 0.9, 6, dtype=torch.float64), torch.arange(6) % 2 == 0
    found = mean_flow_losses(model, x, Y % 5, t, t / 2, noise, omega, dropped=dropped)
    null = mean_flow_losses(model, x, torch.full_like(Y, 5), t, t / 2, noise)
    kept = mean_flow_losses(model, x, Y % 5, t, t / 2, noise, omega)
    for ours, free, labelled in zip(found[:3], null[:3], kept[:3], strict=True):
        inside = dropped.reshape(-1, *[1] * (ours.dim() - 1))
        torch.testing.assert_close(ours, torch.where(inside, free, labelled))
        assert not torch.equal(free[dropped], labelled[dropped])


def test_at_an_earlier_time_no_interval_begins_after_its_end():
    context, shift = run(small(), clean()), torch.tensor([0.0, 0.9, 0.05, 0.1, 0.2, 1.0])
    noised, times = context.earlier(shift)
    t, r = (context.t - shift).clamp(0, 1), context.times[:, 1]
    assert torch.equal(times, torch.stack((t, torch.minimum(r, t)), 1))
    assert 0 < (r > t).sum() < 6
    assert torch.equal(noised, context.noised_at(t))
    assert torch.equal(context.objective.unit(context.times), context.t)


@pytest.mark.parametrize("wiring", ["off", "input", "output"])
def test_total_derivative_is_that_of_finite_differences(wiring):
    model = small(skip_wiring=wiring, qk_norm=True, class_token=12)
    x, velocity, step = clean(True), each(torch.cos, clean(True)), 1e-5
    t, r = torch.full((6,), 0.7, dtype=torch.float64), torch.full((6,), 0.2, dtype=torch.float64)
    found = total_derivative(model, x, velocity, t, r, Y)
    with torch.no_grad():
        ends = [
            model(each(lambda a, v, s=s: a + s * v, x, velocity), torch.stack((t + s, r), 1), Y) for s in (step, -step)
        ]
    for name, leaf in found.items():
        torch.testing.assert_close(leaf, (ends[0][name] - ends[1][name]) / (2 * step), rtol=1e-6, atol=1e-8)
        assert not leaf.requires_grad


def test_what_it_cannot_train_is_refused():
    with pytest.raises(ConfigError, match=r"set model\.times=2"):
        run(small(times=1), clean())
    with pytest.raises(ConfigError, match=r"objective\.omega=1 objective\.kappa=0"):
        run(small(label_dropout=0.0), clean())
    with pytest.raises(ConfigError, match="swap them"):
        MeanFlow.Config(guidance_low=0.6, guidance_high=0.5)
    with pytest.raises(ConfigError, match=r"norm_eps=0\.1 is of a normalised error"):
        MeanFlow.Config(norm_p=0.0, norm_eps=0.1)
    with pytest.raises(ConfigError, match=r"guidance_low=0\.2 and guidance_high=1\.0 are of a guided target"):
        run(small(), clean(), omega=1.0, kappa=0.0, guidance_low=0.2)
    half = torch.full((6,), 0.5, dtype=torch.float64)
    with pytest.raises(UserError, match="give null_label="):
        mean_flow_losses(small(label_dropout=0.0), clean(), Y % 5, half, half, clean(), omega=2.0)
    with pytest.raises(UserError, match=r"r must be floats \[6\], one time for each sample"):
        mean_flow_losses(small(), clean(), Y, half, half[:, None], clean())
    with pytest.raises(UserError, match="x and noise of one shape"):
        mean_flow_losses(small(), clean(), Y, half, half, clean()[:1])
    with pytest.raises(UserError, match=r"dropped must be bool \[6\]"):
        mean_flow_losses(small(), clean(), Y, half, half, clean(), omega=2.0, dropped=Y[:1] == 0)
    with pytest.raises(UserError, match="a tree without an image"):
        mean_flow_losses(small(), {"token": half}, Y, half, half, {"token": half})
    for option, message in (
        ({"interval": (0.6, 0.5)}, r"interval=\(0\.6, 0\.5\) must be \(smallest, largest\)"),
        ({"omega": float("nan")}, "omega=nan must be a finite number"),
        ({"omega": 2.0, "kappa": float("inf")}, "kappa=inf must be a finite number"),
        ({"prediction": "x", "t_eps": 0.0}, r"t_eps=0\.0 must be a time in \(0, 1\)"),
        ({"t_eps": 0.1}, r"t_eps=0\.1 has no effect here"),
        ({"kappa": 0.5}, r"kappa=0\.5 is of a guided target, and omega is None; give omega="),
        ({"interval": (0.2, 0.7)}, r"interval=\(0\.2, 0\.7\) is of a guided target"),
        ({"t": half + 1}, r"t\[0\] = 1\.5; a time lies in \[0, 1\]"),
        ({"r": half + 0.25}, r"r\[0\] = 0\.75 lies above t\[0\] = 0\.5; swap them"),
        ({"y": Y + 6}, r"y\[0\] = .* is no label of this model"),
        ({"norm_eps": -1.0}, r"norm_eps=-1\.0 0 or more"),
    ):
        with pytest.raises(UserError, match=message):
            mean_flow_losses(small(), **{"x": clean(), "y": Y, "t": half, "r": half, "noise": clean(), **option})
    for prediction in ("velocity", "x"):
        with pytest.raises(UserError, match=r"returned torch.float64 \[6, 1, 8, 8\]; it must be like .*\[6, 2, 8, 8\]"):
            mean_flow_losses(lambda z, t, y: z[:, :1], clean(), Y, half, half, clean(), prediction=prediction)


def test_a_guided_target_of_scale_one_needs_no_null_label():
    model, half = small(label_dropout=0.0), torch.full((6,), 0.5, dtype=torch.float64)
    plain, guided = (mean_flow_losses(model, clean(), Y % 5, half, half / 2, clean(), omega) for omega in (None, 1.0))
    assert torch.equal(plain.squared_error, guided.squared_error)
