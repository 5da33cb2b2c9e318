"""A second output: a head of its own on an earlier block, which all that knows one output leaves aside."""

import pytest
import torch

from dit_fast.diffusion import flow_loss, sample
from dit_fast.diffusion.guidance import shapes_of
from dit_fast.methods.self_transcendence import guided_features
from dit_fast.methods.sra import sra_loss
from dit_fast.models import Taps, split
from dit_fast.nn.projector import SelfProjector
from dit_fast.objectives import DDPM, Flow
from dit_fast.objectives.ddpm import ddpm_losses
from dit_fast.objectives.flow import flow_losses
from dit_fast.objectives.mean_flow import mean_flow_losses
from dit_fast.objectives.x_prediction import x_prediction_losses
from dit_fast.ops.draws import Key
from dit_fast.tree import leaves
from tests.helpers.cases import loop_over, refused
from tests.helpers.tiny_sit import inputs_for, tiny_sit

DEPTH = 2


def pair(**changes):
    """A model with a second output, and the same without."""
    model, plain = tiny_sit(auxiliary_depth=DEPTH, **changes), tiny_sit(**changes)
    plain.load_state_dict(model.state_dict(), strict=False)
    return model, plain


def equal(a, b):
    return all(torch.equal(leaf, leaves(b)[name]) for name, leaf in leaves(a).items())


@loop_over("wiring", ["off", "output", "input"])
@loop_over("class_token", [0, 6])
def test_the_first_output_is_that_of_the_model_without_it(wiring, class_token):
    model, plain = pair(skip_wiring=wiring, class_token=class_token)
    x, t, y = inputs_for(model)
    first, second = model(x, t, y)
    (again, other), features = model(x, t, y, taps=[DEPTH - 1])
    assert (model.outputs, plain.outputs) == (2, 1)
    assert equal(first, plain(x, t, y))
    assert equal(first, again)
    assert equal(second, other)
    assert shapes_of(second) == shapes_of(x)
    head = model.final_layer_xr
    c = model.t_embedder(t) + model.y_embedder(y)
    tokens = head(features[DEPTH - 1], c)
    tokens = tokens["image"] if class_token else tokens
    torch.testing.assert_close(leaves(second)["image"], model._unpatchify(tokens))
    assert split(plain(x, t, y))[1] is None


def test_it_is_not_computed_where_the_forward_ends_early():
    model = tiny_sit(auxiliary_depth=DEPTH, recompute="full")
    given = inputs_for(model)
    _, features = model(*given, taps=[DEPTH - 1])
    teacher = model.trunk(DEPTH - 1)
    assert not [name for name, _ in teacher.named_parameters() if "final" in name]
    model.final_layer_xr.forward = None
    taps = Taps({DEPTH - 1})
    assert model(*given, taps, DEPTH - 1) is None
    assert torch.equal(taps.features[DEPTH - 1], features[DEPTH - 1])
    torch.testing.assert_close(guided_features(teacher, *given, DEPTH - 1, 1.0), features[DEPTH - 1])


@pytest.mark.parametrize("changes", [{}, {"name": "DiT-S/2"}, {"class_token": 6}])
def test_an_objective_gives_it_to_the_methods(changes):
    model, plain = pair(**changes)
    objective = DDPM if model.learns_variance else Flow
    x, _, y = inputs_for(model)
    key = Key(1, torch.arange(len(y)))
    contexts = [objective(objective.Config(), it).run(it, x, y, key, Taps(), {}, 0) for it in (model, plain)]
    (found, bare) = contexts
    assert equal(found.prediction, bare.prediction)
    assert equal(found.losses, bare.losses)
    assert shapes_of(found.second) == shapes_of(x)
    assert equal(found.second, model(found.noised, found.times, y)[1])
    assert bare.second is None


def test_plain_losses_and_samplers_take_the_first():
    model, plain = pair()
    x, t, y = inputs_for(model)
    noise = torch.ones_like(x)
    for call in (
        flow_losses,
        lambda *given: x_prediction_losses(*given).loss,
        lambda m, *g: flow_loss(m, g[0], *g[1:]),
    ):
        assert torch.equal(call(model, x, y, t, noise), call(plain, x, y, t, noise))
    assert torch.equal(
        sample(model, noise, y, num_steps=2, cfg_scale=2), sample(plain, noise, y, num_steps=2, cfg_scale=2)
    )
    for it in (model, plain):
        it.add_head("ap_head", SelfProjector(32))
    plain.ap_head.load_state_dict(model.ap_head.state_dict())
    found, bare = (sra_loss(it, it.trunk(2), x, y, t, noise, t / 2, 1, 3) for it in (model, plain))
    assert equal(found._asdict(), bare._asdict())
    means, mean = pair(times=2)
    found, bare = (mean_flow_losses(it, x, y, t, t / 2, noise, 1.0, 0.5) for it in (means, mean))
    assert equal(found._asdict(), bare._asdict())
    steps, step = pair(name="DiT-S/2")
    found, bare = (ddpm_losses(it, x, y, (1000 * t).long(), noise) for it in (steps, step))
    assert equal(found._asdict(), bare._asdict())
    assert torch.equal(*(sample(it, noise, y, "ddim", 2) for it in (steps, step)))


def test_a_block_that_is_not_there_is_refused():
    assert "auxiliary_depth=5 is not one of the blocks 1..4" in refused(tiny_sit, auxiliary_depth=5)
    assert "auxiliary_depth must be at least 0" in refused(tiny_sit, auxiliary_depth=-1)
