"""REG's class token and mean flow's second time in the backbone: how they begin, and derivatives in forward mode."""

import pytest
import torch
from torch.func import jvp

from dit_fast.errors import UserError
from dit_fast.models import Taps, build_model, guidance_conditions
from dit_fast.tree import each, leaves
from tests.helpers.cases import loop_over, refused
from tests.helpers.golden import assert_close
from tests.helpers.tiny_sit import WIRINGS, inputs_for, tiny_sit


def test_a_new_class_token_says_zero_and_stands_first():
    """It has no position; the other tokens keep theirs."""
    sizes = {"input_size": 8, "num_classes": 10, "depth": 2}
    model, plain = build_model("SiT-S/2", **sizes, class_token=6), build_model("SiT-S/2", **sizes)
    assert model.pos_embed[:, 0].count_nonzero() == 0
    assert torch.equal(model.pos_embed[:, 1:], plain.pos_embed)
    assert (model.num_tokens, model.grid) == (plain.num_tokens, plain.grid)
    x, t, y = inputs_for(model)
    output, features = model(x, t, y, taps=[1])
    assert {leaf: value.count_nonzero() for leaf, value in output.items()} == {"image": 0, "class_token": 0}
    token = model.wg_norm(model.cls_projectors2(x["class_token"]))
    assert torch.equal(features[1][:, 0], token)  # a new block is the identity
    assert torch.equal(features[1][:, 1:], plain.pos_embed + model.x_embedder(x["image"]))


@loop_over("wiring", WIRINGS)
@loop_over("class_token", [0, 6])
@loop_over("recompute", ["none", "selective", "full"])
def test_derivative_along_state_and_time(wiring, class_token, recompute):
    """As mean flow takes it: no gradient, features beside, r held; against central differences."""
    options = {"skip_wiring": wiring, "class_token": class_token, "recompute": recompute}
    single = tiny_sit(times=2, qk_norm=True, attention="math", **options)
    results = []
    for dtype in (torch.float32, torch.float64):
        model = single.to(dtype)
        x, times, y = inputs_for(model, dtype=dtype)
        t, r = times.unbind(1)
        direction = each(lambda a: a.flip(0), x)

        def mean_velocity(x, t, model=model, r=r, y=y):
            taps = Taps([1, 3])
            return model(x, torch.stack((t, r), 1), y, taps=taps), taps.features

        with torch.no_grad():
            output, tangent, features = jvp(mean_velocity, (x, t), (direction, torch.ones_like(t)), has_aux=True)
        results.append(leaves(tangent))
        assert list(features) == [1, 3]
    if recompute != "none":
        with pytest.raises(UserError, match=f"activation_checkpointing={recompute} recomputes no tangents"):
            jvp(mean_velocity, (x, t), (direction, torch.ones_like(t)), has_aux=True)
    plain, plain_features = mean_velocity(x, t)
    for leaf, value in leaves(output).items():
        assert_close(value, leaves(plain)[leaf], 1e-12)
    assert_close(features[3], plain_features[3], 1e-12)
    step = 1e-5
    later, earlier = (mean_velocity(each(lambda a, d, s=s: a + s * d, x, direction), t + s)[0] for s in (step, -step))
    for leaf, difference in leaves(each(lambda a, b: (a - b) / (2 * step), later, earlier)).items():
        assert_close(results[1][leaf], difference, 1e-6)
        assert_close(results[0][leaf], difference, 1e-4)


def test_what_a_model_is_told_of_its_guidance_and_its_velocity_head():
    """1 - 1/omega is embedded; labels alone are omega 1 at all times; the null label leaves the rest as it is."""
    model = tiny_sit(times=2, velocity_head=True, guidance_condition=True)
    x, times, y = inputs_for(model)
    told = guidance_conditions(y, torch.tensor([1.0, 2.0, 4.0]), 0.25, 0.5)
    u, v = model(x, times, told)
    assert model.outputs == 2
    assert u.shape == v.shape == x.shape
    seen = []
    model.omega_embedder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(x, times, told)
    assert seen[0].tolist() == [0, 0.5, 0.75]
    for name in ("omega", "t_min", "t_max"):
        other = model(x, times, {**told, name: told[name] + 0.25})
        assert all((one - two).abs().amax(dim=(1, 2, 3)).min() > 0 for one, two in zip((u, v), other, strict=True))
    alone, spelt = model(x, times, y), model(x, times, guidance_conditions(y, torch.ones(3)))
    assert all(torch.equal(one, two) for one, two in zip(alone, spelt, strict=True))
    null = model.null(told)
    assert null["label"].tolist() == [model.null_label] * 3
    assert null["omega"] is told["omega"]
    assert refused(model, x, times, {"label": y, "omega": y.float()}).startswith("y must hold label, omega, t_min, t_m")
    assert "y['t_min'] must be [N], here (3,)" in refused(model, x, times, {**told, "t_min": torch.zeros(1)})
    assert refused(tiny_sit(times=2), x, times, told) == "y must hold label for this model, not " + ", ".join(told)


@loop_over(
    ("options", "message"),
    [
        ({"velocity_head": True}, "velocity_head is for improved mean flow, whose model has two times; set times=2 or"),
        ({"guidance_condition": True}, "guidance_condition is for improved mean flow"),
        ({"times": 2, "velocity_head": True, "auxiliary_depth": 2}, "both a second output; set one of them"),
    ],
)
def test_options_of_improved_mean_flow_that_do_not_fit(options, message):
    assert message in refused(tiny_sit, **options)
