"""Tables of the process, over all steps and over some, and the two samplers on fields that are known."""

from itertools import accumulate

import pytest
import torch

from dit_fast.diffusion import Guidance, sample
from dit_fast.diffusion.ddpm import Noise, Process, log_variance, spaced_steps, tables
from dit_fast.errors import UserError
from tests.helpers.cases import loop_over
from tests.helpers.tiny_sit import tiny_sit


def test_tables_are_the_published_ones():
    """Values of methods.md §7.4."""
    whole, some = Process(), Process(spaced_steps(250))
    assert whole.signal[[0, 1, 500, 999]].tolist() == pytest.approx([0.99995, 0.99989004, 0.27892052, 0.00635282], 1e-6)
    assert whole.least_log[:2].tolist() == pytest.approx([-9.81672514] * 2)
    assert whole.betas.tolist() == pytest.approx(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist())
    assert some.steps[:6] == (0, 4, 8, 12, 16, 20)
    assert some.steps[-4:] == (987, 991, 995, 999)
    assert some.betas[[0, 1, 249]].tolist() == pytest.approx([1e-4, 5.99065564e-4, 0.0775193450], 1e-8)
    assert spaced_steps(1000) == list(range(999, -1, -1))
    assert spaced_steps(2) == [999, 0]


def test_halfway_steps_round_as_in_the_published_code():
    """Which adds 999/20 ten times and comes to just below or above 499.5."""
    *_, place = accumulate([999 / 20] * 10)  # `sum` of Python 3.12 rounds once
    assert spaced_steps(21)[10] == round(place)
    assert spaced_steps(3) == [999, 500, 0]


@loop_over("count", [1, 0, 1001])
def test_counts_of_steps_are_refused(count):
    with pytest.raises(UserError, match="from 2 to 1000"):
        spaced_steps(count)


@loop_over("steps", [range(1000), spaced_steps(7)])
def test_bounds_and_mean_are_those_of_the_posterior(steps):
    """q(x_(k-1) | x_k, x) by Bayes' rule in its usual form, and the mean with the predicted noise put in for x."""
    process = Process(steps)
    kept = process.signal.square()
    before = torch.cat((kept.new_ones(1), kept[:-1]))
    alpha = kept / before
    x, eps = torch.randn(2, len(steps), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noised = process.signal * x + process.noise * eps
    usual = process.betas * before.sqrt() / (1 - kept) * x + (1 - before) * alpha.sqrt() / (1 - kept) * noised
    torch.testing.assert_close((noised - process.betas / process.noise * eps) / (1 - process.betas).sqrt(), usual)
    least = (process.betas * (1 - before) / (1 - kept))[1:].log()
    torch.testing.assert_close(process.least_log, torch.cat((least[:1], least)))
    ends = log_variance(torch.tensor([-1.0, 1.0]).double()[:, None], process.least_log, process.most_log)
    torch.testing.assert_close(ends, torch.stack((process.least_log, process.most_log)))


def test_tables_first_read_without_gradients_serve_those_that_need_them():
    tables.cache_clear()
    with torch.inference_mode():
        tables(torch.device("cpu"))
    (tables(torch.device("cpu")) * torch.ones(1, requires_grad=True)).sum().backward()


Y, WHOLE = torch.tensor([0, 3]), Process()


def noise():
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def points(x, t, y):
    """What a perfect model says where every class is one point, y / 2; its variance is the least one."""
    signal, level = (table[t].reshape(-1, 1, 1, 1) for table in (WHOLE.signal, WHOLE.noise))
    eps = (x - signal * (y / 2).reshape(-1, 1, 1, 1)) / level
    return torch.cat((eps, torch.full_like(eps, -1)), 1)


@loop_over("sampler", ["ddpm", "ddim"])
@loop_over("num_steps", [2, 3, 7, 100])
def test_data_of_one_point_are_found_from_any_noise(sampler, num_steps):
    generator = torch.Generator().manual_seed(2)
    found = sample(points, noise(), Y, sampler, num_steps, generator=generator if sampler == "ddpm" else None)
    torch.testing.assert_close(found, (Y / 2).double().reshape(-1, 1, 1, 1).expand_as(found), rtol=0, atol=1e-9)


def test_ancestral_steps_have_the_posterior_of_a_normal():
    """Data N(0, 1): x stays so at every step, if the variance is that of q(x_(k-1) | x_k), beta."""

    def network(x, t, y):
        eps = WHOLE.noise[t].reshape(-1, 1, 1, 1) * x
        return torch.cat((eps, torch.ones_like(eps)), 1)

    start = torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = sample(network, start, Y[:1], "ddpm", 1000, generator=torch.Generator().manual_seed(2))
    assert found.std().item() == pytest.approx(1, abs=0.03)
    assert found.mean().item() == pytest.approx(0, abs=0.03)


def test_every_step_but_the_last_adds_a_float32_normal():
    given = {"model": points, "noise": noise(), "y": Y, "sampler": "ddpm", "num_steps": 4}
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(2, 4, 3, 3, generator=generator) for _ in range(3)]
    one = sample(**given, generator=torch.Generator().manual_seed(3))
    assert torch.equal(one, sample(**given, draws=drawn))
    with pytest.raises(UserError, match="draws must be 3 tensors"):
        sample(**given, draws=[*drawn, drawn[0]])
    with pytest.raises(UserError, match="sampler 'ddpm' draws noise"):
        sample(**given)


