"""Samples of SiT's transport code, of JiT's denoiser and of diffusion-bench's mean flow, on small networks."""

import pytest

from dit_fast.checkpoint import load_official
from dit_fast.diffusion import sample
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close, golden, golden_names
from tests.helpers.small_network import network, weights
from tests.parity.test_published_mean_flow import small_network
from tests.parity.test_published_transport import OUR_PATH

TRANSPORT = [
    (name, call)
    for name in golden_names("transport_")
    for kind in ("ode", "sde")
    for call in golden(name).meta[kind]
    if f"out/{call}" in golden(name).names
]


def published_calls(name):
    return golden(name).meta["ode"] | golden(name).meta["sde"]


def transport(name, call):
    """Options, model, start and labels of one published call."""
    reference = golden(name)
    options = published_calls(name)[call]
    prediction, path = options["prediction"], OUR_PATH[options["path"]]
    plain, sign = network(weights(reference), reference.meta["skip"][prediction]), -1 if prediction == "velocity" else 1
    chosen = {
        "path": path,
        "prediction": prediction,
        "time_range": (1 - options["t0"], 1 - options["t1"]),
    }
    if call.startswith("ode"):
        chosen |= {"sampler": options["method"], "num_steps": options["intervals"]}
        chosen |= {key: options[key] for key in ("atol", "rtol") if key in options}
    else:
        chosen |= {
            "sampler": "sde" if options["method"] == "euler" else "sde_heun",
            "num_steps": options["num_steps"],
            "diffusion": options["diffusion"].lower().replace("incc", "inc"),
            "diffusion_norm": options["norm"],
            "last_step": (options["last_step"] or "none").lower(),
            "last_step_size": options["last_step_size"],
            "draws": reference.tensor("in/sde_noise"),
        }
    model = lambda x, t, y: sign * plain(x, t, y)  # noqa: E731
    return chosen, model, reference.tensor("in/start"), reference.tensor("in/y"), reference.tensor(f"out/{call}")


@pytest.mark.parametrize("method", ["euler", "heun", "heun2", "rk4", "dopri5"])
def test_every_sampler_on_every_path_with_every_prediction(method):
    """With the published times, which are also the default."""
    cases = [(name, call) for name, call in TRANSPORT if published_calls(name)[call]["method"] == method]
    assert cases
    for name, call in cases:
        options, model, start, y, published = transport(name, call)
        tolerance = 5e-3 if call.endswith("dopri5") else 2e-6
        assert_close(sample(model, start, y, **options), published, tolerance)
        del options["time_range"]
        assert_close(sample(model, start, y, **options), published, tolerance)


def test_dopri5_stays_within_the_times_where_the_published_code_dies():
    """On vp with noise prediction its last step leads beyond the data (`ode_vp_noise_dopri5` of `crashes`)."""
    options, model, start, y, published = transport("transport_a", "ode_vp_noise_dopri5_tight")
    seen = []
    ours = sample(
        lambda x, t, y: seen.append(t[0].item()) or model(x, t, y),
        start, y, **{key: value for key, value in options.items() if key not in ("atol", "rtol")},
    )  # fmt: skip
    assert min(seen) == pytest.approx(0.001)
    assert min(seen) >= options["time_range"][1]
    assert_close(ours, published, 5e-3)


@pytest.mark.parametrize("name", golden_names("officialsit_"))
def test_the_official_sit_in_its_own_options(name):
    data = golden(name)
    start, y, scale = data.tensor("in/start"), data.tensor("in/y"), data.meta["cfg_scale"]
    model = load_official(data.group("state/"), family="sit", num_heads=data.meta["num_heads"])
    for call, draws, s in (("sde_cfg", "in/draws_cfg", scale), ("sde_plain", "in/draws_plain", 1.0)):
        options = data.meta["calls"][call]
        ours = sample(
            model, start, y, "sde", options["num_steps"], s, draws=data.tensor(draws), cfg_channels="first_three",
            diffusion=options["diffusion_form"].lower(), diffusion_norm=options["diffusion_norm"],
            last_step=options["last_step"].lower(), last_step_size=options["last_step_size"],
        )  # fmt: skip
        assert_close(ours, data.tensor(f"out/{call}"), 2e-6)
    ours = sample(model, start, y, "dopri5", cfg_scale=scale, cfg_channels="first_three")
    assert_close(ours, data.tensor("out/ode_dopri5_cfg"), 5e-3)


@loop_over("name", golden_names("xpred_"))
def test_samples_of_an_x_prediction(name):
    data = golden(name)
    meta, start, y = data.meta, data.tensor("in/start").double(), data.tensor("in/y")
    model, (low, high) = network(weights(data), meta["skip"]), meta["cfg_interval_jit"]
    options = {
        "prediction": "x", "t_eps": meta["t_eps"], "null_label": meta["num_classes"], "guidance_bounds": "exclusive",
        "heun_guidance": "each", "guidance_low": 1 - high, "guidance_high": 1 - low,
    }  # fmt: skip
    for sampler in ("euler", "heun"):
        for call, scale in (("cfg", meta["cfg_scale"]), ("plain", 1.0)):
            ours = sample(model, meta["noise_scale"] * start, y, sampler, meta["num_steps"], scale, **options)
            assert_close(ours, data.tensor(f"out/{sampler}_{call}"), 2e-6)
        for step, (before, after) in meta["steps_checked"].items():
            ours = sample(
                model, start, y, sampler, cfg_scale=meta["cfg_scale"], times=[1 - before, 1 - after], **options
            )
            assert_close(ours, data.tensor(f"out/{sampler}_step_{step}"), 2e-6)


@loop_over("name", golden_names("benchmeanflow_"))
def test_samples_of_a_mean_velocity_with_shifted_times(name):
    data = golden(name)
    state = {key: value.double() for key, value in data.group("state/").items()}
    for prediction in ("velocity", "x"):
        model = small_network(state, data.meta["skip"][prediction])
        for steps in (1, 3):
            ours = sample(
                model, data.tensor("in/start"), data.tensor("in/y"), "mean_flow", steps, prediction=prediction,
                time_shift=data.meta["sample_shift"], t_eps=data.meta["t_eps"],
            )  # fmt: skip
            assert_close(ours, data.tensor(f"out/sample_{prediction}_{steps}"), 2e-6)
