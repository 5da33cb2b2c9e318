"""The composed objective: nothing nobody asked for, keyed randomness, and a method with a forward of its own."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.func import jvp

from dit_fast import philox
from dit_fast.config import FlowConfig
from dit_fast.diffusion import velocity_error
from dit_fast.errors import ConfigError
from dit_fast.methods import METHODS, Method, Methods, StepContext, Term, build_methods
from dit_fast.models import build_model
from dit_fast.train import objective as objective_module
from dit_fast.train.objective import TrainingObjective


class Jumps(Method):
    """Mean flow in small (arXiv 2505.13447): velocity over [r, t], its target from a forward-mode derivative."""

    name = "jumps"
    own_forward = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: ClassVar[str] = "jumps"
        width: float = 0.3  # t - r at most

    def attach(self, model, dataset_info):
        model.add_head("width_embedder", nn.Linear(1, model.hidden_size))
        nn.init.normal_(model.width_embedder.weight, std=0.5)

    def forward(self, inputs, taps):
        position = inputs.batch["position"]
        width = self.config.width * philox.uniform(inputs.seed, position, philox.Stream.METHOD + 9, ()) * inputs.t
        spread = inputs.t[:, None, None, None]
        noised = (1 - spread) * inputs.latents + spread * inputs.noise
        velocity = inputs.noise - inputs.latents
        null = torch.where(inputs.drop, inputs.model.null_label, inputs.labels)
        features = {}

        def average(x, t, h):
            shift = inputs.model.width_embedder(h[:, None])
            output = inputs.model(x, t, null, taps=taps)
            output, tapped = output if taps else (output, {})
            features.update(tapped)
            return output * (1 + shift.mean(1))[:, None, None, None]

        with torch.no_grad():
            ones = torch.ones_like(inputs.t)
            _, slope = jvp(average, (noised, inputs.t, width), (velocity, ones, ones))
        prediction = average(noised, inputs.t, width)
        target = velocity - width[:, None, None, None] * slope
        context = StepContext(
            model=inputs.model,
            latents=inputs.latents,
            noise=inputs.noise,
            t=inputs.t,
            labels=null,
            noised=noised,
            target=target,
            prediction=prediction,
            features=features,
            batch=inputs.batch,
            step=inputs.step,
            seed=inputs.seed,
        )
        return context, velocity_error(prediction, target)

    def terms(self, context):
        return {"jumps/size": Term(context.prediction.square().mean(), 0.0)}


class Spy(Method):
    """Keeps the context it was given."""

    name = "spy"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: ClassVar[str] = "spy"

    def terms(self, context):
        self.context = context
        return {}


def small():
    torch.manual_seed(0)
    model = build_model(
        "SiT-S/2",
        input_size=8,
        in_channels=2,
        hidden_size=32,
        depth=4,
        num_heads=2,
        num_classes=5,
        skip_wiring="input",
        attention="math",
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def batch(count=6, start=0):
    position = torch.arange(start, start + count)
    generator = torch.Generator().manual_seed(5)
    moments = torch.rand(64, 2, 2, 8, 8, generator=generator)[position]
    return {"moments": moments, "label": position % 5, "position": position}


def objective(methods=(), model=None, **options):
    methods = methods if isinstance(methods, Methods) else Methods(list(methods))
    model = model or small()
    methods.attach(model, None)
    return TrainingObjective(model, methods, FlowConfig(), seed=3, label_dropout=0.3, **options)


def test_a_forward_of_its_own_takes_the_place_of_flow_matching():
    diversity = METHODS["diversedit"].Config(pairs="all", low=0.0)
    own = objective(Methods([Jumps(Jumps.Config()), *build_methods([diversity])]))
    loss, logs = own(batch(), 0)
    assert "flow" not in logs
    assert {"jumps", "jumps/size", "diversedit/total"} <= set(logs)
    loss.backward()
    assert own.model.width_embedder.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in own.model.parameters() if parameter.requires_grad)


def test_mean_flow_over_no_interval_is_flow_matching():
    model = small()
    plain, _ = objective(model=model)(batch(), 0)
    jumps = objective([Jumps(Jumps.Config(width=0.0))], model=model)
    nn.init.zeros_(model.width_embedder.weight)
    nn.init.zeros_(model.width_embedder.bias)
    mean_flow, _ = jumps(batch(), 0)
    torch.testing.assert_close(mean_flow, plain, rtol=1e-6, atol=0)


def test_two_forwards_are_refused():
    class Other(Jumps):
        name = "other"

    with pytest.raises(ConfigError, match="'jumps' and 'other' both replace flow matching"):
        Methods([Jumps(Jumps.Config()), Other(Jumps.Config())])


def test_randomness_is_keyed_by_position_alone():
    spy = Spy(Spy.Config())
    run = objective([spy])
    run(batch(6), 0)
    whole = spy.context
    run(batch(2, start=3), 7)
    part = spy.context
    for name in ("latents", "noise", "t", "labels", "noised", "target"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[3:5], rtol=0, atol=0)
    other = objective([spy])
    other.seed = 4
    other(batch(6), 0)
    assert not torch.equal(spy.context.noise, whole.noise)


def test_labels_are_dropped_once_at_the_configured_rate():
    spy = Spy(Spy.Config())
    run = objective([spy])
    rows = batch(60)
    rows = {name: value.repeat(40, *[1] * (value.dim() - 1)) for name, value in rows.items()}
    rows["position"] = torch.arange(2400)
    run(rows, 0)
    rate = (spy.context.labels == 5).double().mean()
    assert abs(rate - 0.3) < 3 * (0.3 * 0.7 / 2400) ** 0.5
    kept = spy.context.labels != 5
    assert torch.equal(spy.context.labels[kept], rows["label"][kept])


def test_no_block_output_is_stored_when_nobody_asks():
    spy = Spy(Spy.Config())
    objective([spy])(batch(), 0)
    assert spy.context.features == {}


def test_latents_carry_posterior_noise_scale_and_shift():
    spy = Spy(Spy.Config())
    rows = batch()
    rows["moments"][:, 1] = 0
    objective([spy], scale=[2.0, 3.0], shift=0.5)(rows, 0)
    scale = torch.tensor([2.0, 3.0])[:, None, None]
    torch.testing.assert_close(spy.context.latents, rows["moments"][:, 0] * scale + 0.5)
    noisy = {**rows, "moments": rows["moments"].clone()}
    noisy["moments"][:, 1] = 1
    objective([spy], scale=[2.0, 3.0], shift=0.5)(noisy, 0)
    drawn = philox.normal(3, rows["position"], philox.Stream.POSTERIOR, (2, 8, 8))
    torch.testing.assert_close(spy.context.latents, (rows["moments"][:, 0] + drawn) * scale + 0.5)


def test_bf16_keeps_losses_and_weights_in_float32():
    full, _ = objective()(batch(), 0)
    run = objective(precision="bf16")
    half, _ = run(batch(), 0)
    half.backward()
    assert half.dtype == torch.float32
    assert {parameter.grad.dtype for parameter in run.model.parameters() if parameter.grad is not None} == {
        torch.float32
    }
    torch.testing.assert_close(half, full, rtol=2e-2, atol=0)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_flow_matching_without_stored_noise_is_the_same_to_the_bit(path, monkeypatch):
    """The branch of the fused ops, taken on the CPU, where they are the reference."""
    results = []
    for fused in (False, True):
        monkeypatch.setattr(objective_module, "draws_noise_in_registers", lambda latents, fused=fused: fused)
        spy = Spy(Spy.Config())
        run = TrainingObjective(small(), Methods([spy]), FlowConfig(path=path), seed=2**63 + 5, label_dropout=0.3)
        loss, _ = run(batch(), 0)
        loss.backward()
        made = {name: not callable(vars(spy.context)[name]) for name in ("noise", "target")}
        assert made == {"noise": False, "target": not fused}
        context = [getattr(spy.context, name) for name in ("noise", "target", "noised", "latents", "t")]
        results.append([loss, *context, *(p.grad for p in run.model.parameters() if p.grad is not None)])
    assert all(torch.equal(plain, ours) for plain, ours in zip(*results, strict=True))


def test_a_forward_of_its_own_still_gets_keyed_noise(monkeypatch):
    monkeypatch.setattr(objective_module, "draws_noise_in_registers", lambda latents: pytest.fail("not flow matching"))
    run, seen = objective([Jumps(Jumps.Config())]), []
    forward = Jumps.forward
    monkeypatch.setattr(Jumps, "forward", lambda self, inputs, taps: seen.append(inputs) or forward(self, inputs, taps))
    run(batch(), 0)
    expected = philox.normal(3, batch()["position"], philox.Stream.NOISE, (2, 8, 8))
    assert torch.equal(seen[0].noise, expected)