@loop_over("channels", ["all", "first_three"])
def test_guidance_is_that_of_the_noise_alone(channels):
    def network(x, t, y):
        return torch.cat((x, 2 * x), 1) * y.reshape(-1, 1, 1, 1)

    x, y, guidance = noise(), torch.tensor([1, 2]), Guidance(3.0, 0.2, 0.5, channels)
    field, guided = Noise(network, y, guidance, null_label=5), 3 if channels == "first_three" else 4
    labels = y.reshape(-1, 1, 1, 1)
    expected = torch.cat(((5 + 3 * (labels - 5)) * x[:, :guided], labels * x[:, guided:], 2 * labels * x), 1)
    torch.testing.assert_close(field(x, 500, 400), expected)
    torch.testing.assert_close(field(x, 200, 150), expected)
    for step in (501, 199):
        torch.testing.assert_close(field(x, step, 100), torch.cat((x, 2 * x), 1) * labels)


def test_a_keyed_image_is_the_same_in_any_batch():
    model = tiny_sit(name="DiT-S/2")
    start, y = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
    index = torch.tensor([5, 0, 2])
    given = {"sampler": "ddpm", "num_steps": 3, "seed": 4, "chunk": 2, "cfg_scale": 2.0}
    together = sample(model, start, y, index=index, **given)
    assert together.dtype == torch.float64
    for row in range(3):
        alone = sample(model, start[row : row + 1], y[row : row + 1], index=index[row : row + 1], **given)
        assert torch.equal(alone[0], together[row])


@loop_over(
    ("changes", "message"),
    [
        ({"sampler": "euler"}, "sampler 'euler' does not fit a model that learns a variance; use ddpm, ddim"),
        ({"model": tiny_sit()}, "sampler 'ddim' does not fit a model with 1 time; use euler"),
        ({"num_steps": 1}, "num_steps=1 must lie from 2 to 1000"),
        ({"num_steps": 1001}, "num_steps=1001 must lie from 2 to 1000"),
        ({"times": [0.9, 0.0]}, "sampler 'ddim' takes num_steps of the 1000 whole steps; drop times="),
        ({"time_shift": 2.0}, "drop time_shift="),
        ({"path": "cosine"}, "sampler 'ddim' has DDPM's own steps, not the cosine path; drop path="),
        ({"prediction": "x"}, "for a model that predicts noise, not 'x'; drop prediction="),
        ({"last_step": "mean"}, "sampler 'ddim' takes no last_step; drop it$"),
        ({"model": lambda x, t, y: x}, r"it must be the noise and the logits of a variance"),
        ({"model": points, "cfg_scale": 2.0}, "give null_label="),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    given = {"model": tiny_sit(name="DiT-S/2"), "noise": torch.zeros(2, 3, 8, 8), "y": Y, "sampler": "ddim"}
    with pytest.raises(UserError, match=message):
        sample(**{**given, **changes})
