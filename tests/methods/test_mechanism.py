"""The method mechanism, with a method that exists only here, trained by a loop that knows no method by name."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

from dit_fast.data.field import Field
from dit_fast.diffusion import Path, velocity_error
from dit_fast.errors import ConfigError
from dit_fast.methods import METHODS, Method, ModelFacts, StepContext, StepInputs, Term, build_methods
from dit_fast.methods.diversedit import DiverseDiT
from dit_fast.methods.repa import REPA
from dit_fast.models import build_model
from dit_fast.options import to_dict
from dit_fast.runs import TrainConfig, changed, stored
from tests.helpers.cases import loop_over


class Brightness(Method):
    """Predicts a shard field from the last block's mean token with a module of its own."""

    name = "brightness"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: ClassVar[str] = "brightness"
        weight: float = 0.1

    def batch_fields(self):
        return ("brightness",)

    def taps(self, facts):
        return frozenset({facts.depth - 1})

    def attach(self, model, dataset_info):
        model.add_head("brightness_head", nn.Linear(model.hidden_size, 1))

    def terms(self, context):
        guess = context.model.brightness_head(context.features[context.model.depth - 1].mean(1))[:, 0]
        error = (guess - context.batch["brightness"]).square().mean()
        return {"brightness/error": Term(error, self.config.weight, {"brightness/guess": guess.detach().mean()})}


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, "brightness", Brightness)


def small():
    torch.manual_seed(0)
    sizes = {"input_size": 8, "in_channels": 2, "hidden_size": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    model = build_model("SiT-S/2", **sizes, skip_wiring="input")
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


INFO = SimpleNamespace(field=lambda name: Field(f"{name}.npy", (16, 6), "float16"))


def step(model, methods, batch, taps):
    """One forward of the trainer's objective, in full."""
    x, noise = batch["latents"], batch["noise"]
    noised, target = Path("linear").interpolate(x, noise, batch["t"])
    output = model(noised, batch["t"], batch["labels"], taps=taps)
    prediction, features = output if taps else (output, {})
    fields = {name: batch[name] for name in methods.batch_fields()}
    context = StepContext(
        model, x, noise, batch["t"], batch["labels"], noised, target, prediction, features, fields, step=0, seed=0
    )
    terms = methods.terms(context)
    return velocity_error(prediction, target).mean() + sum(term.weight * term.value for term in terms.values()), terms


def batch():
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "latents": normal(3, 2, 8, 8), "noise": normal(3, 2, 8, 8), "t": torch.tensor([0.2, 0.5, 0.9]),
        "labels": torch.tensor([0, 3, 5]), "features": normal(3, 16, 6), "brightness": normal(3),
    }  # fmt: skip


@pytest.mark.usefixtures("registered")
def test_a_method_defined_elsewhere_joins_without_the_trainer_knowing_it():
    model = small()
    methods = build_methods(
        [REPA.Config(encoder_depth=2, projector_width=8), Brightness.Config(), DiverseDiT.Config(pairs="all")]
    )
    methods.attach(model, INFO)
    taps = methods.taps(ModelFacts.of(model))
    assert taps == (0, 1, 2, 3)
    assert methods.batch_fields() == ("features", "brightness")
    loss, terms = step(model, methods, batch(), taps)
    assert list(terms) == ["repa/alignment", "brightness/error", "diversedit/total"]
    assert list(terms["brightness/error"].logs) == ["brightness/guess"]
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_no_methods_ask_for_nothing():
    methods = build_methods([])
    assert (len(methods), methods.taps(ModelFacts.of(small())), methods.batch_fields()) == (0, (), ())
    loss, terms = step(small(), methods, batch(), ())
    assert terms == {}
    assert loss.requires_grad


def test_only_the_union_of_taps_is_handed_out():
    methods = build_methods([REPA.Config(encoder_depth=2, projector_width=8)])
    assert methods.taps(ModelFacts.of(small())) == (1,)


@pytest.mark.usefixtures("registered")
def test_configurations_round_trip_and_take_overrides():
    config = TrainConfig(methods=(DiverseDiT.Config(pairs="all", encoder_depth=5), Brightness.Config(weight=2.0)))
    assert stored(to_dict(config)) == config
    kept = changed(config, ["methods.repa.encoder_depth=3", "methods=brightness,repa"]).methods
    assert kept == (Brightness.Config(weight=2.0), REPA.Config(encoder_depth=3))


class Rude(Brightness):
    def terms(self, context):
        return {"error": Term(torch.zeros(()))}


class Deep(Brightness):
    def taps(self, facts):
        return frozenset({facts.depth})


@loop_over(
    ("call", "message"),
    [
        (
            lambda: build_methods([SimpleNamespace(name="diversdit")]),
            "unknown method 'diversdit'; did you mean 'diversedit'",
        ),
        (lambda: build_methods([SimpleNamespace(name="xyz")]), "unknown method 'xyz'; valid: diversedit, repa"),
        (lambda: build_methods([REPA.Config(), REPA.Config(encoder_depth=2)]), "'repa' is listed twice"),
    ],
)
def test_wrong_lists_of_methods_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_misbehaving_methods_are_named(monkeypatch):
    model = small()
    monkeypatch.setitem(METHODS, "brightness", Rude)
    with pytest.raises(ConfigError, match="'brightness' names a term 'error'; use 'brightness/error'"):
        step(model, build_methods([Brightness.Config()]), batch(), (3,))
    monkeypatch.setitem(METHODS, "brightness", Deep)
    with pytest.raises(ConfigError, match=r"'brightness' reads block 4.*0\.\.3"):
        build_methods([Brightness.Config()]).taps(ModelFacts.of(model))


def test_two_methods_cannot_add_a_module_of_one_name():
    model = small()
    methods = build_methods([REPA.Config(encoder_depth=2, projector_width=8)])
    methods.attach(model, INFO)
    with pytest.raises(ConfigError, match="projectors"):
        methods.attach(model, INFO)


def test_configs_mirror_their_methods():
    for name, method in METHODS.items():
        assert method.name == method.Config.name == method.Config().name == name


def test_noise_and_target_may_be_made_when_they_are_first_read():
    calls = []

    def make(name):
        return lambda: calls.append(name) or torch.zeros(1)

    x = torch.ones(1)
    context = StepContext(None, x, make("noise"), x, x, x, make("target"), x, {}, {}, 0, 0)
    inputs = StepInputs(None, x, make("inputs"), x, x, x, {}, 0, 0)
    assert calls == []
    assert context.noise is context.noise
    assert inputs.noise is inputs.noise
    assert calls == ["noise", "inputs"]
    assert torch.equal(context.target, torch.zeros(1))
    context.target = x
    assert context.target is x
    with pytest.raises(AttributeError):
        inputs.noise = x
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'seed'"):
        StepContext(None, x, x, x, x, x, x, x, {}, {}, 0)
