"""Runs as processes: failures alone, kills, and what is done stays done; with a stand-in for the trainer."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dit_fast import cli
from dit_fast.sweep import jobs, plan
from dit_fast.sweep.jobs import MANIFEST, find_slots, read_record, steps_done
from dit_fast.sweep.plan import from_words, members
from tests.helpers.cases import refused
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.toy_runs import ROOT, environment, wait_for


@pytest.fixture
def sweep(tmp_path, shards, monkeypatch):
    """Runs a sweep of these names in tmp_path/out; returns its status."""
    monkeypatch.setattr(jobs, "MODULES", {"dit-fast": "tests.sweep.fake_trainer"})
    monkeypatch.setattr(jobs, "POLL", 0.02)
    monkeypatch.setattr(plan.Member, "done", lambda member: (member.folder / "done").exists())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*names, more=()):
        path = tmp_path / "sweep.toml"
        path.write_text(f'changes = ["data.path={shards}"]\n[runs]\n' + "".join(f'{n} = "quickstart"\n' for n in names))
        return cli.main(["sweep", str(path), "--out", str(tmp_path / "out"), *more])

    return run


def states(out):
    return {each["folder"]: each["state"] for each in read_record(out)}


def starts(out, run):
    return len((out / run / "starts").read_text())


def test_a_failure_is_reported_and_loses_no_other_run(sweep, tmp_path, capsys):
    out = tmp_path / "out"
    assert sweep("bad", "good", more=["--seeds", "0,1", "--jobs", "2"]) == 1
    assert capsys.readouterr().out == f"{out}: 2 done, 2 failed\n"
    record = {each["folder"]: each for each in read_record(out)}
    assert record["bad/seed1"]["error"].startswith("data.path=x: is gone (see ")
    assert states(out) == {
        f"{n}/seed{s}": ("failed" if n == "bad" else "done") for n in ("bad", "good") for s in (0, 1)
    }
    (out / "mended").write_text("")
    assert sweep("bad", more=["--seeds", "1"]) == 0  # another call keeps what is known of other runs
    assert states(out)["bad/seed0"] == "failed"
    assert sweep("bad", "good", more=["--seeds", "0,1"]) == 0
    assert [starts(out, run) for run in sorted(record)] == [2, 2, 1, 1]


def test_ctrl_c_stops_the_runs_and_the_next_call_goes_on(sweep, tmp_path, capsys):
    out = tmp_path / "out"

    def interrupt():
        wait_for(lambda: (out / "slow/seed0/starts").exists())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert sweep("good", "slow", "later") == 130
    thread.join()
    assert (out / "slow/seed0/asked").exists()
    assert states(out) == {"good/seed0": "done", "slow/seed0": "stopped", "later/seed0": "waiting"}
    (out / "mended").write_text("")
    assert sweep("good", "slow", "later") == 0
    assert starts(out, "good/seed0") == 1
    assert "3 done" in capsys.readouterr().out


def test_progress_counts_what_was_logged(shards, tmp_path):
    (member,) = members(from_words(["quickstart", f"data.path={shards}"]), tmp_path)
    assert steps_done(member) == 0
    member.folder.mkdir(parents=True)
    (member.folder / "metrics.jsonl").write_text('{"step": 20}\n{"step": 40}\n{"ste')
    assert steps_done(member) == 40


def test_gpus_are_shared_out_and_cores_too(monkeypatch, shards, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    slots = find_slots(2, 2)
    assert slots.environment(1) == {"CUDA_VISIBLE_DEVICES": "3,1"}
    (member,) = members(from_words(["quickstart", f"data.path={shards}"]), tmp_path)
    assert jobs.shown(slots, member, 1).startswith("CUDA_VISIBLE_DEVICES=3,1 deepspeed --master_port ")
    assert "use --jobs 2" in refused(find_slots, 3, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert find_slots(2, 2).environment(0)["OMP_NUM_THREADS"] == "2"


def test_a_foreign_record_is_refused(tmp_path):
    for content in (b"[]", b"{", json.dumps({"format": 9, "runs": []}).encode(), b'{"format": 1, "runs": [3]}'):
        (tmp_path / MANIFEST).write_bytes(content)
        assert "is not the record of a sweep" in refused(read_record, tmp_path)


@pytest.mark.launch
def test_a_killed_sweep_takes_its_run_along_and_resumes_it(shards, tmp_path):
    out = tmp_path / "out"
    words = ["quickstart-sit", f"data.path={shards}", "engine.global_batch=4", "preview.every=0", "run.log_every=1"]
    words += ["run.checkpoint_every=0", "run.tensorboard=false"]
    command = [sys.executable, "-m", "dit_fast.cli", "sweep", *words, "run.steps=100000", "--out", str(out)]
    folder = out / "quickstart-sit/seed0"
    process = subprocess.Popen(command, env=environment(), cwd=ROOT)
    wait_for(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size)
    child = json.loads((folder / "lock.json").read_text())["pid"]
    process.kill()
    process.wait()
    wait_for(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2])
    (saved,) = (folder / "checkpoints").iterdir()
    steps = int(saved.name.removeprefix("step_")) + 2
    assert cli.main(["sweep", *words, f"run.steps={steps}", "--out", str(out)]) == 0
    assert states(out) == {"quickstart-sit/seed0": "done"}
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == steps
