"""Methods in a training step, with one that exists only here, by code that knows no method by name."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from dit_fast.data import add_field
from dit_fast.data.field import Field
from dit_fast.errors import ConfigError
from dit_fast.methods import METHODS, Method, Term, build_methods
from dit_fast.methods.diversedit import DiverseDiT
from dit_fast.methods.repa import REPA
from dit_fast.objectives import Flow
from dit_fast.train.__main__ import main
from dit_fast.train.loss import TrainingLoss
from tests.helpers.cases import loop_over
from tests.helpers.tiny_sit import tiny_sit
from tests.helpers.toy_runs import arguments, tensors

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"
INFO = SimpleNamespace(field=lambda name: Field(f"{name}.npy", (16, 6), "float16"))


class Brightness(Method):
    """Predicts a field of the data set from the last block's mean token with a head of its own."""

    name = "brightness"
    fields = ("brightness",)

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        name: ClassVar[str] = "brightness"
        weight: float = 0.1

    def __init__(self, config, model, data):
        super().__init__(config, model, data)
        self.last = model.depth - 1
        self.blocks = frozenset({self.last})
        self.head = nn.Linear(model.hidden_size, 1)
        model.add_head("brightness_head", self.head)

    def terms(self, context):
        guess = self.head(context.features[self.last].mean(1))[:, 0]
        error = (guess - context.batch["brightness"]).square().mean()
        return {"brightness/error": Term(error, self.config.weight, {"brightness/guess": guess.detach().mean()})}


class Rude(Brightness):
    def terms(self, context):
        return {"error": Term(torch.zeros(()))}


class Forward(Brightness):
    def terms(self, context):
        return {"brightness/error": Term(torch.zeros(()), logs={"loss": torch.zeros(())})}


class Wide(Brightness):
    def terms(self, context):
        return {"brightness/error": Term(context.losses["image"])}


class Deep(Brightness):
    def __init__(self, config, model, data):
        self.blocks = frozenset({model.depth})


@pytest.fixture(autouse=True)
def registered():
    known = dict(METHODS)
    METHODS["brightness"] = Brightness
    yield
    METHODS.clear()
    METHODS.update(known)


def small(**changes):
    return tiny_sit(in_channels=2, num_classes=5, skip_wiring="input", **changes)


def step(*configs):
    """(model, methods, loss, logs) of one micro-batch."""
    model = small()
    methods = build_methods(configs, model, INFO)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "moments": torch.rand(3, 2, 2, 8, 8, generator=generator),
        "label": torch.tensor([0, 3, 4]),
        "position": torch.arange(3),
        "features": torch.randn(3, 16, 6, generator=generator),
        "brightness": torch.randn(3, generator=generator),
    }
    return model, methods, *TrainingLoss(model, Flow(Flow.Config(), model), methods, seed=0)(batch, 0)


