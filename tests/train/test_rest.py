"""Whole runs with state that no optimizer trains: buffers of the model and a method's teacher."""

import pytest
import torch

from dit_fast.methods import Method
from dit_fast.train import loop
from dit_fast.train.__main__ import main
from dit_fast.train.engine import SingleEngine
from dit_fast.train.rest import digest
from tests.helpers.toy_runs import arguments, tensors


class Follower(Method):
    """Counts forwards and averages the time in buffers of the model; a teacher follows the head's bias."""

    name, averaged = "follower", ("time",)

    def __init__(self, model):
        model.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        model.register_buffer("time", torch.zeros(()))
        self.teacher = model.final_layer.linear.bias.detach().clone()

    def terms(self, context):
        context.model.forwards += 1
        context.model.time.lerp_(context.t.mean(), 0.25)
        return {}

    def tensors(self):
        return {"bias": self.teacher}

    def after_update(self, model, applied):
        self.teacher.lerp_(model.final_layer.linear.bias, 0.5 * applied)


@pytest.fixture
def following(monkeypatch):
    monkeypatch.setattr(loop, "build_methods", lambda configs, model, data: (Follower(model),))


def test_untrained_state_survives_a_kill(shards, tmp_path, monkeypatch, following):
    once, killed, real = tmp_path / "once", tmp_path / "killed", SingleEngine.train_step
    assert main(arguments(shards, once, "run.steps=8")) == 0

    def train_step(self, batches, step, lr):
        if step == 6:
            raise RuntimeError("killed")
        return real(self, batches, step, lr)

    monkeypatch.setattr(SingleEngine, "train_step", train_step)
    assert main(arguments(shards, killed, "run.steps=8")) == 1
    monkeypatch.setattr(SingleEngine, "train_step", real)
    assert main(arguments(shards, killed, "run.steps=8")) == 0
    expected, found = tensors(once, 8), tensors(killed, 8)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert expected["model/forwards"] == 8 * 4
    assert 0 < expected["ema/time"] < expected["model/time"] < 1
    assert not torch.equal(expected["rest/follower.bias"], expected["model/final_layer.linear.bias"])


@pytest.mark.parametrize(("shape", "message"), [((1,), "rest of 'follower.bias' is F32 [48]"), (None, "unknown to")])
def test_other_tensors_of_a_method_are_refused(shards, tmp_path, monkeypatch, capsys, following, shape, message):
    assert main(arguments(shards, tmp_path, "run.steps=1")) == 0
    kept = {} if shape is None else {"bias": torch.zeros(shape)}
    monkeypatch.setattr(Follower, "tensors", lambda self: kept)
    assert main(arguments(shards, tmp_path, "run.steps=2")) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("averaged", ("forwards",), "method 'follower' averages 'forwards', which is no saved buffer of floats"),
        ("tensors", lambda self: {"x": torch.ones(1) * 1j}, "'follower.x' is torch.complex64, which a checkpoint"),
    ],
)
def test_what_cannot_be_saved_is_refused_at_once(
    shards, tmp_path, monkeypatch, capsys, following, attribute, value, message
):
    monkeypatch.setattr(Follower, attribute, value)
    assert main(arguments(shards, tmp_path, "run.checkpoint_every=0")) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_a_digest_sees_values_places_and_signs_of_zero(dtype):
    values = torch.tensor([0, 1, 0, 3], dtype=dtype)
    others = [values.flip(0), values[[0, 2, 1, 3]], values[:3], torch.zeros(4, dtype=dtype)]
    others += [-values] if dtype.is_floating_point else []
    assert len({digest(x).item() for x in (values, *others)}) == 1 + len(others)
    assert digest(values.clone()) == digest(values)
