"""Velocity, score, noise and clean data turned into one another; diffusion coefficients; ranges of time."""

import math

import pytest
import torch

from dit_fast.diffusion import Path, lognormal
from dit_fast.diffusion.conversions import convert, diffusion_coefficient, field_range, train_range
from dit_fast.errors import UserError
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close

PATHS = Path.NAMES
KINDS = ("velocity", "score", "noise", "x")
T = torch.tensor([0.002, 0.37, 0.6, 0.998], dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def known(path, t=T):
    """x_t and what each prediction of it is, from data and noise."""
    x, noise = random(len(t), 3, 4, 4), random(len(t), 3, 4, 4, seed=1)
    x_t, velocity = Path(path).interpolate(x, noise, t)
    sigma = Path(path).coefficients(t[:, None, None, None]).sigma
    return x_t, {"velocity": velocity, "score": -noise / sigma, "noise": noise, "x": x}


@loop_over(("path", "source", "target"), [(p, s, t) for p in PATHS for s in KINDS for t in KINDS])
def test_every_prediction_gives_every_other(path, source, target):
    x_t, values = known(path)
    assert_close(convert(values[source], x_t, T, path, source, target), values[target], 1e-10)
    alone = [
        convert(v[None], a[None], t, path, source, target)
        for v, a, t in zip(values[source], x_t, T.tolist(), strict=True)
    ]
    assert_close(torch.cat(alone), values[target], 1e-10)


@loop_over("path", PATHS)
def test_conversions_are_finite_to_the_ends_of_the_published_ranges(path):
    for source in KINDS:
        ends = torch.tensor([field_range(path, source), train_range(path, source)], dtype=torch.float64).flatten()
        x_t, values = known(path, ends)
        # t = 0 is exact data, whose noise nobody can see; with a t_eps x has a velocity there too
        assert convert(values[source].nan_to_num(), x_t, ends, path, source, "velocity", t_eps=0.05).isfinite().all()


def test_vp_is_exact_next_to_the_data():
    """Its velocity from a score, x from a score or noise and its diffusion stay finite where sigma' does not."""
    t = torch.tensor([0.0, 1e-12], dtype=torch.float64)
    assert_close(diffusion_coefficient("sbdm", t, "vp"), torch.full((2,), 0.05, dtype=torch.float64), 1e-9)
    velocity = convert(torch.ones(2, 1), torch.full((2, 1), 3.0), t, "vp", "score", "velocity")
    assert_close(velocity, torch.full((2, 1), -0.05 * 3 - 0.05), 1e-6)
    x_t, values = known("vp", t)
    for source in ("score", "noise"):
        assert_close(
            convert(values[source].nan_to_num(posinf=0, neginf=0), x_t, t, "vp", source, "x"), values["x"], 1e-9
        )
    assert Path("vp").coefficients(t).sigma[1].item() == pytest.approx(math.sqrt(0.1e-12), rel=1e-9)
    assert Path("vp").coefficients(0.0)[:2] == (1, 0)


def test_x_within_t_eps_is_divided_by_it():
    x_t, x, t = random(3, 2, 2, 2), random(3, 2, 2, 2, seed=1), torch.tensor([0.0, 0.01, 0.2])
    velocity = convert(x, x_t, t, source="x", target="velocity", t_eps=0.05)
    assert_close(velocity, (x_t - x) / torch.tensor([0.05, 0.05, 0.2])[:, None, None, None], 1e-6)
    assert_close(convert(velocity, x_t, t, source="velocity", target="x", t_eps=0.05), x, 1e-6)


@loop_over("t_dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_values(t_dtype):
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        value = torch.ones(2, 3, dtype=dtype)
        found = convert(value, value, torch.full((2,), 0.3, dtype=t_dtype), "cosine", "score", "velocity")
        assert found.dtype == expected
        assert diffusion_coefficient("sigma", torch.ones(2, dtype=t_dtype)).dtype == t_dtype


@loop_over("path", PATHS)
def test_diffusion_of_the_forward_process_keeps_the_marginals(path):
    """w_sbdm is what makes v - w score the drift of the noising process, alpha'/alpha x."""
    x_t, values = known(path)
    w = diffusion_coefficient("sbdm", T, path, norm=1.0)[:, None, None, None]
    c = Path(path).coefficients(T[:, None, None, None])
    assert_close(values["velocity"] + w * values["score"], c.d_alpha / c.alpha * x_t, 1e-10)
    assert diffusion_coefficient("sbdm", 0.37, path).item() == pytest.approx(w[1].item(), rel=1e-12)


def test_published_ranges_in_our_time():
    assert field_range("linear", "velocity") == train_range("cosine", "velocity") == (1, 0)
    assert field_range("cosine", "score") == train_range("linear", "noise") == (0.999, 0.001)
    assert (field_range("vp", "velocity"), train_range("vp", "score")) == ((1, 0.001), (1, 1e-5))
    assert field_range("vp", "x") == train_range("linear", "x") == (1, 0)


ONE, TIME = torch.ones(2, 3), torch.ones(2)


@loop_over(
    ("call", "message"),
    [
        (lambda: convert(ONE, ONE, TIME, source="eps"), "source 'eps'.*velocity, score, noise, x"),
        (lambda: convert(ONE, ONE, TIME, target="x0"), "target 'x0'"),
        (lambda: convert(ONE, ONE[:1], TIME, source="score"), r"\[1, 3\]"),
        (lambda: convert(ONE, ONE, torch.ones(3), source="score"), r"\[3\]"),
        (lambda: convert(ONE, ONE, TIME, "gvp"), "path 'gvp'"),
        (lambda: diffusion_coefficient("inccreasing-decreasing", TIME), "diffusion 'incc.*increasing-decreasing"),
        (lambda: field_range("vp", "v"), "prediction 'v'"),
        (lambda: lognormal("vp"), "lognormal.*'vp'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
