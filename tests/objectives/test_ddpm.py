"""DDPM as an objective: the hybrid loss, its steps, and what it refuses."""

import math

import pytest
import torch

from dit_fast.diffusion.ddpm import Process
from dit_fast.errors import ConfigError, UserError
from dit_fast.models import Taps
from dit_fast.objectives import DDPM, Flow, MeanFlow
from dit_fast.objectives.ddpm import ddpm_losses
from dit_fast.ops.draws import Key
from dit_fast.philox import Stream
from tests.helpers.cases import loop_over, refused
from tests.helpers.deterministic_fill import fill
from tests.helpers.tiny_sit import tiny_sit

KEY, Y = Key(7, torch.arange(6) + 3), torch.tensor([0, 5, 2, 3, 5, 1])
STEPS = torch.tensor([0, 1, 2, 350, 731, 999])


def small(**changes):
    return tiny_sit(**{"name": "DiT-S/2", "in_channels": 2, "num_classes": 5, **changes})


def clean(dtype=torch.float64):
    return torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)


def run(model, x):
    return DDPM(DDPM.Config(), model).run(model, x, Y, KEY, Taps({1}), {}, 0)


def test_values_of_the_published_code():
    """methods.md §7.4: a model that returns the same for every input."""
    x, noise = (fill(key, (3, 4, 8, 8), 4).float() for key in ("golden.x", "golden.eps"))
    output = fill("golden.out", (3, 8, 8, 8), 2).float()
    found = ddpm_losses(lambda *_: output, x, torch.zeros(3).long(), torch.tensor([0, 1, 500]), noise)
    assert found.mse.tolist() == pytest.approx([2.2703202, 1.6097680, 0.4856462], rel=1e-6)
    assert found.variational.tolist() == pytest.approx([3.3441503, 1.2008076, 0.0038628], rel=1e-4)
    assert torch.equal(found.total, found.mse + found.variational)


def test_the_variational_term_is_a_divergence_of_normals():
    """With the posterior in its usual form, over x predicted from the noise; float64, a plain function."""
    x, noise, output = clean(), clean().flip(0), torch.cat((clean(), clean().cos()), 1).flip(1)
    process, t = Process(), STEPS[1:]
    seen = []

    def network(noised, steps, y):
        seen.append(noised)
        return output[1:]

    found = ddpm_losses(network, x[1:], Y[1:], t, noise[1:])
    signal, level, betas, least, most = (
        table[t].reshape(-1, 1, 1, 1)
        for table in (process.signal, process.noise, process.betas, process.least_log, process.most_log)
    )
    (noised,), (eps, logits) = seen, output[1:].chunk(2, 1)
    before = (signal.square() / (1 - betas)).sqrt()
    weights = betas * before / level.square(), (1 - before.square()) * (1 - betas).sqrt() / level.square()
    mean, guess = (weights[0] * data + weights[1] * noised for data in (x[1:], (noised - level * eps) / signal))
    share = (logits + 1) / 2
    normals = [
        torch.distributions.Normal(at, (log / 2).exp())
        for at, log in ((mean, least), (guess, share * most + (1 - share) * least))
    ]
    expected = torch.distributions.kl_divergence(*normals).flatten(1).mean(1) / math.log(2)
    assert found.variational.dtype == torch.float64
    torch.testing.assert_close(found.variational, expected, rtol=1e-8, atol=1e-12)


def test_at_step_0_it_is_the_likelihood_of_an_interval():
    """Exact normal distribution, which the published approximation meets to 1e-3; open where |x| > 0.999."""
    x = torch.tensor([-2.0, -0.9995, -0.998, 0.0, 0.5, 0.998, 0.9995, 1.3], dtype=torch.float64).reshape(1, 1, 2, 4)
    noise, eps = torch.zeros_like(x), torch.full_like(x, 0.3)
    logits = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(1, 1, 2, 4)
    losses = ddpm_losses(lambda *_: torch.cat((eps, logits), 1), x, Y[:1], torch.zeros(1).long(), noise)
    process = Process()
    mean = x - process.noise[0] / process.signal[0] * eps
    share = (logits + 1) / 2
    normal = torch.distributions.Normal(
        mean, ((share * process.most_log[0] + (1 - share) * process.least_log[0]) / 2).exp()
    )
    upper, lower = normal.cdf(x + 1 / 255), normal.cdf(x - 1 / 255)
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    assert losses.variational.item() == pytest.approx(-inside.log2().mean().item(), rel=2e-3)


def test_the_variational_term_trains_the_variance_alone():
    output = torch.cat((clean(), clean().sin()), 1).requires_grad_()
    found = ddpm_losses(lambda *_: output, clean(), Y, STEPS, clean().flip(0))
    found.variational.sum().backward()
    assert output.grad[:, :2].abs().max() == 0
    assert output.grad[:, 2:].flatten(1).norm(dim=1).min() > 0


