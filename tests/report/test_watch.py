"""`dit-fast watch` on runs that go on, have ended or died, and on folders full of rubbish."""

import json
import os

import pytest

from dit_fast.cli import main
from dit_fast.train.lock import kernel


def write(run, rows, steps=100, holder=None):
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text(json.dumps({"run": {"steps": steps}}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "lock.json").write_text(json.dumps(holder) if holder else "")
    (run / f"checkpoints/step_{rows[-1]['step']:08d}").mkdir(parents=True, exist_ok=True)


def row(step, **more):
    return {"step": step, "loss": 1.5, "grad_norm": 0.25, "samples_per_s": 800.0, "seconds": step / 2, **more}


def table(capsys, run):
    assert main(["watch", str(run), "--once"]) == 0
    out = capsys.readouterr().out
    return {line[:16].strip(): line[16:] for line in out.splitlines()}


def test_a_run_that_goes_on_has_died_or_is_done(tmp_path, capsys):
    boot, namespace = kernel()
    me = {"host": "here", "pid": os.getpid(), "boot": boot, "namespace": namespace}
    slow = {"slowest_rank": 3, "slowest_data": 0.5, "slowest_compute": 0.4, "slowest_collective": 0.1, "waiting": 0.3}
    write(tmp_path / "a", [row(10), row(20, mfu=0.25, skipped=2, **slow)], holder=me)
    back = {"cause": "no finite gradient in steps 6 to 8", "step": 8, "to": 4, "left_out": [32, 64]}
    (tmp_path / "a/history.jsonl").write_text(json.dumps(back) + "\n")
    bad = [{"step": step, "error": f"shard-000001.tar: {step:09d} is corrupt" + " " * 90} for step in range(1, 2001)]
    (tmp_path / "a/quarantine.jsonl").write_text("".join(json.dumps(each) + "\n" for each in bad))
    found = table(capsys, tmp_path / "a")
    assert found["run"].endswith(f"running (process {os.getpid()} on here)")
    assert found["step"] == "20 of 100"
    assert found["slowest rank"] == "3 (data 50.0%, compute 40.0%, collective 10.0%), others wait 30.0%"
    assert (found["time left"], found["checkpoint"]) == ("0:00:40", "step 20")
    assert found["skipped steps"] == "2 in the newest 2 rows"
    assert found["rollbacks"] == "1, the last: step 8 back to 4, no finite gradient in steps 6 to 8"
    assert found["bad samples"].rstrip() == "2000, the last: step 2000, shard-000001.tar: 000002000 is corrupt"
    write(tmp_path / "a", [row(10), row(20)], holder={**me, "pid": 1 << 30})
    assert "dead" in table(capsys, tmp_path / "a")["run"]
    write(tmp_path / "a", [row(10), row(20)])
    assert table(capsys, tmp_path / "a")["run"].endswith("stopped")
    write(tmp_path / "a", [row(10), row(100)])
    assert table(capsys, tmp_path / "a")["run"].endswith("finished")


@pytest.mark.parametrize(
    "rubbish",
    [b"", b"\xff\x00", b"[]", b"7", b"[" * 9000, b'{"step": 1e999}', b'{"run": 7, "pid": {}, "host": "\\u001b[2J"}',
     b'{"step": 3, "loss": "x", "slowest_rank": [], "seconds": null, "pid": -1}', b'{"step": ' + b"9" * 4000 + b"}"],
)  # fmt: skip
def test_rubbish_is_passed_over(tmp_path, capsys, rubbish):
    for name in ("config.json", "metrics.jsonl", "lock.json", "history.jsonl", "quarantine.jsonl"):
        (tmp_path / name).write_bytes(rubbish)
    assert "\x1b" not in "".join(table(capsys, tmp_path).values())


def test_no_run_is_one_line(tmp_path, capsys):
    assert main(["watch", str(tmp_path), "--once"]) == 2
    assert "is no run folder" in capsys.readouterr().err
