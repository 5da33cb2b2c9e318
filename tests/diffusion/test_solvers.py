"""Solvers on fields with known solutions, their times, and what decides about guidance within a step."""

import math

import numpy as np
import pytest
import torch

from dit_fast.diffusion import SOLVERS, initial_noise, sample
from dit_fast.diffusion.conversions import Diffusion, convert, field_range
from dit_fast.diffusion.guidance import Guidance, Velocity
from dit_fast.diffusion.paths import Path
from dit_fast.errors import UserError
from tests.diffusion.test_samplers import Exact, Small, labels
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close

FORMS = Diffusion.__args__
NOISE = torch.tensor([[-1.5], [0.0], [2.0]], dtype=torch.float64)


def recorded(record):
    """A model of zero velocity that keeps its times and its number of rows."""

    def model(x, t, y):
        record.append((len(x), round(t[0].item(), 12)))
        return x * 0

    return model


@loop_over(("sampler", "order"), [("euler", 1), ("heun", 2), ("heun2", 2), ("rk4", 4)])
def test_order_of_convergence(sampler, order):
    """On data of N(0.5, 0.5^2) every path of the ODE ends at 0.5 + 0.5 noise."""
    errors = [
        (sample(Exact(), NOISE, labels(3), sampler, steps) - 0.5 - 0.5 * NOISE).norm().item() for steps in (80, 160)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_dopri5_keeps_its_tolerance_within_the_times():
    seen, exact = [], Exact()

    def slow(x, t, y):  # where nearly nothing moves, the trial before the first step is longer than all the time
        seen.append(t[0].item())
        return x * 0 + 1e-7

    for rtol in (1e-3, 1e-8):
        assert_close(sample(exact, NOISE, labels(3), "dopri5", rtol=rtol, atol=1e-9), 0.5 + 0.5 * NOISE, 20 * rtol)
    assert_close(sample(slow, NOISE, labels(3), "dopri5", time_range=(0.9, 0.2)), NOISE - 0.7e-7, 1e-12)
    assert 0.2 <= min(seen) < max(seen) <= 0.9


def test_dopri5_that_cannot_go_on_says_so():
    with pytest.raises(UserError, match=r"dopri5 cannot keep atol=1e-06, rtol=0\.001 \(underflow in dt"):
        sample(lambda x, t, y: x * float("nan"), NOISE, labels(3), "dopri5")


def test_dopri5_gives_an_image_the_same_bytes_in_any_company():
    model, index = Small(), torch.arange(6)

    def run(index, **options):
        noise = initial_noise(5, index, (2, 3, 3))
        return sample(model, noise, labels(6)[index], "dopri5", 4, 1.5, seed=5, index=index, **{"chunk": 4, **options})

    whole = run(index)
    for part in (torch.tensor([4]), torch.arange(2, 5), torch.randperm(6)):
        assert torch.equal(run(part), whole[part])
    assert torch.equal(run(index, chunk=64), whole)


def test_trees_go_through_dopri5_leaf_by_leaf():
    rates = {"image": 1.0, "class_token": -2.0}
    noise = {"image": torch.ones(2, 1, 2, 2), "class_token": torch.ones(2, 3)}
    done = sample(
        lambda x, t, y: {name: leaf * rates[name] for name, leaf in x.items()}, noise, labels(2), "dopri5",
        rtol=1e-8, atol=1e-10,
    )  # fmt: skip
    for name, rate in rates.items():
        assert_close(done[name], noise[name] * math.exp(-rate), 1e-7)


@loop_over("path", Path.NAMES)
@loop_over(("sampler", "diffusion"), [*(("sde", form) for form in FORMS), ("sde_heun", "sigma")])
def test_every_diffusion_leads_to_the_data(sampler, path, diffusion):
    """The exact velocity is affine, so one unit impulse per source of noise gives the exact standard deviation."""
    steps, solver = 300, SOLVERS[sampler]
    impulses = torch.eye(steps + 1, dtype=torch.float64)[:, :steps]  # the last row: no noise at all
    velocity = Velocity(Exact(path), labels(steps + 1), Guidance())
    times = solver.grid(steps, 0.999 if diffusion == "sbdm" else 1.0, 0.01)
    draw = lambda step: impulses[:, step + 1 : step + 2]  # noqa: E731
    *_, rows = solver(velocity, impulses[:, :1], times, Path(path), draw, diffusion=diffusion, diffusion_norm=0.5)
    assert rows[-1].item() == pytest.approx(0.5, abs=0.03)
    assert (rows[:-1] - rows[-1]).norm().item() == pytest.approx(0.5, abs=0.03)


@loop_over("how", ["mean", "euler", "tweedie", "none"])
def test_last_steps(how):
    """After one noisy step, at t = 0.25, where the velocity is 1 and the diffusion 0.25."""
    times, x = [0.5, 0.25], torch.ones(1, 1, dtype=torch.float64)
    v = lambda x, t, s: torch.ones_like(x)  # noqa: E731
    before, after = (
        list(SOLVERS["sde"](v, x, times, Path("linear"), lambda step: x * 0, last_step=last))[-1]
        for last in ("none", how)
    )
    score = convert(torch.ones_like(x), before, 0.25, "linear", "velocity", "score")
    steps = {
        "mean": before - 0.25 * (1 - 0.25 * score),
        "euler": before - 0.25,
        "tweedie": (before + 0.25**2 * score) / 0.75,
        "none": before,
    }
    assert_close(after, steps[how], 1e-12)


@loop_over("prediction", ["velocity", "score", "noise", "x"])
@loop_over("path", Path.NAMES)
def test_one_field_whatever_the_model_predicts(prediction, path):
    exact, (start, end) = Exact(path), field_range(path, "score" if prediction == "x" else prediction)

    def model(x, t, y):
        return convert(exact(x, t, y), x, t, path, "velocity", prediction)

    options = {"path": path, "num_steps": 12, "sampler": "heun2", "time_range": (start, end)}
    ours = sample(model, NOISE, labels(3), prediction=prediction, t_eps=0, **options)
    assert_close(ours, sample(exact, NOISE, labels(3), **options), 1e-9)


def test_times_are_what_was_asked_for():
    grid = [0.9, 0.5, 0.1]
    for options, times in (
        ({"times": grid}, grid[:-1]),
        ({"times": torch.tensor(grid, dtype=torch.float64)}, grid[:-1]),
        ({"times": np.array(grid)}, grid[:-1]),
        ({"num_steps": 2, "time_range": (0.9, 0.1)}, grid[:-1]),
        ({"num_steps": 2, "time_shift": 3.0}, [1.0, 0.75]),
        ({"num_steps": 2, "time_range": (0.75, 0.25), "time_shift": 3.0}, [0.75, 0.5625]),  # 0.5, 0.3, 0.1 unshifted
        ({"num_steps": 2, "prediction": "noise"}, [0.999, 0.5]),
        ({"num_steps": 2, "prediction": "noise", "path": "vp"}, [1.0, 0.5005]),
        ({"times": [1 + 1e-7, 0.5, -1e-7]}, [1.0, 0.5]),  # 1 - t of float32
    ):
        seen = []
        sample(recorded(seen), torch.zeros(1, 2), labels(1), **options)
        assert [t for _, t in seen] == pytest.approx(times, abs=1e-12)


@loop_over(
    ("options", "times"),
    [
        ({}, [1.0, 0.52, 0.04]),
        ({"num_steps": 1}, [1.0]),
        ({"last_step_size": 0.2}, [1.0, 0.6, 0.2]),
        ({"last_step": "none"}, [1.0, 0.5]),
        ({"time_range": (0.9, 0.1)}, [0.9, 0.5, 0.1]),
        ({"times": [0.9, 0.3]}, [0.9, 0.3]),
        ({"diffusion": "sbdm"}, [0.999, 0.5195, 0.04]),
        ({"diffusion": "sbdm", "path": "vp"}, [1.0, 0.52, 0.04]),
    ],
)
def test_noisy_steps_end_where_the_last_step_begins(options, times):
    seen = []
    sample(
        recorded(seen), torch.zeros(1, 2), labels(1),
        **{"sampler": "sde", "num_steps": 3, "generator": torch.Generator(), **options},
    )  # fmt: skip
    assert [t for _, t in seen] == pytest.approx(times, abs=1e-12)


def guided(sampler, times, **options):
    """Times of the guided evaluations and of the others."""
    seen = []
    sample(
        recorded(seen), torch.zeros(1, 2), labels(1), sampler, cfg_scale=2.0, null_label=0, times=times, **options
    )  # fmt: skip
    return [t for rows, t in seen if rows == 2], [t for rows, t in seen if rows == 1]


@pytest.mark.parametrize(("times", "evaluations"), [([0.2, 0.1, 0.0], 3), ([1.0, 0.0], 1), ([0.1, 0.0], 2)])
def test_heun_ends_with_euler_but_for_a_step_alone_below_the_noise(times, evaluations):
    assert sum(map(len, guided("heun", times))) == evaluations


def test_exclusive_bounds_leave_the_ends_out_but_for_pure_noise():
    quarters = [1.0, 0.75, 0.5, 0.25, 0.0]
    whole = {"guidance_bounds": "exclusive", "heun_guidance": "each"}
    assert guided("euler", quarters, guidance_low=0.25, guidance_high=0.75) == ([0.75, 0.5, 0.25], [1.0])
    assert guided("euler", quarters, guidance_low=0.25, guidance_high=0.75, **whole) == ([0.5], [1.0, 0.75, 0.25])
    assert guided("euler", quarters, guidance_low=0.25, **whole) == ([1.0, 0.75, 0.5], [0.25])
    assert guided("heun2", quarters, **whole) == ([1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25], [0.0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("low", [1 - 0.8, 0.2, 0.2 - 1e-12])
def test_exclusive_bounds_leave_an_edge_out_however_it_is_rounded(low, dtype):
    """0.8 in JiT's time: 1 - 0.8 is 0.19999999999999996. DDT's times are float32: their 0.4 is 1 - 0.599999994."""
    times = (1 - torch.linspace(0, 1, 6, dtype=dtype).double()).tolist()
    active, plain = guided("euler", times, guidance_high=0.6, guidance_bounds="exclusive")
    assert (len(active), len(plain)) == (2, 3)
    active, plain = guided("euler", times, guidance_low=low, guidance_bounds="exclusive")
    assert (len(active), len(plain)) == (4, 1)


def test_each_evaluation_or_the_first_decides():
    halves, interval = [1.0, 0.5, 0.0], {"guidance_low": 0.25, "guidance_high": 0.75}
    assert guided("heun2", halves, **interval) == ([0.5, 0.0], [1.0, 0.5])
    assert guided("heun2", halves, heun_guidance="each", **interval) == ([0.5, 0.5], [1.0, 0.0])
    assert guided("rk4", [0.75, 0.0], **interval) == ([0.75, 0.5, 0.25, 0.0], [])
    assert guided("rk4", [0.75, 0.0], heun_guidance="each", **interval) == ([0.75, 0.5, 0.25], [0.0])


def test_a_null_label_that_is_given_comes_before_the_models_own():
    class Labelled(Small):
        def forward(self, x, t, y):
            self.calls.append(y.tolist())
            return x * 0

    model = Labelled()
    sample(model, torch.zeros(1, 2, 3, 3), labels(1), num_steps=1, cfg_scale=2.0)
    sample(model, torch.zeros(1, 2, 3, 3), labels(1), num_steps=1, cfg_scale=2.0, null_label=2)
    assert model.calls == [[0, 3], [0, 2]]


def test_solvers_name_their_own_options():
    assert SOLVERS["sde"].options == SOLVERS["sde_heun"].options
    assert SOLVERS["sde"].options == {
        "diffusion": "linear", "diffusion_norm": 1.0, "last_step": "mean", "last_step_size": None,
    }  # fmt: skip
    assert SOLVERS["dopri5"].options == {"atol": 1e-6, "rtol": 1e-3}
    assert not SOLVERS["euler"].options