def test_a_method_defined_elsewhere_joins_without_the_trainer_knowing_it():
    model, methods, loss, logs = step(
        REPA.Config(encoder_depth=2, projector_width=8), Brightness.Config(), DiverseDiT.Config(pairs="all")
    )
    assert [method.blocks for method in methods] == [{1}, {3}, {0, 1, 2, 3}]
    assert [method.fields for method in methods] == [("features",), ("brightness",), ()]
    assert list(logs)[:5] == ["loss", "flow", "repa/alignment", "brightness/error", "brightness/guess"]
    weights = {"flow": 1, "repa/alignment": 0.5, "brightness/error": 0.1, "diversedit/total": logs["diversedit/weight"]}
    torch.testing.assert_close(loss, sum(weight * logs[name] for name, weight in weights.items()))
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_documented_method_trains_on_a_field_of_real_shards(shards, tmp_path, monkeypatch, capsys):
    example, names = re.search("```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1], {"__name__": __name__}
    exec(example, names)
    monkeypatch.setitem(METHODS, "brightness", names["Brightness"])
    command = arguments(shards, tmp_path / "run", "methods=brightness", "run.steps=2")
    assert main(command) == 2
    assert "no field 'brightness' in the shards" in capsys.readouterr().err
    with_field = shutil.copytree(shards, tmp_path / "shards")
    np.save(tmp_path / "brightness.npy", np.linspace(0, 1, 48, dtype=np.float32))
    add_field(with_field, "brightness", tmp_path / "brightness.npy", progress=False)
    assert main([*command, f"data.path={with_field}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["brightness/error"] > 0 for row in rows)
    saved = tensors(tmp_path / "run", 2)
    for kind in ("model", "ema"):
        assert f"{kind}/brightness_head.weight" in saved


def test_initial_weights_are_drawn_in_the_order_of_the_methods():
    torch.manual_seed(1)
    head = nn.Linear(32, 1)
    model = small()
    torch.manual_seed(1)
    build_methods([Brightness.Config(), REPA.Config(encoder_depth=2, projector_width=8)], model, INFO)
    assert torch.equal(model.brightness_head.weight, head.weight)


@loop_over(
    ("method", "message"),
    [
        (Rude, "'brightness' names a term 'error'; use 'brightness/error'"),
        (Forward, "'brightness' names a term 'loss'; use 'brightness/loss'"),
        (Wide, r"'brightness/error' of method 'brightness' is \[3\]; a term is one number"),
        (Deep, r"'brightness' reads block 4.*0\.\.3"),
    ],
)
def test_misbehaving_methods_are_named(method, message):
    METHODS["brightness"] = method
    with pytest.raises(ConfigError, match=message):
        step(Brightness.Config())


@loop_over(
    ("width", "names", "message"),
    [
        (0, ["one"], "'one' adds 'class_token', which this model does not denoise"),
        (6, ["one", "two"], "'one' and 'two' both add 'class_token'; keep one"),
        (
            6,
            ["brightness"],
            r"denoises 'class_token'.* set model\.class_token=0, or use one that does \(reg, one, two\)",
        ),
    ],
)
def test_one_method_adds_what_the_model_denoises_beside_the_image(width, names, message):
    for name in ("one", "two"):
        METHODS[name] = type(name, (Brightness,), {"name": name, "adds": ("class_token",), "__init__": Method.__init__})
    with pytest.raises(ConfigError, match=message):
        build_methods(
            [SimpleNamespace(name=name, weight=1.0, stop_step=0) for name in names], small(class_token=width), INFO
        )


def test_two_methods_cannot_add_a_module_of_one_name():
    model, configs = small(), [Brightness.Config()]
    build_methods(configs, model, INFO)
    with pytest.raises(ConfigError, match="the model already has 'brightness_head'"):
        build_methods(configs, model, INFO)


def test_configs_mirror_their_methods():
    for name, method in METHODS.items():
        assert method.name == method.Config.name == method.Config().name == name


@loop_over(
    ("name", "options", "told"),
    [
        ("diversedit", {"pairs": "all", "k": 5}, "k=5 is not read with methods.diversedit.pairs=all, but with"),
        (
            "diversedit",
            {"weight_constant": 0.5},
            "set methods.diversedit.weight_constant=0.001, or methods.diversedit.",
        ),
        ("diversedit", {"weight": "constant", "detach_weight": False}, "detach_weight=false is not read with"),
        ("dispersive", {"variant": "hinge", "tau": 1.0}, "tau=1.0 is not read with methods.dispersive.variant=hinge"),
        ("dispersive", {"margin": 2.0}, "or methods.dispersive.variant=hinge"),
        ("sra", {"teacher_depth": 8, "distance": "smooth_l1", "axis": "tokens"}, "axis=tokens is not read with"),
        (
            "sra",
            {"teacher_depth": 8, "weight_knee": 9},
            "weight_knee=9: the weight stays as it is with weight_decade=0",
        ),
        ("reg", {"encoders": ("dino-vit-b:x",), "class_token_field": "y"}, "class_token_field=y is not read beside"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(name, options, told):
    """It would change nothing, in silence. The others of the case are no fault."""
    model, config = tiny_sit(depth=12), METHODS[name].Config
    with pytest.raises(ConfigError, match=re.escape(told)):
        build_methods([config(**options)], model, INFO)
    *others, _ = options
    if name != "reg":  # whose encoder is not there
        build_methods([config(**{option: options[option] for option in others})], model, INFO)
