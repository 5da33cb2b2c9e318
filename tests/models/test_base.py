"""What every backbone offers: taps, early exit, the null label, heads that methods add, and one-line refusals."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dit_fast.cli import main
from dit_fast.errors import ConfigError, UserError
from dit_fast.models import Backbone, Taps, build_model
from dit_fast.models.registry import BACKBONES, PRESETS
from tests.helpers.cases import loop_over
from tests.helpers.tiny_sit import WIRINGS, inputs_for, tiny_sit
from tests.helpers.toy_runs import arguments


def test_taps_hand_out_only_what_was_asked_for():
    model = tiny_sit(skip_wiring="input")
    inputs = inputs_for(model)
    v = model(*inputs)
    assert isinstance(v, torch.Tensor)
    tapped, features = model(*inputs, taps={3, 1})
    assert torch.equal(v, tapped)
    assert list(features) == [1, 3]
    assert features[1].shape == (3, model.num_tokens, 32)
    assert not model._forward_hooks
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(UserError, match=r"tap 4 .*0 \.\. 3"):
        model(*inputs, taps=[4])
    with pytest.raises(UserError, match="tap -1"):
        model(*inputs, taps=[-1])


def test_the_null_label_is_the_last_row_where_it_was_trained():
    y = torch.tensor([1, 2])
    assert tiny_sit().null(y).tolist() == [10, 10]
    never = tiny_sit(label_dropout=0.0)
    assert never.null_label == -1
    with pytest.raises(UserError, match="no trained null label"):
        never.null(y)


def test_nothing_in_the_forward_is_random():
    model = tiny_sit(skip_wiring="input", label_dropout=0.9).train()
    before = torch.get_rng_state()
    assert torch.equal(model(*inputs_for(model)), model.eval()(*inputs_for(model)))
    assert torch.equal(before, torch.get_rng_state())


class _Doubler:
    def __init__(self):
        self.seen = []

    def tap(self, x, stats):
        self.seen.append((x, stats))
        return 2 * x


def test_blocks_pass_the_collectors_that_want_them_on_their_way_to_the_next():
    model, doubler = tiny_sit(), _Doubler()
    taps = Taps([3], {"doubler": (doubler, frozenset({1}))})
    v = model(*inputs_for(model), taps=taps)
    assert (list(taps.features), taps.collectors) == ([1, 3], {"doubler": doubler})
    _, plain = model(*inputs_for(model), taps=(1, 3))
    assert len(doubler.seen) == 1
    assert torch.equal(doubler.seen[0][0], plain[1])
    assert torch.equal(taps.features[1], 2 * plain[1])
    assert not torch.equal(taps.features[3], plain[3])
    assert not torch.equal(v, model(*inputs_for(model)))


@loop_over("wiring", WIRINGS)
@loop_over("recompute", ["none", "full"])
def test_an_early_exit_runs_the_first_blocks_alone(wiring, recompute):
    model, ran = tiny_sit(skip_wiring=wiring, depth=6, recompute=recompute), []
    _, whole = model(*inputs_for(model), taps=range(6))
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    for stop in (0, 2, 4):
        taps = Taps([0, stop])
        ran.clear()
        assert model(*inputs_for(model), taps=taps, stop=stop) is None
        assert ran == list(range(stop + 1))
        assert torch.equal(taps.features[stop], whole[stop])
    assert model(*inputs_for(model), taps=[1], stop=1)[0] is None
    for call, named in (({"stop": 6}, "stop=6"), ({"stop": -1}, "stop=-1"), ({"stop": 1, "taps": [2]}, "tap 2")):
        with pytest.raises(UserError, match=named):
            model(*inputs_for(model), **call)


def test_added_modules_stand_before_the_head():
    model = tiny_sit(skip_wiring="input")
    model.add_head("projectors", nn.ModuleList([nn.Linear(32, 2)]))
    assert [name for name, _ in model.named_children()] == [
        "skip_linears",
        "skip_norms",
        "x_embedder",
        "t_embedder",
        "y_embedder",
        "blocks",
        "projectors",
        "final_layer",
    ]
    assert next(iter(model.named_parameters()))[0] == "pos_embed"
    with pytest.raises(ConfigError, match="projectors"):
        model.add_head("projectors", nn.Identity())
    assert (model.block(4, "a.depth"), model.block(1, "a.depth")) == (3, 0)
    for depth in (0, 5):
        with pytest.raises(ConfigError, match=rf"a\.depth={depth} is not one of this model's blocks 1\.\.4"):
            model.block(depth, "a.depth")


def test_bad_inputs_raise_one_line():
    token, mean = tiny_sit(class_token=6), tiny_sit(times=2)
    joint = inputs_for(token)[0]
    model = tiny_sit()
    x, t, y = inputs_for(model)
    cases = [
        (lambda: model(x[:, :2], t, y), r"x must be \[N, 3, 8, 8\]"),
        (lambda: model(x[..., :6], t, y), "x must be"),
        (lambda: model(x, t[:1], y), "t must be"),
        (lambda: model(x, torch.stack((t, t), 1), y), r"t must be \[N\]"),
        (lambda: mean(x, t, y), r"t must be \[N, 2\] = \(t, r\), here \(3, 2\), not \(3,\)"),
        (lambda: model(joint, t, y), "x must hold image for this model, not image and class_token"),
        (lambda: token(x, t, y), "x must hold image and class_token for this model, not image"),
        (lambda: token({**joint, "class_token": torch.zeros(3, 5)}, t, y), r"x\['class_token'\] must be \[N, 6\]"),
        (lambda: token({**joint, "class_token": torch.zeros(3, 6).double()}, t, y), "class_token.*float64"),
        (lambda: model(x, t, y[:, None]), "y must be"),
        (lambda: model(x, t, y.float()), "integer labels"),
        (lambda: model(x.double(), t, y), "float64"),
    ]
    for call, named in cases:
        with pytest.raises(UserError, match=named) as caught:
            call()
        assert "\n" not in str(caught.value)


class Pixels(Backbone):
    """A backbone in one class: every pixel is a token; time and label do not matter."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Backbone.Config):
        name: str = "Pixels-S"
        depth: int = 0

    def __init__(self, config):
        super().__init__(config)
        self.depth = config.depth or PRESETS[config.name]["depth"]
        self.grid, self.num_tokens = (config.input_size, config.input_size), config.input_size**2
        self.hidden_size = config.in_channels
        self.blocks = nn.ModuleList(nn.Linear(self.hidden_size, self.hidden_size) for _ in range(self.depth))
        self.final_layer = nn.Identity()

    def compute(self, x, t, y, taps, stop):
        tokens = x.flatten(2).mT
        for index, block in enumerate(self.blocks[: self.depth if stop is None else stop + 1]):
            tokens = block(tokens)
            if index in taps:
                tokens = taps(index, tokens)
        return None if stop is not None else self.final_layer(tokens).mT.reshape(x.shape)

    def flops_per_sample(self):
        return 2 * self.depth * self.num_tokens * self.hidden_size**2


