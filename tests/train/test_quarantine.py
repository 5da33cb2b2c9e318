"""A run with bad samples goes on with others, lists and counts them, and ends where there are too many."""

import json

import pytest
import torch

from dit_fast.checkpoint.step import step_folders
from dit_fast.train.__main__ import main
from tests.data.test_bad_samples import corrupt, poison
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.toy_runs import Ranks, arguments, make_shards, rows, tensors

ALLOWED = "data.max_bad_share=0.1"


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Two bad samples of 48."""
    folder = make_shards(tmp_path_factory.mktemp("bad"))
    poison(folder, 5)
    corrupt(folder, 20)
    return folder


def listed(run):
    return [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(bad, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(bad, run, ALLOWED, "run.log_every=3", "data.num_workers=0")) == 0
    return run


def test_bad_samples_are_listed_and_counted(whole):
    found = listed(whole)
    assert sorted(row["key"] for row in found) == sorted(2 * ["000000005", "000000020"])  # 96 positions: two epochs
    assert [row["position"] // 8 + 1 for row in found] == [row["step"] for row in found]
    assert [row["position"] for row in found] == sorted(row["position"] for row in found)
    assert {row["shard"] for row in found} == {"shard-000000.tar", "shard-000001.tar"}
    assert all(row["key"] in row["error"] and row["replaced_by"] not in row["error"] for row in found)
    counted = {row["step"]: row["bad_samples"] for row in rows(whole) if "bad_samples" in row}
    ends = [next(end for end in (3, 4, 6, 8, 9, 12) if row["step"] <= end) for row in found]
    assert counted == {end: ends.count(end) for end in ends}  # only where there was one


def test_a_stopped_run_lists_and_learns_the_same(bad, whole, tmp_path):
    run = tmp_path / "run"
    options = [ALLOWED, "run.log_every=3", "run.checkpoint_every=4"]
    assert main(arguments(bad, run, *options, "run.steps=10")) == 0
    with (run / "quarantine.jsonl").open("a") as file:  # of steps that a kill has undone
        file.write(json.dumps({**listed(whole)[0], "step": 11}) + "\n{")
    assert main(arguments(bad, run, *options, "data.reader=stream", f"data.cache={tmp_path}/cache")) == 0
    assert listed(run) == listed(whole)
    ours, theirs = tensors(run, 12), tensors(whole, 12)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_too_many_end_the_run_saved_and_once_more_at_the_start(bad, tmp_path, capsys):
    run, options = tmp_path / "run", ["run.checkpoint_every=0", "run.log_every=1"]
    said = []
    for _ in range(2):
        assert main(arguments(bad, run, *options)) == 2
        said.append([line for line in capsys.readouterr().err.splitlines() if " error: " in line])
    assert said[0] == said[1]
    (line,) = said[0]
    assert "quarantine.jsonl: lists 1 bad samples of 48 (0.0208), data.max_bad_share is 0.001; mend the data" in line
    (step,) = [step for step, _ in step_folders(run)]
    assert step == listed(run)[0]["step"] == rows(run)[-1]["step"]
    assert main(arguments(bad, run, *options, ALLOWED)) == 0
    assert len(listed(run)) == 4


@pytest.mark.launch
def test_two_ranks_list_the_same(bad, whole, tmp_path):
    with Ranks(arguments(bad, tmp_path / "two", ALLOWED, "run.log_every=3"), tmp_path / "log") as ranks:
        assert ranks.wait() == [0, 0], ranks.text()
    assert listed(tmp_path / "two") == listed(whole)
    two = {row["step"]: row.get("bad_samples") for row in rows(tmp_path / "two")}
    assert two == {row["step"]: row.get("bad_samples") for row in rows(whole)}
    assert ranks.text().count("instead") == 4  # said by one rank alone