def test_losses_are_those_of_the_plain_function_at_keyed_steps():
    model, x = small(skip_wiring="input"), clean(torch.float32)
    context = run(model, x)
    t = (KEY.uniform(Stream.TIME, ()).double() * 1000).floor().long()
    expected = ddpm_losses(model, x, Y, t, context.noise)
    assert torch.equal(context.times, t)
    assert torch.equal(context.losses["image"], expected.total)
    logs = {"ddpm/mse": expected.mse.mean(), "ddpm/variational": expected.variational.mean()}
    torch.testing.assert_close(dict(context.logs), logs)
    assert torch.equal(context.target, context.noise)
    assert context.prediction.shape == x.shape
    torch.testing.assert_close((context.prediction - context.target).square().mean(), expected.mse.mean())
    assert list(context.features) == [1]
    context.losses["image"].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_all_steps_are_drawn_equally_often():
    key, x = Key(0, torch.arange(20000)), torch.zeros(20000, 1, 1, 1)
    objective = DDPM(DDPM.Config(), small())
    t = objective.run(lambda x, t, y, taps: torch.cat((x, x), 1), x, Y, key, Taps(), {}, 0).times
    counts = t.bincount(minlength=1000)
    assert (t.min(), t.max(), len(counts)) == (0, 999, 1000)
    assert abs(((counts - 20).square() / 20).sum() - 999) < 5 * (2 * 999) ** 0.5


def test_autocast_leaves_losses_in_float32():
    model, x = small(), clean(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        context = run(model, x)
    assert context.losses["image"].dtype == context.noised.dtype == torch.float32
    assert context.losses["image"].mean().item() == pytest.approx(run(model, x).losses["image"].mean().item(), rel=0.02)


def test_nothing_waits_for_the_device():
    """A tensor without values has none to wait for."""
    model = small().to("meta")
    given = (torch.empty(6, 2, 8, 8, device="meta"), Y.to("meta"), STEPS.to("meta"))
    assert ddpm_losses(model, *given, given[0]).total.shape == (6,)


def test_an_earlier_step_is_whole_and_not_the_first():
    context, shift = run(small(), clean(torch.float32)), torch.tensor([0.0, 0.2, 0.1999, 0.0005, 0.05, 1.0])
    objective = context.objective
    assert objective.earlier(STEPS, shift).tolist() == [1, 1, 1, 350, 681, 1]
    noised, times = context.earlier(shift)
    assert torch.equal(times, objective.earlier(context.times, shift))
    assert torch.equal(noised, context.noised_at(times))
    assert objective.unit(STEPS).tolist() == pytest.approx([0, 0.001, 0.002, 0.35, 0.731, 0.999])
    assert objective.from_unit(torch.tensor([0.0, 0.04, 0.731, 1.0])).tolist() == [0, 40, 731, 999]


@loop_over(
    ("objective", "model", "message"),
    [
        (DDPM, {"name": "SiT-S/2"}, "a variance, unlike SiT-S/2; set model=DiT-S/2"),
        (DDPM, {"times": 2}, r"set model\.times=1"),
        (DDPM, {"class_token": 3}, r"a variance for it, .* set model\.class_token=0, or objective=flow"),
        (
            Flow,
            {},
            "objective=flow trains no variance, which DiT-S/2 predicts .*; set objective=ddpm, or model=SiT-S/2",
        ),
        (MeanFlow, {"times": 2}, "objective=mean_flow trains no variance, which DiT-S/2"),
    ],
)
def test_an_objective_and_a_model_that_do_not_fit_are_refused(objective, model, message):
    with pytest.raises(ConfigError, match=message):
        objective(objective.Config(), small(**model))


@loop_over(
    ("changes", "message"),
    [
        ({"t": STEPS / 1000}, r"int64 in 0 \.\. 999"),
        ({"t": STEPS + 1}, r"int64 in 0 \.\. 999"),
        ({"t": -STEPS}, r"int64 in 0 \.\. 999"),
        ({"t": STEPS[:1]}, r"of shape \[6\]"),
        ({"y": Y[:2]}, r"y must be int64 \[6\], one for each sample"),
        ({"noise": clean()[:1]}, "x and noise must be of one shape"),
        ({"model": lambda x, t, y: x}, r"\[6, 2, 8, 8\]; it must be the noise and the logits of a variance"),
    ],
)
def test_what_the_plain_function_refuses(changes, message):
    given = {"model": lambda x, t, y: torch.cat((x, x), 1), "x": clean(), "y": Y, "t": STEPS, "noise": clean()}
    with pytest.raises(UserError, match=message):
        ddpm_losses(**{**given, **changes})
    assert "\n" not in refused(ddpm_losses, **{**given, **changes})
