"""Evaluation while training: off by default, no bit of the curve moves, and its numbers are those of the command."""

import json
import logging

import pytest

from dit_fast.cli import main as command
from dit_fast.errors import UserError
from dit_fast.evaluation.records import FILE_NAME, read_evaluations
from dit_fast.recipes import load
from dit_fast.runs import TrainConfig
from dit_fast.train import evaluation
from dit_fast.train.loop import train
from dit_fast.world import single
from tests.helpers.encoder_weights import toy_encoder
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.toy_runs import Ranks

CLOCK = ("seconds", "samples_per_s", "mfu")


def start(run, shards, *overrides, steps=5):
    fixed = [
        f"data.path={shards}", f"run.dir={run}", f"run.steps={steps}", "run.log_every=1", "run.checkpoint_every=2",
        "run.tensorboard=false", "engine.global_batch=8", "preview.every=0",
    ]  # fmt: skip
    train(load("quickstart", [*fixed, *overrides]), single())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def measured(every=2, **changes):
    given = {
        "every": every,
        "network": f"dinov2-vit-b:{toy_encoder()}",
        "count": 12,
        "num_steps": 1,
        "batch": 5,
        **changes,
    }
    return [f"evaluation.{key}={value}" for key, value in given.items()]


def test_the_curve_of_training_does_not_move(shards, tmp_path):
    assert TrainConfig().evaluation.every == 0
    plain = start(tmp_path / "plain", shards)
    assert not (tmp_path / "plain" / FILE_NAME).exists()
    assert start(tmp_path / "run", shards, *measured()) == plain
    rows = read_evaluations(tmp_path / "run")
    assert [each.step for each in rows] == [2, 4, 5]
    assert len({each.protocol for each in rows}) == 1
    # the command measures the same of the last checkpoint
    options = ["--network", f"dinov2-vit-b:{toy_encoder()}", "--count", "12", "--num-steps", "1", "--batch", "5"]
    assert command(["evaluate", str(tmp_path / "run"), *options, "--cfg-scale", "1", "-o", str(tmp_path / "out")]) == 0
    (again,) = read_evaluations(tmp_path / "out")
    assert again.protocol == rows[-1].protocol
    assert again.values == rows[-1].values


@pytest.mark.launch
def test_two_ranks_measure_what_one_does(shards, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    command_line = [
        "quickstart", f"data.path={shards}", f"run.dir={run}", "run.steps=2", "run.log_every=1",
        "run.checkpoint_every=0", "engine.global_batch=8", "preview.every=0", *measured(every=2),
    ]  # fmt: skip
    with Ranks(command_line, tmp_path / "log") as ranks:
        assert ranks.wait() == [0, 0], ranks.text()[-2000:]
    (two,) = read_evaluations(run)
    options = ["--network", f"dinov2-vit-b:{toy_encoder()}", "--count", "12", "--num-steps", "1", "--batch", "5"]
    assert command(["evaluate", str(run), *options, "--cfg-scale", "1", "-o", str(tmp_path / "out")]) == 0
    (one,) = read_evaluations(tmp_path / "out")
    assert one.protocol == two.protocol
    assert two.values == pytest.approx(one.values, rel=1e-6)
    written = events.EventAccumulator(str(run / "tensorboard"))
    written.Reload()
    for name, value in two.values.items():
        (scalar,) = written.Scalars(f"evaluation/{name}")
        assert (scalar.step, scalar.value) == (2, pytest.approx(value, rel=1e-6))


def test_what_a_kill_prevented_is_measured_at_the_next_start(shards, tmp_path):
    run = tmp_path / "run"
    start(run, shards, *measured(), steps=4)
    first = read_evaluations(run)
    lines = (run / FILE_NAME).read_text().splitlines(keepends=True)
    (run / FILE_NAME).write_text(lines[0])
    start(run, shards, *measured(), steps=4)
    assert read_evaluations(run) == first


def test_an_evaluation_that_fails_is_a_warning(shards, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise UserError("image 3: its pixels hold NaN")

    monkeypatch.setattr(evaluation, "draw_features", fail)
    with caplog.at_level(logging.WARNING):
        start(tmp_path / "run", shards, *measured(every=5))
    assert "step 5 was not evaluated: image 3: its pixels hold NaN; training goes on" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "vgg"}, "evaluation: network 'vgg': unknown encoder 'vgg'"),
        ({"sampler": "ddpm", "num_steps": 4}, "evaluation: sampler 'ddpm' does not fit"),
        ({"reference": "absent"}, "evaluation: absent: no such file"),
    ],
)
def test_what_cannot_be_measured_is_said_before_the_first_step(shards, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        start(tmp_path / "run", shards, *measured(**changes))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
