"""SRA 2: the distance to the clean latent, and its method."""

import pytest
import torch
from torch import nn

from dit_fast.methods import build_methods
from dit_fast.methods.sra2 import SRA2, sra2_loss
from dit_fast.models import new_model
from dit_fast.nn.projector import projector
from dit_fast.objectives import Flow, MeanFlow
from dit_fast.recipes import RECIPES, load
from dit_fast.train.loss import TrainingLoss
from dit_fast.tree import image
from tests.helpers.cases import loop_over, refused
from tests.helpers.golden import assert_close, golden, golden_names
from tests.helpers.tiny_sit import tiny_sit
from tests.methods.test_internal_guidance import a_batch


@loop_over("name", golden_names("sra2_"))
def test_losses_and_gradients_of_the_equations(name):
    reference = golden(name)
    meta, state = reference.meta, {key: value.double() for key, value in reference.group("state/").items()}
    maps = [nn.Linear(*state[f"{2 * k}.weight"].shape[::-1], dtype=torch.float64) for k in range(meta["layers"])]
    head = nn.Sequential(maps[0], *(module for after in maps[1:] for module in (nn.SiLU(), after)))
    head.load_state_dict(state)
    feature, x = reference.tensor("in/feature").double().requires_grad_(), reference.tensor("in/x").double()
    tokens = head(feature)
    assert_close(tokens, reference.tensor("out/tokens"), 2e-6)
    options = {"patch_size": meta["patch_size"], "beta": meta["beta"]}
    assert_close(sra2_loss(tokens, x, reduction="sum", **options), reference.tensor("out/loss_sum"), 2e-6)
    loss = sra2_loss(tokens, x, **options)
    assert_close(loss, reference.tensor("out/loss"), 2e-6)
    loss.backward()
    for key, gradient in reference.group("grad/").items():
        found = feature.grad if key == "feature" else head.get_parameter(key).grad
        assert_close(found, gradient, 2e-6)


def test_the_distance_is_quadratic_near_and_absolute_afar():
    x = torch.zeros(1, 1, 2, 4, requires_grad=True)
    tokens = torch.tensor([[[0.0, 0.1, -0.2, 0.2], [3.0, 0.0, 0.0, 0.0]]], requires_grad=True)
    each = torch.tensor([0.0, 0.1**2 / 0.4, 0.1, 0.1, 2.9, 0, 0, 0])
    loss = sra2_loss(tokens, x, 2, beta=0.2)
    assert_close(loss, each.mean(), 1e-6)
    assert_close(sra2_loss(tokens, x, 2, 0.2, "sum"), each.sum(), 1e-6)
    assert sra2_loss(tokens.bfloat16(), x, 2).dtype == torch.float32
    loss.backward()
    assert x.grad is None
    assert tokens.grad.norm() > 0


@pytest.mark.parametrize("changes", [{}, {"class_token": 0, "times": 2}, {"input_width": 12}])
def test_a_step_gives_the_term_of_the_plain_function(changes):
    model = tiny_sit(**changes)
    (method,) = methods = build_methods([SRA2.Config(depth=2, weight=0.7, beta=0.1, reduction="sum")], model, None)
    objective = MeanFlow(MeanFlow.Config(), model) if model.times == 2 else Flow(Flow.Config(), model)
    seen, terms = [], method.terms
    method.terms = lambda context: seen.append(context) or terms(context)
    total, logs = TrainingLoss(model, objective, methods, seed=3)(a_batch(model), 0)
    (context,) = seen
    expected = sra2_loss(method.head(context.features[1]), image(context.x), 2, 0.1, "sum")
    assert_close(logs["sra2/distance"], expected, 1e-6)
    assert_close(total, logs[objective.name] + 0.7 * expected, 1e-6)
    total.backward()
    assert method.head[0].weight.grad.norm() > 0


def test_the_head_has_the_published_size():
    """About 18 million parameters at XL."""
    with torch.device("meta"):
        head = projector(1152, 2 * 1152, 16, 5)
    assert 17.5e6 < sum(parameter.numel() for parameter in head.parameters()) < 19e6
    model = tiny_sit()
    (method,) = build_methods([SRA2.Config(depth=1)], model, None)
    assert [layer.out_features for layer in method.head if isinstance(layer, nn.Linear)] == [64, 64, 64, 64, 12]
    assert model.sra2_head is method.head


def test_what_cannot_be_meant_is_refused():
    x, tokens = torch.ones(2, 3, 8, 8), torch.ones(2, 16, 12)
    for given, message in (
        ((tokens, x, 3), "patches of 3 x 3 do not cover [2, 3, 8, 8]"),
        ((tokens[:, 1:], x, 2), "tokens are [2, 15, 12], and x [2, 3, 8, 8] has patches [2, 16, 12]"),
        ((tokens, x, 2, 0.0), "beta=0.0 must be a positive number"),
        ((tokens, x, 2, 0.1, "max"), "unknown reduction 'max'; valid: mean, sum"),
    ):
        assert message in refused(sra2_loss, *given)
    assert "methods.sra2.depth=8 is not one of" in refused(build_methods, [SRA2.Config()], tiny_sit(), None)


@loop_over("name", [name for name in RECIPES if "sra2" in name.split("-")])
def test_recipes_have_the_published_depths(name):
    config = load(name, ["model.input_size=8", "model.in_channels=4", "model.num_classes=10"])
    chosen = [each for each in config.methods if each.name == "sra2"]
    with torch.device("meta"):
        (method,) = build_methods(chosen, new_model(config.model), None)
    assert method.block + 1 == (8 if name.split("-")[-2] in ("l2", "xl2") else 2)
