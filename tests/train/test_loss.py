"""The training loss: nothing nobody asked for, keyed randomness, and any objective beside any method."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from dit_fast import philox
from dit_fast.methods import METHODS, Method, Term, build_methods
from dit_fast.models import Taps
from dit_fast.objectives import Flow, MeanFlow
from dit_fast.ops import diversity_loss
from dit_fast.train.loss import TrainingLoss
from tests.helpers.tiny_sit import tiny_sit


class Spy(Method):
    """Keeps the context it was given."""

    name = "spy"

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        name: ClassVar[str] = "spy"

    def terms(self, context):
        self.context = context
        return {"spy/size": Term(torch.zeros(()), 0.0)}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, "spy", Spy)


def batch(count=6, start=0):
    position = torch.arange(start, start + count)
    generator = torch.Generator().manual_seed(5)
    moments = torch.rand(64, 2, 2, 8, 8, generator=generator)[position]
    return {"moments": moments, "label": position % 5, "position": position}


def training(*configs, objective=Flow, **options):
    """The loss, and the first method."""
    sizes = {"in_channels": 2, "num_classes": 5, "times": 2 if objective is MeanFlow else 1}
    model = tiny_sit(**sizes, skip_wiring="input")
    methods = build_methods(configs, model, None)
    loss = TrainingLoss(
        model, objective(objective.Config(), model), methods, **{"seed": 3, "label_dropout": 0.3, **options}
    )
    return loss, next(iter(methods), None)


def test_a_method_keeps_its_fused_taps_beside_any_objective():
    diversity = METHODS["diversedit"].Config(pairs="all", low=0.0)
    run, _ = training(diversity, Spy.Config(), objective=MeanFlow)
    loss, logs = run(batch(), 0)
    assert {"mean_flow", "mean_flow/squared_error", "spy/size", "diversedit/total"} <= set(logs)
    context = run.methods[1].context
    assert context.taps.collectors["diversedit"].stats()
    plain = diversity_loss([feature.detach() for feature in context.features.values()], "all").total
    torch.testing.assert_close(logs["diversedit/total"], plain)
    loss.backward()
    assert all(parameter.grad is not None for parameter in run.model.parameters() if parameter.requires_grad)


def test_randomness_is_keyed_by_position_alone():
    run, spy = training(Spy.Config())
    run(batch(6), 0)
    whole = spy.context
    run(batch(2, start=3), 7)
    part = spy.context
    for name in ("x", "noise", "t", "y", "noised", "target"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[3:5], rtol=0, atol=0)
    assert part.number == 7
    other, spy = training(Spy.Config(), seed=4)
    other(batch(6), 0)
    assert not torch.equal(spy.context.noise, whole.noise)


def test_labels_are_dropped_once_at_the_configured_rate():
    run, spy = training(Spy.Config())
    rows = {name: value.repeat(40, *[1] * (value.dim() - 1)) for name, value in batch(60).items()}
    rows["position"] = torch.arange(2400)
    run(rows, 0)
    rate = (spy.context.y == 5).double().mean()
    assert abs(rate - 0.3) < 3 * (0.3 * 0.7 / 2400) ** 0.5
    kept = spy.context.y != 5
    assert torch.equal(spy.context.y[kept], rows["label"][kept])


def test_no_block_output_is_stored_when_nobody_asks():
    run, spy = training(Spy.Config())
    run(batch(), 0)
    assert spy.context.features == {}


def test_latents_carry_posterior_noise_scale_and_shift():
    rows = batch()
    rows["moments"][:, 1] = 0
    run, spy = training(Spy.Config(), scale=[2.0, 3.0], shift=0.5)
    run(rows, 0)
    scale = torch.tensor([2.0, 3.0])[:, None, None]
    torch.testing.assert_close(spy.context.x, rows["moments"][:, 0] * scale + 0.5)
    noisy = {**rows, "moments": rows["moments"].clone()}
    noisy["moments"][:, 1] = 1
    run(noisy, 0)
    drawn = philox.normal(3, rows["position"], philox.Stream.POSTERIOR, (2, 8, 8))
    torch.testing.assert_close(spy.context.x, (rows["moments"][:, 0] + drawn) * scale + 0.5)


def test_bf16_keeps_losses_and_weights_in_float32():
    full, _ = training()[0](batch(), 0)
    run, _ = training(precision="bf16")
    half, _ = run(batch(), 0)
    half.backward()
    assert half.dtype == torch.float32
    assert {parameter.grad.dtype for parameter in run.model.parameters() if parameter.grad is not None} == {
        torch.float32
    }
    torch.testing.assert_close(half, full, rtol=2e-2, atol=0)


class Doubled(Spy):
    """Puts another image in the place of the latents."""

    name = "doubled"

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        name: ClassVar[str] = "doubled"

    def state(self, x, batch, key):
        return 2 * x + batch["position"][:, None, None, None]

    def terms(self, context):
        self.context = context
        return {}


def test_what_is_denoised_passes_through_the_methods_in_order(monkeypatch):
    monkeypatch.setitem(METHODS, "doubled", Doubled)
    run, spy = training(Spy.Config(), Doubled.Config())
    run(batch(), 0)
    plain, plain_spy = training(Spy.Config())
    plain(batch(), 0)
    position = batch()["position"][:, None, None, None]
    assert torch.equal(spy.context.x, 2 * plain_spy.context.x + position)
    assert isinstance(spy.context.taps, Taps)
