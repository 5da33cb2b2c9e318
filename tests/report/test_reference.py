"""Whether a run lies on a reference curve: the rule on made-up and on recorded runs, and what the report says."""

import json
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from dit_fast.benchmarks.results import write
from dit_fast.checkpoint.run import load_run
from dit_fast.cli import main
from dit_fast.errors import DataError
from dit_fast.options import to_dict
from dit_fast.report import reference, story
from dit_fast.report.metrics import Metrics, read_metrics
from dit_fast.report.reference import (
    EVERY,
    FOLDER,
    STEPS,
    Reference,
    data_identity,
    differences,
    find_verdict,
    judge,
    read_reference,
    student,
)
from dit_fast.runs import changed

ENDS = np.arange(EVERY, STEPS + 1, EVERY)
RECORDED = sorted(FOLDER.glob("*.json"))


def metrics(columns, every=EVERY):
    """The log of a run from its points at ENDS, with a row every `every` steps."""
    rows = [{"step": int(end), "lr": 1e-3, "seconds": 1.0} for end in ENDS[ENDS % every == 0]]
    for name, values in columns.items():
        for row, value in zip(rows, np.reshape(values, (len(rows), -1)).mean(1), strict=True):
            row[name] = float(value)
    return Metrics(tuple(rows))


def made_up(seed, runs=3):
    """Runs of a falling loss and of a term that is steep at first, each with noise and an offset of its own."""
    rng = np.random.default_rng(seed)
    loss, term = 1 + np.exp(-ENDS / 60), -1 + np.exp(-ENDS / 20)
    noise = rng.normal(0, 0.01, (2, runs, len(ENDS))) + rng.normal(0, 0.005, (2, runs, 1))
    return {"loss": loss + noise[0], "term": term + noise[1] * (1 + 5 * np.exp(-ENDS / 20))}


def a_reference(values):
    return Reference("quickstart-toy", None, {}, values)


def taken(values, run):
    return {name: runs[run] for name, runs in values.items()}


def test_quantiles_of_students_distribution():
    for freedom, tail, quantile in ((2, 0.05, 4.303), (10, 0.05, 2.228), (20, 1e-4, 4.837), (1, 0.5, 1.0)):
        assert student(freedom, tail) == pytest.approx(quantile, rel=1e-3)


def test_false_alarms_are_rare():
    values, off = made_up(0, runs=1200), 0
    for first in range(0, 1200, 4):
        known = {name: runs[first : first + 3] for name, runs in values.items()}
        off += not judge(a_reference(known), metrics(taken(values, first + 3))).on
    assert off <= 3  # of 300; 0.1 % is nominal, and what sets a whole run apart from the others makes it more


@pytest.mark.parametrize("every", [10, 20, 50])
def test_a_run_is_judged_however_often_it_logs(every):
    values = made_up(1, runs=4)
    known = a_reference({name: runs[:3] for name, runs in values.items()})
    verdict = judge(known, metrics(taken(values, 3), every))
    assert verdict.on
    assert "On the reference curve of quickstart-toy: all 2 quantities" in verdict.text
    assert verdict.bands["loss"].steps.tolist() == list(range(max(every, 20), 201, max(every, 20)))
    late = taken(values, 3)
    late["term"] = late["term"] + 0.2 * (ENDS > 100)
    verdict = judge(known, metrics(late, every))
    assert verdict.on is False
    assert f" at step {100 + max(every, 20)}, outside " in verdict.text
    assert not verdict.bands["loss"].outside.any()


def test_a_run_that_logs_elsewhere_or_is_short_or_has_other_terms():
    values = made_up(2, runs=4)
    known, run = a_reference({name: runs[:3] for name, runs in values.items()}), taken(values, 3)
    rare = judge(known, metrics(run, 100))
    assert rare.on is None
    assert "needs rows at 4 or more multiples of 10" in rare.text
    short = judge(known, Metrics(metrics(run).rows[:-1]))
    assert short.on is None
    assert "has 200 steps, and this run has 190 so far" in short.text
    assert judge(known, metrics({"loss": run["loss"]})).text.endswith("it does not log term.")
    assert judge(known, metrics({**run, "toy/x": run["loss"]})).text.endswith("it also logs toy/x.")
    run["loss"] = np.where(ENDS == 200, np.nan, run["loss"])
    assert judge(known, metrics(run)).on is False


def test_what_never_varies_has_the_least_width():
    known = a_reference({"weight": np.ones((3, len(ENDS)))})
    assert judge(known, metrics({"weight": np.full(len(ENDS), 1.009)})).on
    assert judge(known, metrics({"weight": np.full(len(ENDS), 1.011)})).on is False


