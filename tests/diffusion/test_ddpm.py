"""Tables of the process, over all steps and over some."""

import pytest
import torch

from dit_fast.diffusion.ddpm import Process, log_variance, spaced_steps, tables
from dit_fast.errors import UserError
from tests.helpers.cases import loop_over


def test_tables_are_the_published_ones():
    """Values of methods.md §7.4."""
    whole, some = Process(), Process(spaced_steps(250))
    assert whole.signal[[0, 1, 500, 999]].tolist() == pytest.approx([0.99995, 0.99989004, 0.27892052, 0.00635282], 1e-6)
    assert whole.least_log[:2].tolist() == pytest.approx([-9.81672514] * 2)
    assert whole.betas.tolist() == pytest.approx(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist())
    assert some.steps[:6] == (0, 4, 8, 12, 16, 20)
    assert some.steps[-4:] == (987, 991, 995, 999)
    assert some.betas[[0, 1, 249]].tolist() == pytest.approx([1e-4, 5.99065564e-4, 0.0775193450], 1e-8)
    assert spaced_steps(1000) == list(range(1000))
    assert spaced_steps(2) == [0, 999]


def test_halfway_steps_round_as_in_the_published_code():
    """Which adds 999/20 ten times and comes to just below or above 499.5."""
    place = sum([999 / 20] * 10)
    assert spaced_steps(21)[10] == round(place)
    assert spaced_steps(3) == [0, 500, 999]


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
