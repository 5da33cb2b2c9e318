"""Recording reference curves, with runs of four steps."""

import json

import pytest

from dit_fast.benchmarks import curves
from dit_fast.benchmarks.__main__ import main
from dit_fast.benchmarks.curves import record_curves
from dit_fast.data import open_dataset
from dit_fast.errors import UserError
from dit_fast.report import reference
from dit_fast.report.reference import read_reference
from tests.helpers.toy_runs import make_shards


@pytest.fixture
def shards(tmp_path, monkeypatch):
    for name, value in {"STEPS": 4, "EVERY": 2}.items():
        monkeypatch.setattr(curves, name, value)
        monkeypatch.setattr(reference, name, value)
    short = ("run.steps=4", "run.log_every=2", "preview.every=0", "run.tensorboard=false", "engine.global_batch=4")
    monkeypatch.setattr(curves, "SHORT", short)
    return str(make_shards(tmp_path))


def test_three_runs_are_recorded_once(shards, tmp_path, monkeypatch):
    said = []
    (path,) = record_curves(shards, tmp_path, ["quickstart-sit"], say=said.append)
    content, found = json.loads(path.read_text()), read_reference(path)
    assert content["data"]["fingerprint"] == open_dataset(shards).info.fingerprint
    assert {"versions", "commit", "command", "device", "remark"} <= content.keys()
    assert [run["seed"] for run in content["runs"]] == [0, 1, 2]
    assert found.runs.keys() == {"loss", "flow", "grad_norm"}
    assert len({tuple(values) for values in found.runs["flow"].tolist()}) == 3
    assert "run 3 of 3, about 0 minutes left" in said[-1]
    assert record_curves(shards, tmp_path, ["quickstart-sit"], say=said.append) == []
    assert said[-1] == "quickstart-sit: is there, of the same configuration and data"
    monkeypatch.setattr(curves, "SHORT", (*curves.SHORT, "optimizer.lr=1e-4"))
    assert record_curves(shards, tmp_path, ["quickstart-sit"], say=said.append) == [path]
    assert "quickstart-sit: to be recorded (optimizer.lr: 0.002 -> 0.0001)" in said


def test_each_stage_has_a_curve(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "SEEDS", (0, 1))
    more = (f"methods.self_transcendence.{key}" for key in ("stage1_steps=6", "student_depth=2", "teacher_depth=3"))
    monkeypatch.setattr(curves, "SHORT", (*curves.SHORT, *more))
    paths = record_curves(shards, tmp_path, ["quickstart-self_transcendence"], say=lambda line: None)
    assert [path.stem.removeprefix("quickstart-self_transcendence-") for path in paths] == ["stage1", "stage2"]
    found = [read_reference(path) for path in paths]
    assert [reference.runs["loss"].shape for reference in found] == [(2, 2), (2, 2)]
    assert found[0].runs.keys() != found[1].runs.keys()
    assert record_curves(shards, tmp_path, ["quickstart-self_transcendence"], say=lambda line: None) == []


def test_other_recipes_are_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="'sit-b2-256' is no recipe of quick-start size; those are: quickstart, "):
        record_curves("shards", tmp_path, ["sit-b2-256"])
    assert main(["curves", "--out", str(tmp_path), "--only", "quickstart", "--data", str(tmp_path)]) == 2
    assert "dataset.json" in capsys.readouterr().err