@pytest.fixture
def pixels(monkeypatch):
    monkeypatch.setitem(BACKBONES, "Pixels", Pixels)
    monkeypatch.setitem(PRESETS, "Pixels-S", {"depth": 3})


@pytest.mark.usefixtures("pixels")
def test_it_trains_samples_and_is_reported_by_code_that_does_not_know_it(shards, tmp_path):
    run = tmp_path / "run"
    previews = ("preview.every=2", "preview.num_steps=1")
    assert main(["train", *arguments(shards, run, "model=Pixels-S", "run.steps=2", *previews)]) == 0
    assert (run / "samples" / "step_00000002.png").exists()
    assert main(["sample", str(run), "--per-class", "1", "--num-steps", "1"]) == 0
    assert main(["report", str(run), "--out", str(tmp_path)]) == 0


@pytest.mark.usefixtures("pixels")
def test_a_backbone_is_one_class_and_one_entry():
    """It is built by name, and has taps, early exit, heads and refusals from the base."""
    model = build_model("Pixels-S", input_size=4, in_channels=6)
    x, t, y = torch.randn(2, 6, 4, 4), torch.rand(2), torch.tensor([0, 1])
    v, features = model(x, t, y, taps=[2])
    assert torch.equal(v, features[2].mT.reshape(x.shape))
    taps = Taps([1])
    assert model(x, t, y, taps=taps, stop=1) is None
    assert torch.equal(model.blocks[2](taps.features[1]), features[2])
    model.add_head("projectors", nn.Linear(6, 2))
    assert list(dict(model.named_children())) == ["blocks", "projectors", "final_layer"]
    with pytest.raises(UserError, match=r"x must be \[N, 6, 4, 4\]"):
        model(x[:, :1], t, y)
    with pytest.raises(ConfigError, match="unknown model setting 'dept'; did you mean 'depth'"):
        build_model("Pixels-S", dept=2)
