"""`stop_step` of any method: from that optimizer step on nothing of it is computed."""

from dataclasses import make_dataclass
from types import SimpleNamespace

import pytest
import torch

from dit_fast.data.field import Field
from dit_fast.errors import ConfigError
from dit_fast.methods import METHODS, Method, build_methods
from dit_fast.methods.base import active
from dit_fast.objectives import Flow
from dit_fast.train.__main__ import main
from dit_fast.train.engine import SingleEngine
from dit_fast.train.loss import TrainingLoss
from tests.helpers.parts import settings
from tests.helpers.tiny_sit import tiny_sit
from tests.helpers.toy_runs import arguments, rows, tensors

SHAPES = {"features": (16, 6), "class_token": (6,)}
INFO = SimpleNamespace(field=lambda name: Field(f"{name}.npy", SHAPES[name], "float16"))
STOP = 3


def options(name):
    return {
        "diversedit": {"pairs": "all", "low": 0.0},
        "repa": {"encoder_depth": 2, "projector_width": 8},
        "reg": {"encoder_depth": 2, "projector_width": 8},
        "sra": {"student_depth": 2, "teacher_depth": 3},
    }[name]


def training(*names, class_token=0):
    torch.manual_seed(0)
    model = tiny_sit(in_channels=2, num_classes=5, class_token=class_token)
    methods = build_methods([METHODS[name].Config(**options(name), stop_step=STOP) for name in names], model, INFO)
    return TrainingLoss(model, Flow(Flow.Config(), model), methods, seed=0)


def batch():
    generator = torch.Generator().manual_seed(0)
    fields = {name: torch.randn(3, *shape, generator=generator) for name, shape in SHAPES.items()}
    moments = torch.rand(3, 2, 2, 8, 8, generator=generator)
    return {"moments": moments, "label": torch.tensor([0, 3, 4]), "position": torch.arange(3), **fields}


@pytest.mark.parametrize(("step", "stop", "counts"), [(0, 0, True), (9, 0, True), (2, 3, True), (3, 3, False)])
def test_zero_never_stops(step, stop, counts):
    assert active(step, stop) is counts


def test_from_the_stop_on_taps_collectors_teachers_and_terms_are_gone(monkeypatch):
    loss, seen = training("diversedit", "repa", "sra"), []
    run = loss.objective.run
    monkeypatch.setattr(loss.objective, "run", lambda *given: seen.append(given[4]) or run(*given))
    _, before = loss(batch(), STOP - 1)
    assert {"diversedit/total", "repa/alignment", "sra/alignment"} <= before.keys()
    assert seen[0].blocks
    loss.methods[2].teacher.forward = None  # may not run
    value, after = loss(batch(), STOP)
    assert after.keys() == {"loss", "flow"}
    assert not seen[1].blocks
    assert not seen[1].collectors
    assert [method.teachers for method in loss.methods] == [(), (), ()]
    assert torch.equal(value, training()(batch(), STOP)[0])


def test_reg_goes_on_with_its_class_token():
    loss = training("reg", class_token=6)
    value, logs = loss(batch(), STOP)
    assert logs.keys() == {"loss", "flow", "reg/class_token"}
    torch.testing.assert_close(value, logs["flow"] + 0.03 * logs["reg/class_token"])


def test_a_method_whose_state_the_model_denoises_is_refused_a_stop(monkeypatch):
    class Inverted(METHODS["dispersive"]):
        name = "inverted"

        def state(self, x, batch, key):
            return -x

    monkeypatch.setitem(METHODS, "inverted", Inverted)
    named = {"name": "inverted"}
    config = make_dataclass("Config", [("stop_step", int, 5)], bases=(Inverted.Config,), namespace=named, frozen=True)
    with pytest.raises(ConfigError, match=r"methods\.inverted\.stop_step=5: the model denoises what this method makes"):
        build_methods([config()], tiny_sit(in_channels=2), INFO)


def test_a_run_killed_on_either_side_of_the_stop_resumes_with_equal_bits(token_shards, tmp_path, monkeypatch):
    """A moving teacher stands still from then on, and a logged mean is that of the steps that had the term."""
    stops = [f"methods.{name}.stop_step={STOP}" for name in ("sra", "repa")]
    options = [*settings(("repa", "sra"), 6), *stops, "run.checkpoint_every=2", "run.log_every=4"]
    real, moved, after_update = SingleEngine.train_step, [], METHODS["sra"].after_update
    sra = METHODS["sra"]
    monkeypatch.setattr(sra, "after_update", lambda self, *given: moved.append(1) or after_update(self, *given))
    assert main(arguments(token_shards, tmp_path / "once", *options)) == 0
    assert len(moved) == STOP
    for stop in (2, 4):
        run = tmp_path / f"killed{stop}"

        def train_step(self, batches, step, lr, stop=stop):
            if step == stop:
                raise RuntimeError("killed")
            return real(self, batches, step, lr)

        monkeypatch.setattr(SingleEngine, "train_step", train_step)
        assert main(arguments(token_shards, run, *options)) == 1
        monkeypatch.setattr(SingleEngine, "train_step", real)
        assert main(arguments(token_shards, run, *options)) == 0
        ours, theirs = tensors(run, 6), tensors(tmp_path / "once", 6)
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
        assert rows(run) == rows(tmp_path / "once")
    logged = rows(tmp_path / "once")
    assert ["sra/alignment" in row for row in logged] == [True, True, False]
    alone = [*settings(("repa", "sra"), 3), *stops, "run.checkpoint_every=2", "run.log_every=1"]
    assert main(arguments(token_shards, tmp_path / "short", *alone)) == 0
    assert logged[1]["sra/alignment"] == rows(tmp_path / "short")[2]["sra/alignment"]


def test_a_method_without_a_configuration_never_stops():
    assert Method.active(SimpleNamespace(config=Method.config), 10**9)
