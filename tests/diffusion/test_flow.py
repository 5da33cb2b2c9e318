"""Paths, training times and the flow objective."""

import math

import pytest
import torch

from dit_fast.diffusion import Path, flow_loss, logit_normal, lognormal, time_sampler, uniform, velocity_error
from dit_fast.diffusion.times import dimension_shift, shift_times
from dit_fast.errors import UserError
from dit_fast.ops.draws import Key
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Three:
    """Of three labels and a null label."""

    num_classes, null_label = 3, 3

    def __call__(self, x, t, y):
        return 0.3 * x


class Predicts(Three):
    prediction = "x"


@loop_over("name", ["linear", "cosine", "vp"])
def test_velocity_is_the_derivative_of_the_path(name):
    path, x, noise = Path(name), random(3, 4, 5, 5), random(3, 4, 5, 5, seed=1)
    t = torch.tensor([0.2 if name == "vp" else 0.0, 0.37, 1.0], dtype=torch.float64)  # vp: infinite at 0
    step = 1e-6
    after, before = path.interpolate(x, noise, t + step)[0], path.interpolate(x, noise, t - step)[0]
    x_t, v = path.interpolate(x, noise, t)
    assert_close(v, (after - before) / (2 * step), 1e-9)
    if name != "vp":
        assert_close(x_t[0], x[0], 1e-15)
        assert_close(x_t[2], noise[2], 1e-15)


@loop_over("name", ["linear", "cosine", "vp"])
def test_coefficients_of_floats_and_tensors_agree(name):
    for t in (0.0, 0.3, 1.0):
        tensors = Path(name).coefficients(torch.tensor([t], dtype=torch.float64))
        assert [float(value) for value in tensors] == pytest.approx(Path(name).coefficients(t), abs=1e-15)


def test_known_values_of_the_cosine_path():
    alpha, sigma, d_alpha, d_sigma = Path("cosine").coefficients(0.5)
    half = math.sqrt(0.5)
    assert (alpha, sigma, d_alpha, d_sigma) == pytest.approx((half, half, -math.pi / 2 * half, math.pi / 2 * half))


