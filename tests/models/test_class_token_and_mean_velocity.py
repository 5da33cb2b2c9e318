"""REG's class token and mean flow's second time in the backbone: how they begin, and derivatives in forward mode."""

import pytest
import torch
from torch.func import jvp

from dit_fast.errors import UserError
from dit_fast.models import Taps, build_model
from dit_fast.tree import each, leaves
from tests.helpers.cases import loop_over
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
@loop_over("checkpoint_blocks", [False, True])
def test_derivative_along_state_and_time(wiring, class_token, checkpoint_blocks):
    """As mean flow takes it: no gradient, features beside, r held; against central differences."""
    options = {"skip_wiring": wiring, "class_token": class_token, "checkpoint_blocks": checkpoint_blocks}
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
    if checkpoint_blocks:
        with pytest.raises(UserError, match="checkpoint_blocks recomputes no tangents"):
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
