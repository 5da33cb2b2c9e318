"""Diverged runs go back, leave samples out, and do the same again when they are killed and resumed."""

import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from dit_fast.data import Plan, build_loader, open_dataset
from dit_fast.data.index import index_from_bytes
from dit_fast.data.plan import first_position
from dit_fast.train import guard, loop, rollback
from dit_fast.train.__main__ import main
from dit_fast.train.engine import SingleEngine
from dit_fast.train.feed import Feed
from dit_fast.train.guard import Diverged, Guard, Spikes
from tests.helpers.damage import replace_member
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.toy_runs import Ranks, arguments, make_shards, rows, tensors


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Three skipped steps in a row end a run."""
    monkeypatch.setattr(loop, "Guard", partial(Guard, patience=3))


def history(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def poison(monkeypatch, batches):
    """NaN in these batches of 8 positions; returns the first position of every step that is taken."""
    real, taken = Feed.take, []

    def take(self):
        found = real(self)
        taken.append(int(found[0]["position"][0]))
        if taken[-1] // 8 in batches:
            found[0]["moments"].fill_(float("nan"))
        return found

    monkeypatch.setattr(Feed, "take", take)
    return taken


def same(first, second, step=12):
    a, b = tensors(first, step), tensors(second, step)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) and rows(first) == rows(second)


def test_a_streak_is_left_out_and_resumes_repeat_that(shards, tmp_path, monkeypatch, caplog):
    """The run is killed as soon as the decision is on the disk, and when it has gone on from there."""
    taken = poison(monkeypatch, range(5, 8))
    run = tmp_path / "run"
    assert main(arguments(shards, run)) == 0
    assert [place // 8 for place in taken] == [*range(8), *range(8, 16)]
    assert "no finite gradient in steps 6 to 8" in caplog.text
    assert "going back to step 4 and leaving out positions 32 to 63 (1 of at most 3 times)" in caplog.text
    (entry,) = history(run)
    assert (entry["step"], entry["to"], entry["left_out"]) == (8, 4, [32, 64])
    log = rows(run)
    assert [(row["step"], row["samples"], row.get("rollbacks", 0)) for row in log[3:5]] == [(4, 32, 0), (5, 40, 1)]
    assert [row["epoch"] for row in log[3:5]] == [round(32 / 48, 4), round(72 / 48, 4)]
    assert [row["skipped"] for row in log] == [0] * 12
    state = json.loads((run / "checkpoints/step_00000012/state.json").read_text())
    assert (state["samples_seen"], state["left_out"]) == (128, [[32, 64]])
    for killed_at in ("decision", "later"):
        again = tmp_path / killed_at
        command = arguments(shards, again)
        if killed_at == "decision":
            with monkeypatch.context() as context:
                append = rollback._append
                context.setattr(rollback, "_append", lambda *entry, append=append: append(*entry) or 1 / 0)
                assert main(command) == 1
        else:
            shutil.copytree(run, again)
            for step in (8, 12):
                shutil.rmtree(again / f"checkpoints/step_{step:08d}")
        assert main(command) == 0
        assert same(run, again)


def test_broken_weights_are_those_of_the_checkpoint_again(shards, tmp_path, monkeypatch, caplog):
    """A NaN among them makes every gradient NaN: skipping steps would never end."""
    real, broken = SingleEngine.train_step, []

    def train_step(self, batches, step, lr):
        result = real(self, batches, step, lr)
        if step == 4 and not broken:
            broken.append(step)
            dict(self.full_state("model"))["final_layer.linear.weight"].view(-1)[3] = float("nan")
        return result

    monkeypatch.setattr(SingleEngine, "train_step", train_step)
    assert main(arguments(shards, tmp_path / "run")) == 0
    assert "no finite gradient in steps 6 to 8 (none was applied); going back to step 4" in caplog.text
    (entry,) = history(tmp_path / "run")
    assert entry["left_out"] == [32, 64]
    assert all(torch.isfinite(tensor).all() for tensor in tensors(tmp_path / "run", 12).values())


BROKEN = ("run.steps=12", "run.log_every=2")


def break_moments(monkeypatch, batch=7):
    """Inf among the second moments, in the step of this batch of 8 positions: only its save can see it."""
    real = SingleEngine.train_step

    def train_step(self, batches, step, lr):
        result = real(self, batches, step, lr)
        if int(batches[0]["position"][0]) // 8 == batch:
            dict(self.full_state("exp_avg_sq"))["final_layer.linear.weight"].view(-1)[3] = float("inf")
        return result

    monkeypatch.setattr(SingleEngine, "train_step", train_step)


def test_a_save_that_finds_infinity_is_answered_alike_whatever_happens_meanwhile(shards, tmp_path, monkeypatch, caplog):
    """Known to the run at its next save, when it stops, or when it diverges otherwise, and always of the same step."""
    break_moments(monkeypatch)
    runs = {name: tmp_path / name for name in ("calm", "stopped", "killed", "worse")}
    assert main(arguments(shards, runs["calm"], *BROKEN)) == 0
    assert "exp_avg_sq of 'final_layer.linear.weight' is not finite after step 8, so no checkpoint" in caplog.text
    (entry,) = history(runs["calm"])
    assert (entry["step"], entry["to"], entry["left_out"]) == (8, 4, [32, 64])
    assert main(arguments(shards, runs["stopped"], *BROKEN, "run.steps=10")) == 0
    assert main(arguments(shards, runs["stopped"], *BROKEN)) == 0
    for name, error in (("killed", ZeroDivisionError), ("worse", Diverged("something else", (10, 10)))):
        with monkeypatch.context() as context:
            step = SingleEngine.train_step

            def train_step(self, batches, number, lr, step=step, error=error, done=[]):  # noqa: B006
                if number == 9 and not done:
                    done.append(number)
                    raise error
                return step(self, batches, number, lr)

            context.setattr(SingleEngine, "train_step", train_step)
            assert main(arguments(shards, runs[name], *BROKEN)) == (name == "killed")
        assert main(arguments(shards, runs[name], *BROKEN)) == 0
    for run in runs.values():
        assert history(run) == history(runs["calm"])
        assert same(runs["calm"], run), run


def test_checkpoints_that_are_undone_are_set_aside_and_stops_do_not_matter(shards, tmp_path, monkeypatch):
    """One run is asked to stop in between, and has a checkpoint more."""
    poison(monkeypatch, range(5, 8))
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    assert main(arguments(shards, calm, "run.log_every=2")) == 0
    assert main(arguments(shards, stopped, "run.steps=5", "run.log_every=2")) == 0
    assert (stopped / "checkpoints/step_00000005").is_dir()
    assert main(arguments(shards, stopped, "run.log_every=2")) == 0
    assert history(stopped) == history(calm)
    assert same(calm, stopped)
    names = sorted(path.name for path in (stopped / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000005.undone", "step_00000008", "step_00000012"]


def test_a_run_goes_back_so_often_and_no_more(shards, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, range(5, 99))
    run = tmp_path / "run"
    command = arguments(shards, run, "run.max_rollbacks=2")
    for _ in range(2):  # a restart does not begin to count anew
        assert main(command) == 3
        message = capsys.readouterr().err.splitlines()[-1]
        assert "no finite gradient in steps 5 to 7" in message, message
        assert "the run has gone back 2 times (run.max_rollbacks); the newest checkpoint is step 4" in message
    assert [entry["left_out"] for entry in history(run)] == [[32, 64], [64, 88]]


def test_without_a_checkpoint_from_before_it_ends(shards, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, range(2, 99))
    assert main(arguments(shards, tmp_path / "run")) == 3
    message = (
        "steps 3 to 5 (none was applied); no checkpoint is from before that, to go back to; the newest checkpoint is"
    )
    assert message in capsys.readouterr().err


def test_a_damaged_history_is_named(shards, tmp_path, capsys):
    run = tmp_path / "run"
    for text in ("7", '{"cause": "", "step": 4, "to": 8, "left_out": [0, 8]}', '{"cause": "x"}', "[" * 100_000):
        run.mkdir(exist_ok=True)
        (run / "history.jsonl").write_text(text + "\n")
        assert main(arguments(shards, run)) == 2
        assert re.search(r"history\.jsonl: cannot be read .*; restore it", capsys.readouterr().err.splitlines()[-1])


def test_spikes_are_far_above_a_median():
    spikes = Spikes("loss", 8.0)
    rng = np.random.default_rng(0)
    for step, value in enumerate(rng.normal(1, 0.1, 300), 1):
        spikes.add(step, float(value))
    assert len(spikes.values) == guard.SPIKE_WINDOW
    spikes.add(301, 0.0)  # far below is none
    with pytest.raises(Diverged, match=r"loss of step 302 is 3, .* robust standard deviations above the median .* 200"):
        spikes.add(302, 3.0)
    with pytest.raises(Diverged):
        spikes.add(303, float("nan"))
    alike = Spikes("loss", 8.0, [1.0] * guard.SPIKE_LEAST)
    alike.add(1, 1.0)
    with pytest.raises(Diverged):
        alike.add(2, 1.1)


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """240 samples, of which the one that stands at position 202 (step 26) is far too loud: a loss spike."""
    shards = make_shards(tmp_path_factory.mktemp("loud"), count=240)
    sample = int(Plan([16] * 15, 0, 0).indices(202, 203)[0])
    tar = sorted(shards.glob("*.tar"))[sample // 16]
    index = index_from_bytes(tar.with_suffix(".idx").read_bytes(), "index")
    column, row = index.members.index("moments.npy"), sample % 16
    start, length = int(index.offset[row, column]), int(index.length[row, column])
    payload = bytearray(tar.read_bytes()[start : start + length])
    moments = np.frombuffer(payload, np.float16, offset=128)
    moments[: len(moments) // 2] = 1000
    replace_member(shards, tar, row, column, bytes(payload))
    return shards


SPIKE = ("run.steps=28", "run.checkpoint_every=8", "run.log_every=4", "run.loss_spike=30", "run.grad_spike=30")


@pytest.fixture(scope="module")
def spiked(loud, tmp_path_factory):
    run = tmp_path_factory.mktemp("spiked") / "run"
    assert main(arguments(loud, run, *SPIKE)) == 0
    return run


def test_a_spike_is_left_out_also_by_a_resumed_run(loud, spiked, tmp_path):
    """The values before the spike are kept with the checkpoint."""
    (entry,) = history(spiked)
    assert (entry["step"], entry["to"], entry["left_out"]) == (26, 24, [192, 208])
    again = shutil.copytree(spiked, tmp_path / "again")
    shutil.rmtree(again / "checkpoints/step_00000028")
    (again / "history.jsonl").unlink()  # killed before the decision
    assert main(arguments(loud, again, *SPIKE)) == 0
    assert history(again) == history(spiked)
    assert same(spiked, again, 28)


@pytest.mark.launch
def test_two_ranks_leave_out_what_one_does(loud, spiked, tmp_path):
    with Ranks(arguments(loud, tmp_path / "two", *SPIKE), tmp_path / "log") as ranks:
        assert ranks.wait() == [0, 0], ranks.text()
    assert "going back to step 24 and leaving out positions 192 to 207" in ranks.text()
    (ours,), (theirs,) = history(spiked), history(tmp_path / "two")
    assert (ours["step"], ours["to"], ours["left_out"]) == (theirs["step"], theirs["to"], theirs["left_out"])
    for a, b in zip(rows(spiked), rows(tmp_path / "two"), strict=True):
        assert (a["step"], a["epoch"], a.get("rollbacks")) == (b["step"], b["epoch"], b.get("rollbacks"))
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)


def test_the_loader_leaves_windows_out_for_every_world_size_and_reader(shards):
    left_out = [(16, 32), (40, 48), (32, 40), (72, 80)]
    dataset = open_dataset(shards)
    plan = Plan(dataset.info.shard_sizes, 0, 1)
    expected = [place for place in range(104) if not (16 <= place < 48 or 72 <= place < 80)]
    assert [first_position(step, 8, left_out) for step in range(8)] == expected[:64:8]
    for size, reader in ((1, "indexed"), (2, "indexed"), (2, "stream")):
        found = {}
        for rank in range(size):
            sizes = {"global_batch": 8, "micro_batch": 4, "rank": rank, "world_size": size}
            loader = build_loader(dataset, plan, **sizes, start=8, left_out=left_out, reader=reader)
            for _ in range(14 // size):
                batch = next(loader)
                found |= dict(zip(batch["position"].tolist(), batch["label"].tolist(), strict=True))
        labels = dataset.labels[plan.indices(0, 104)]
        assert found == {place: labels[place] for place in expected[8:64]}