@loop_over(
    ("call", "message"),
    [
        (lambda: Path("gvp"), "path 'gvp'.*linear, cosine"),
        (lambda: Path("linear").interpolate(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2)), r"\[2, 3\]"),
        (lambda: Path("linear").interpolate(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)), r"\[3\]"),
        (lambda: logit_normal(0.0, 0.0), "std=0.0"),
        (lambda: time_sampler("beta"), "'beta'.*uniform, lognormal, logit_normal"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_time_formulas():
    z = torch.tensor([-1.3, 0.0, 0.8])
    s = z.exp()
    assert_close(lognormal("linear").transform(z), s / (1 + s), 1e-6)
    assert_close(lognormal("cosine").transform(z), 2 / math.pi * torch.atan(s), 1e-6)
    assert_close(logit_normal(-0.4, 1.5).transform(z), 1 / (1 + torch.exp(0.4 - 1.5 * z)), 1e-6)
    assert torch.equal(uniform().transform(z), z)


@pytest.mark.parametrize("name", ["uniform", "lognormal", "logit_normal"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_generator_and_keyed_draws_share_a_distribution(name, path):
    times = time_sampler(name, path, mean=-0.4, std=0.8)
    drawn = times.sample(20_000, torch.Generator().manual_seed(3))
    keyed = times.keyed(Key(3, torch.arange(20_000)))
    for t in (drawn, keyed):
        assert t.dtype == torch.float32
        assert t.min() >= 0
        assert t.max() < 1
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(drawn.quantile(quantiles), keyed.quantile(quantiles), atol=0.015, rtol=0)


def test_draws_repeat_by_generator_and_by_position():
    times = lognormal("cosine")
    first = times.sample(5, torch.Generator().manual_seed(1))
    assert torch.equal(first, times.sample(5, torch.Generator().manual_seed(1)))
    whole = times.keyed(Key(7, torch.arange(10)))
    assert torch.equal(times.keyed(Key(7, torch.tensor([8, 2]))), whole[[8, 2]])
    assert not torch.equal(times.keyed(Key(8, torch.arange(10))), whole)


@loop_over("path", ["linear", "cosine"])
def test_loss_is_the_mean_squared_error_per_sample(path):
    x, noise, t, y = (
        random(3, 2, 4, 4),
        random(3, 2, 4, 4, seed=1),
        torch.tensor([0.1, 0.5, 0.9]).double(),
        torch.arange(3),
    )
    seen = {}

    def model(x_t, times, labels):
        seen.update(x_t=x_t, t=times, y=labels)
        return 0.3 * x_t

    loss = flow_loss(model, x, y, t, noise, path)
    x_t, v = Path(path).interpolate(x, noise, t)
    assert torch.equal(seen["x_t"], x_t)
    assert torch.equal(seen["t"], t)
    assert torch.equal(seen["y"], y)
    assert_close(loss, ((0.3 * x_t - v) ** 2).mean((1, 2, 3)), 1e-12)


def test_a_prediction_of_another_shape_is_not_broadcast():
    x, y = random(3, 2, 4, 4), torch.arange(3)
    with pytest.raises(UserError, match=r"returned \[3, 1, 4, 4\]; it must be like its target \[3, 2, 4, 4\]"):
        flow_loss(lambda x_t, t, y: x_t[:, :1], x, y)


@loop_over(
    ("change", "message"),
    [
        ({"y": torch.tensor([0, 9, 4])}, r"y\[1\] = 9 is no label of this model; its labels are 0\.\.2"),
        ({"y": torch.arange(2)}, r"y must be int64 \[3\], one for each sample, not torch.int64 \[2\]"),
        ({"y": [0, 1, 2]}, r"y must be int64 \[3\], one for each sample, not a list"),
        ({"t": torch.tensor([0.0, 1.0, float("nan")])}, r"t\[2\] = nan; a time lies in \[0, 1\]"),
        ({"model": Predicts()}, "this Predicts predicts 'x', not 'velocity'; give prediction='x'"),
    ],
)
def test_what_the_plain_function_refuses(change, message):
    given = {"model": Three(), "x": random(3, 2, 4, 4), "y": torch.tensor([0, 2, 3]), "t": None, **change}
    with pytest.raises(UserError, match=message):
        flow_loss(**given)


def test_labels_are_looked_at_on_a_cpu_alone_and_not_where_they_are_traced():
    """A look at those of a device would wait for it; 3 is the null label."""
    x, t = random(3, 2, 4, 4), torch.ones(3)
    assert flow_loss(Three(), x, torch.tensor([0, 2, 3]), t).shape == (3,)
    assert flow_loss(Three(), x.to("meta"), torch.tensor([0, 9, 4], device="meta"), t.to("meta")).shape == (3,)
    traced = torch.compile(lambda y: flow_loss(Three(), x, y, t, x), fullgraph=True, backend="eager")
    assert traced(torch.tensor([0, 9, 4])).shape == (3,)


def test_loss_draws_time_and_noise_from_the_generator():
    x, y = random(4, 2, 3, 3, dtype=torch.float32), torch.zeros(4, dtype=torch.int64)
    losses = [
        flow_loss(lambda x_t, t, y: x_t * 0, x, y, generator=torch.Generator().manual_seed(s), times=lognormal())
        for s in (1, 1, 2)
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_error_of_half_precision_predictions_is_fp32():
    prediction, target = random(2, 3, dtype=torch.float32).bfloat16(), random(2, 3, seed=1, dtype=torch.float32)
    error = velocity_error(prediction, target)
    assert error.dtype == torch.float32
    assert_close(error, (prediction.float() - target).square().mean(1), 1e-7)


def test_the_shift_by_dimension_is_that_of_4096_numbers_in_our_direction():
    """sqrt(768 16 16 / 4096); t goes towards the noise, as the equation of RAE has it with t = 1 for noise."""
    assert dimension_shift((4, 32, 32)) == 1
    assert dimension_shift((768, 16, 16)) == pytest.approx(48**0.5)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    expected = 48**0.5 * t / (1 + (48**0.5 - 1) * t)
    assert_close(shift_times(t, dimension_shift((768, 16, 16))), expected, 1e-12)
