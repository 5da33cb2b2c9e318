"""LayerSync: the loss, and its method on one and several pairs of blocks."""

import pytest
import torch

from dit_fast.checkpoint import load_official
from dit_fast.diffusion import Path, velocity_error
from dit_fast.methods import build_methods
from dit_fast.methods.layersync import LayerSync, layersync_loss
from dit_fast.models import new_model
from dit_fast.objectives import Flow
from dit_fast.recipes import RECIPES, load
from dit_fast.train.loss import TrainingLoss
from tests.helpers.cases import loop_over, refused
from tests.helpers.golden import assert_close, assert_gradient_norms, golden, golden_names
from tests.helpers.tiny_sit import tiny_sit
from tests.methods.test_internal_guidance import a_batch


@loop_over("name", golden_names("layersync_"))
@loop_over("form", ["one", "multiple"])
def test_losses_and_gradients_of_the_published_code(name, form):
    """Its loop over several pairs counts the last one alone."""
    reference = golden(name)
    meta = reference.meta
    student, teacher = (
        meta["multiple_pairs"][-1] if form == "multiple" else (meta["student_depth"], meta["teacher_depth"])
    )
    model = load_official(reference.group("state/"), family="sit", num_heads=meta["num_heads"])
    x, noise, t, y = (reference.tensor(f"in/{key}") for key in ("x", "noise", "t_sit", "y"))
    noised, velocity = Path("linear").interpolate(x, noise, 1 - t)
    output, features = model(noised, 1 - t, y, taps=[student - 1, teacher - 1])
    assert_close(-output, reference.tensor("out/v"), 1e-5)
    flow, aligned = velocity_error(output, velocity), layersync_loss(features[student - 1], features[teacher - 1])
    assert_close(flow, reference.tensor("out/flow"), 1e-5)
    assert_close(aligned, reference.tensor(f"out/reg_{form}").mean(), 1e-5)
    loss = flow.mean() + meta["coeff"] * aligned
    assert_close(loss, reference.tensor(f"out/loss_{form}"), 1e-5)
    loss.backward()
    assert_gradient_norms(model, reference.group(f"gradnorm_{form}/"), 1e-5)
    for key, gradient in reference.group(f"grad_{form}/").items():
        assert_close(model.get_parameter(key).grad, gradient, 1e-5)


def test_the_teacher_gets_no_gradient():
    a, b = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    layersync_loss(a, b).backward()
    assert a.grad.norm() > 0
    assert b.grad is None
    assert "[2, 3, 4] aligned with [1, 3, 4]; give one shape" in refused(layersync_loss, a, b[:1])


@pytest.mark.parametrize("changes", [{}, {"skip_wiring": "output"}, {"times": 1, "auxiliary_depth": 0}])
def test_all_pairs_count(changes):
    model, values = tiny_sit(**changes), []
    for students, teachers in (((1,), (3,)), ((2,), (4,)), ((1, 2), (3, 4))):
        methods = build_methods([LayerSync.Config(student_depths=students, teacher_depths=teachers)], model, None)
        total, logs = TrainingLoss(model, Flow(Flow.Config(), model), methods, seed=3)(a_batch(model), 0)
        values.append(logs["layersync/alignment"])
        assert_close(total, logs["flow"] + 0.2 * values[-1], 1e-6)
    first, second, both = values
    assert_close(both, first + second, 1e-6)
    assert_close(logs["layersync/1_3"], first, 1e-6)
    assert_close(logs["layersync/2_4"], second, 1e-6)


def test_what_cannot_be_meant_is_refused():
    config = LayerSync.Config
    for students, teachers, message in (
        ((8,), (8,), "block 8 aligned with block 8; a block has nothing to learn from itself"),
        ((3,), (2,), "give a deeper teacher"),
        ((), (), "give pairs, one or more"),
        ((1, 2), (3,), "lists 2 blocks and teacher_depths 1"),
        ((1, 1), (3, 3), "lists a pair twice"),
    ):
        assert message in refused(config, student_depths=students, teacher_depths=teachers)
    for students, key in (((1,), "teacher_depths=16"), ((9,), "student_depths=9")):
        chosen = config(student_depths=students)
        assert f"methods.layersync.{key} is not one of this model's blocks 1..4" in refused(
            build_methods, [chosen], tiny_sit(), None
        )


@loop_over("name", [name for name in RECIPES if "layersync" in name.split("-")])
def test_recipes_have_the_published_depths(name):
    config = load(name, ["model.input_size=8", "model.in_channels=4", "model.num_classes=10"])
    chosen = [each for each in config.methods if each.name == "layersync"]
    with torch.device("meta"):
        (method,) = build_methods(chosen, new_model(config.model), None)
    pairs = [(a + 1, b + 1) for a, b in method.pairs]
    assert pairs == ([(8, 16)] if "xl2" in name else [(2, 4)])
