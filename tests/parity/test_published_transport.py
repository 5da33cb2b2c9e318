"""Losses, drifts, scores and diffusion of SiT's transport code, and the x prediction of JiT, on a small network."""

from dit_fast.diffusion import Path
from dit_fast.diffusion.conversions import convert, diffusion_coefficient
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close, golden, golden_names
from tests.helpers.small_network import network, weights

OUR_PATH = {"linear": "linear", "gvp": "cosine", "vp": "vp"}
TRANSPORT = [(name, path) for name in golden_names("transport_") for path in OUR_PATH]


def given(name):
    """Golden file, its inputs in float64, and t in our direction."""
    reference = golden(name)
    inputs = {key: reference.tensor(f"in/{key}").double() for key in ("x", "noise", "t_sit")}
    return reference, inputs["x"], inputs["noise"], 1 - inputs["t_sit"], reference.tensor("in/y")


@loop_over(("name", "path"), TRANSPORT)
def test_drifts_scores_and_conversions(name, path):
    reference, x, noise, t, y = given(name)
    x_t, v = Path(OUR_PATH[path]).interpolate(x, noise, t)
    assert_close(x_t, reference.tensor(f"out/xt_{path}"), 1e-6)
    assert_close(-v, reference.tensor(f"out/ut_{path}"), 1e-6)

    def converted(value, source, target):
        return convert(value, x_t, t, path=OUR_PATH[path], source=source, target=target)

    for prediction in ("velocity", "score", "noise"):
        output = network(weights(reference), reference.meta["skip"][prediction])(x_t, t, y).detach()
        output = -output if prediction == "velocity" else output
        assert_close(
            -converted(output, prediction, "velocity"), reference.tensor(f"out/drift_{path}_{prediction}"), 1e-6
        )
        assert_close(converted(output, prediction, "score"), reference.tensor(f"out/score_{path}_{prediction}"), 1e-6)
    output = network(weights(reference), reference.meta["skip"]["velocity"])(x_t, t, y).detach()
    ours = converted(-output, "velocity", "noise")
    assert_close(ours, reference.tensor(f"out/noise_from_velocity_{path}"), 1e-6)
    ours = -converted(output, "score", "velocity")
    assert_close(ours, reference.tensor(f"out/velocity_from_score_{path}"), 1e-6)


@loop_over(("name", "path"), TRANSPORT)
def test_diffusion_coefficients(name, path):
    reference, *_, t, _ = given(name)
    for form in ("constant", "sbdm", "sigma", "linear", "decreasing", "inccreasing-decreasing"):
        ours = diffusion_coefficient(form.replace("incc", "inc"), t, path=OUR_PATH[path], norm=0.7)
        assert_close(ours, reference.tensor(f"out/diffusion_{path}_{form}"), 1e-6)