@pytest.fixture(scope="module")
def trained():
    """Runs of quickstart-diversedit-repa on Twemoji: five seeds, and one with three times the learning rate."""
    path = Path(__file__).parents[1] / "data" / "quickstart_diversedit_repa_runs.json"
    return json.loads(path.read_text())


def test_any_three_trained_runs_have_the_others_on_their_curve(trained):
    seeds = [name for name in trained if name.startswith("seed ")]
    for known in combinations(seeds, 3):
        curve = a_reference({name: np.array([trained[seed][name] for seed in known]) for name in trained[seeds[0]]})
        for other in {*seeds} - {*known}:
            verdict = judge(curve, metrics(trained[other]))
            assert verdict.on, (known, other, verdict.text)


def test_trained_runs_with_a_mistake_are_off(trained):
    known = [trained[f"seed {seed}"] for seed in range(3)]
    curve, right = a_reference({name: np.array([run[name] for run in known]) for name in known[0]}), trained["seed 3"]
    flow = np.array(right["flow"])
    for mistake in (
        trained["optimizer.lr=6e-3, seed 0"],
        {name: values for name, values in right.items() if name != "repa/alignment"},
        right | {"loss": right["flow"]},  # no term is added
        right | {"flow": 1.15 * flow},
        right | {"grad_norm": 2 * np.array(right["grad_norm"])},
        right | {"flow": np.concatenate([flow[:10], np.full(10, flow[10])])},  # learns no more
    ):
        assert judge(curve, metrics(mistake)).on is False


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_each_recorded_run_lies_on_the_curve_of_the_others(path):
    found = read_reference(path)
    assert path.stem == found.recipe
    for run in range(3):
        others = {name: np.delete(values, run, 0) for name, values in found.runs.items()}
        verdict = judge(a_reference(others), metrics(taken(found.runs, run)))
        assert verdict.on, verdict.text
    scaled = {name: 1.25 * values for name, values in taken(found.runs, 0).items()}
    assert judge(found, metrics(scaled)).on is False


@pytest.fixture
def folder(place, tmp_path, monkeypatch):
    """A curve of the configuration of the run `diverse`, long enough for its few steps."""
    monkeypatch.setattr(reference, "STEPS", 4)
    monkeypatch.setattr(reference, "EVERY", 2)
    monkeypatch.setattr(reference, "WINDOW", 2)
    monkeypatch.setattr(reference, "FEWEST", 2)
    loaded, log = load_run(place / "diverse"), read_metrics(place / "diverse")
    values = {name: log.column(name)[1] for name in reference.quantities(log)}
    runs = [{"values": {name: (value * scale).tolist() for name, value in values.items()}} for scale in (0.9, 1, 1.1)]
    data, config = data_identity(loaded.dataset().info, ()), to_dict(loaded.config)
    content = {"recipe": "quickstart-toy", "data": data, "config": config, "runs": runs}
    write(tmp_path / "curves" / "quickstart-toy.json", content)
    return tmp_path / "curves"


def test_the_report_says_where_a_run_stands(folder, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(story, "find_verdict", partial(find_verdict, folder=folder))
    runs = [str(place / "diverse"), "--baseline", str(place / "plain")]
    assert main(["report", *runs, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "diverse: On the reference curve of quickstart-toy" in said
    assert "plain: No reference curve for this configuration and data; the nearest, quickstart-toy, differs in" in said
    assert (tmp_path / "out" / "reference.png").exists()
    assert ">Reference curve</h2>" in (tmp_path / "out" / "report.html").read_text()


def test_seeds_paths_and_length_are_free_and_other_data_are_not(folder, place):
    loaded = load_run(place / "diverse")
    info, known = loaded.dataset().info, read_reference(folder / "quickstart-toy.json")
    free = ["run.seed=5", "data.seed=6", "run.noise_seed=7", "run.dir=x", "data.path=y", "run.steps=900"]
    assert differences(known, changed(loaded.config, free), info) == []
    assert differences(known, changed(loaded.config, ["optimizer.lr=1"]), info) == ["optimizer.lr: 0.002 -> 1.0"]
    other = Reference(known.recipe, known.config, known.data | {"source": "abc", "fields": {"features": "lite"}}, {})
    assert differences(other, loaded.config, info) == ["the source of the data", "the fields of the data"]
    moved = Reference(known.recipe, known.config, known.data | {"fingerprint": "of another machine"}, {})
    assert differences(moved, loaded.config, info) == []


ONE_POINT = '{"recipe": "x", "config": {}, "data": {}, "runs": [{"values": {"loss": [1]}}]}'


@pytest.mark.parametrize("text", ["", "[]", "{}", ONE_POINT])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json: .*; record it again"):
        read_reference(tmp_path / "x.json")
