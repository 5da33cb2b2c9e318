"""Contrastive flow matching: the loss, the partner of each sample, and its method."""

import pytest
import torch

from dit_fast.diffusion import Path
from dit_fast.methods import build_methods
from dit_fast.methods.contrastive_flow import ContrastiveFlow, contrastive_flow_losses, draw_partners
from dit_fast.objectives import Flow
from dit_fast.ops.draws import Key
from dit_fast.recipes import load
from dit_fast.train.loss import TrainingLoss
from tests.helpers.cases import loop_over, refused
from tests.helpers.golden import assert_close, golden, golden_names
from tests.helpers.small_network import network, weights
from tests.helpers.tiny_sit import tiny_sit
from tests.methods.test_internal_guidance import a_batch


@loop_over("name", golden_names("contrastive_"))
@loop_over("form", ["all", "skip_null"])
def test_losses_and_gradients_of_the_published_code(name, form):
    """N1's time runs as ours in these files."""
    reference = golden(name)
    meta, state = reference.meta, weights(reference)
    x, noise, t = (reference.tensor(f"in/{key}").double() for key in ("x", "noise", "t"))
    y, index = reference.tensor("in/y"), reference.tensor("in/negative_index")
    noised, velocity = Path(meta["path_type"]).interpolate(x, noise, t)
    prediction = network(state, meta.get("skip", 0.0))(noised, 1 - t, y)
    keep = y != meta["null_class"] if form == "skip_null" else None
    found = contrastive_flow_losses(prediction, velocity, index, weight=meta["weight"], keep=keep)
    assert_close(found.flow, reference.tensor("out/flow"), 2e-6)
    assert_close(found.contrast, reference.tensor(f"out/contrast_{form}"), 2e-6)
    assert_close(found.loss, reference.tensor(f"out/loss_{form}"), 2e-6)
    found.loss.mean().backward()
    for key, gradient in reference.group(f"grad_{form}/").items():
        assert_close(state[key].grad, gradient, 2e-6)


def test_those_contrasted_stand_for_all_in_the_precision_of_the_errors():
    """5/3 of float32 is off by 5e-8."""
    prediction, target = torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(2, 5, 1)
    index, keep = torch.arange(4, -1, -1), torch.tensor([True, False, True, False, True])
    found = contrastive_flow_losses(prediction, target, index, keep=keep)
    wanted = (prediction - target[index]).square().squeeze(1) * keep * 5 / 3
    torch.testing.assert_close(found.contrast, wanted, rtol=1e-14, atol=0)


def test_no_label_left_is_no_contrast():
    prediction, target = torch.ones(3, 2, 4, 4, requires_grad=True), torch.zeros(3, 2, 4, 4, requires_grad=True)
    found = contrastive_flow_losses(prediction, target, torch.tensor([1, 2, 0]), keep=torch.zeros(3, dtype=torch.bool))
    assert found.contrast.tolist() == [0, 0, 0]
    assert torch.equal(found.loss, found.flow)
    found.loss.sum().backward()
    assert prediction.grad.isfinite().all()
    assert target.grad is None


def test_partners_are_others_uniform_and_keyed_by_position():
    drawn = torch.stack([draw_partners(Key(0, torch.arange(5) + 5 * k)) for k in range(2000)])
    own = torch.arange(5)
    assert not (drawn == own).any()
    for k in range(5):
        counts = torch.bincount(drawn[:, k], minlength=5)
        assert counts[k] == 0
        assert ((counts[own != k] - 500).abs() < 100).all()
    key = Key(7, torch.tensor([3, 11, 4]))
    ahead = (draw_partners(key) - torch.arange(3)) % 3
    moved = Key(7, torch.tensor([11, 3, 4]))
    assert torch.equal((draw_partners(moved) - torch.arange(3)) % 3, ahead[[1, 0, 2]])
    assert draw_partners(Key(0, torch.arange(2))).tolist() == [1, 0]


@pytest.mark.parametrize("prediction", ["velocity", "x"])
@pytest.mark.parametrize("skip_null", [False, True])
def test_a_step_gives_the_term_of_the_plain_function(prediction, skip_null):
    model = tiny_sit()
    methods = build_methods([ContrastiveFlow.Config(weight=0.2, skip_null=skip_null)], model, None)
    objective = Flow(Flow.Config(prediction=prediction), model)
    loss = TrainingLoss(model, objective, methods, seed=3, label_dropout=0.5)
    seen, terms = [], methods[0].terms
    methods[0].terms = lambda context: seen.append(context) or terms(context)
    total, logs = loss(a_batch(model, 6), 0)
    (context,) = seen
    keep = context.y != model.null_label
    assert 0 < keep.sum() < 6
    found = contrastive_flow_losses(
        context.prediction, context.target, draw_partners(context.key), 0.2, keep if skip_null else None
    )
    assert_close(logs["contrastive_flow/contrast"], found.contrast.mean(), 1e-5)
    assert_close(total, found.loss.mean(), 1e-5)


def test_what_cannot_be_meant_is_refused():
    x, index = torch.ones(2, 3), torch.tensor([1, 0])
    for given, message in (
        ((x, x[:1], index), "must be of one shape"),
        ((x, x, index[:1]), "negative_index must be torch.int64 [2], not torch.int64 [1]"),
        ((x, x, index.float()), "negative_index must be"),
        ((x, x, index - 1), "negative_index must lie in 0 .. 1"),
        ((x, x, index + 1), "negative_index must lie in 0 .. 1"),
        ((x, x, index, float("nan")), "weight=nan must be a finite number (paper: 0.05)"),
        ((x, x, index, 0.1, index), "keep must be torch.bool [2]"),
    ):
        assert message in refused(contrastive_flow_losses, *given)
    config = ContrastiveFlow.Config()
    (method,) = build_methods([config], tiny_sit(), None)
    method.check_batch(2)
    assert "set engine.micro_batch=2 or more" in refused(method.check_batch, 1)
    assert "objective=ddpm: the noise" in refused(build_methods, [config], tiny_sit(name="DiT-S/2"), None)
    assert "mean velocity" in refused(build_methods, [config], tiny_sit(times=2), None)
    for prediction in ("noise", "score"):
        run = load("quickstart-contrastive_flow", [f"objective.prediction={prediction}"])
        assert f"objective.prediction={prediction}: the noise" in refused(ContrastiveFlow.stages, config, run)
