"""Samplers and losses against the official code: golden files, and the deterministic fill of methods.md §7.2."""

import pytest
import torch

from dit_fast.checkpoint import load_official
from dit_fast.diffusion import Guidance, flow_loss, sample
from dit_fast.errors import UserError
from dit_fast.methods.repa import repa_loss
from tests.helpers.cases import loop_over
from tests.helpers.deterministic_fill import fill, tiny_model
from tests.helpers.golden import assert_close, golden, golden_names


@pytest.mark.parametrize("name", golden_names("samplers_"))
def test_published_samples(name):
    data = golden(name)
    meta, noise, y = data.meta, data.tensor("in/noise"), data.tensor("in/y")
    model = load_official(data.group("state/"), family="repa", num_heads=meta["num_heads"])
    for call, options in meta["calls"].items():
        options = dict(options)
        heun = options.pop("heun", False)
        sampler = "sde" if call.startswith("sde") else "heun" if heun else "euler"
        path = options.pop("path_type", meta.get("path_type", "linear"))
        generator = torch.Generator().manual_seed(meta["noise_seed"])
        ours = sample(model, noise, y, sampler, path=path, generator=generator, **options)
        assert_close(ours, data.tensor(f"out64/{call}"), 1e-6)


@pytest.mark.parametrize("name", golden_names("meanflow_"))
def test_published_samples_of_a_mean_velocity(name):
    data = golden(name)
    state = {key: value.double() for key, value in data.group("state/").items()}
    model = load_official(state, family="mean_flow", num_heads=data.meta["num_heads"])
    for call, steps in (("one_step", 1), ("two_step", 2)):
        ours = sample(model, data.tensor("in/noise").double(), data.tensor("in/y"), "mean_flow", steps)
        assert_close(ours, data.tensor(f"out/{call}"), 1e-6)
    with pytest.raises(UserError, match="'euler' does not fit a model with 2 times; use mean_flow"):
        sample(model, data.tensor("in/noise"), data.tensor("in/y"))


@loop_over("name", golden_names("officialsit_"))
def test_samples_of_the_official_sit(name):
    """Three of four channels are guided by default; n points of its Euler grid are n - 1 steps."""
    data = golden(name)
    meta, start, y = data.meta, data.tensor("in/start"), data.tensor("in/y")
    model = load_official(data.group("state/"), family="sit", num_heads=meta["num_heads"])
    assert model.cfg_channels == "first_three"
    x, t, scale = data.tensor("in/x"), 1 - data.tensor("in/t_sit"), meta["cfg_scale"]
    with torch.no_grad():
        label, null = model(x, t, y), model(x, t, torch.full_like(y, model.null_label))
    assert_close(-Guidance(scale, channels="first_three").combine(label, null), data.tensor("out/cfg_field"), 1e-5)
    steps = {call: options["num_steps"] for call, options in meta["calls"].items()}
    ours = sample(model, start, y, "euler", steps["ode_euler_cfg"] - 1, scale)
    assert_close(ours, data.tensor("out/ode_euler_cfg"), 1e-5)
    for call, draws, s in (("sde_cfg", "in/draws_cfg", scale), ("sde_plain", "in/draws_plain", 1.0)):
        ours = sample(model, start, y, "sde", steps[call], s, draws=data.tensor(draws))
        assert_close(ours, data.tensor(f"out/{call}"), 1e-5)


SHAPE = (2, 4, 8, 8)
ROWS = {
    "off": {
        "linear": (3.9892033942, 4.0429902065),
        "cosine": (4.6276221623, 4.0953393204),
        "euler": (15.3108062671, 27.0602538537),
        "euler_cfg": (15.5349486633, 27.0965643048),
        "heun_cfg": (15.6927066342, 27.0991831489),
        "sde_cfg": (15.7616724858, 21.7630093553),
    },
    "input": {
        "linear": (3.9556015719, 4.0293475956),
        "cosine": (4.5771527605, 4.0649200223),
        "euler": (-0.7156233444, 26.9775632881),
        "euler_cfg": (-0.0065139134, 26.9566571081),
        "heun_cfg": (0.0306470162, 26.9557724318),
        "sde_cfg": (-1.2378569214, 21.5856964966),
    },
    "output": {
        "linear": (3.9534467543, 4.0247780200),
        "cosine": (4.5747810046, 4.0599737111),
        "euler": (-0.7876656911, 26.9606902149),
        "euler_cfg": (-0.3069680610, 26.9518497840),
        "heun_cfg": (-0.2786732411, 26.9502032904),
        "sde_cfg": (-1.6530453201, 21.5685219899),
    },
}


@loop_over("wiring", list(ROWS))
def test_loss_rows_of_the_deterministic_fill(wiring):
    model, x, noise = tiny_model(wiring), fill("golden.x", SHAPE, 4), fill("golden.eps", SHAPE, 4)
    t, y = torch.tensor([0.3, 0.85], dtype=torch.float64), torch.tensor([7, 1000])
    for path in ("linear", "cosine"):
        assert flow_loss(model, x, y, t, noise, path).tolist() == pytest.approx(ROWS[wiring][path], rel=1e-6)


@pytest.mark.parametrize("call", ["euler", "euler_cfg", "heun_cfg", "sde_cfg"])
@pytest.mark.parametrize("wiring", list(ROWS))
def test_sampler_rows_of_the_deterministic_fill(wiring, call, monkeypatch):
    draws = (fill(f"golden.noise.{k}", SHAPE, 12**0.5) for k in range(9))
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(draws))
    sampler, _, guided = call.partition("_")
    options = {"cfg_scale": 1.8, "guidance_high": 0.7} if guided else {}
    ours = sample(
        tiny_model(wiring), fill("golden.eps", SHAPE, 4), torch.tensor([7, 3]), sampler, 10,
        generator=torch.Generator(), **options,
    )  # fmt: skip
    total, norm = ROWS[wiring][call]
    # The rows' common error is that of the fp32 time frequencies, relative to the whole sample.
    assert ours.sum().item() == pytest.approx(total, abs=1e-6 * norm)
    assert ours.norm().item() == pytest.approx(norm, rel=1e-6)


def test_alignment_of_the_deterministic_fill():
    p, q = fill("golden.p", (2, 4, 8), 4), fill("golden.q", (2, 4, 8), 4)
    assert repa_loss(p, q).item() == pytest.approx(-0.6498071017, abs=1e-10)
