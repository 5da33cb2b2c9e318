"""The suite ends in time, whatever its parts do, and says how each ended."""

import json
import sys

import pytest

from dit_fast.benchmarks import gpu_suite
from dit_fast.benchmarks.cases import BENCHMARKS
from dit_fast.benchmarks.gpu_suite import SHARES, Part, run_parts


def part(name, code, share=1.0):
    return Part(name, share, lambda seconds: [sys.executable, "-c", code])


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path):
    parts = [
        part("hangs", "import time; print('begun', flush=True); time.sleep(60)"),
        part("fails", "print('reason'); raise SystemExit(3)"),
        part("works", f"open({str(tmp_path / 'written')!r}, 'w').write('x')", share=4.0),
    ]
    lines = []
    outcomes = run_parts(parts, 6.0, cwd=tmp_path, say=lines.append)
    assert [outcome.status for outcome in outcomes] == ["stopped", "failed", "ok"]
    assert outcomes[0].tail == ["begun"]
    assert outcomes[1].tail == ["reason"]
    assert sum(outcome.seconds for outcome in outcomes) < 12
    assert (tmp_path / "written").exists()
    assert "reason" in lines


def test_time_that_is_left_goes_to_the_next_part(tmp_path):
    told = []

    def command(seconds):
        told.append(seconds)
        return [sys.executable, "-c", ""]

    run_parts([Part("first", 1, command), Part("second", 1, command)], 100, cwd=tmp_path, say=lambda line: None)
    assert told[0] == pytest.approx(50, abs=1)
    assert told[1] > 90


def test_every_benchmark_is_a_part_and_all_together_stay_under_nine_minutes():
    assert gpu_suite.LIMIT < 9 * 60 - 30
    assert set(gpu_suite.names()) >= BENCHMARKS.keys() | SHARES.keys()


def test_one_part_on_a_cpu(tmp_path, capsys):
    status = gpu_suite.main(["--device", "cpu", "--small", "--only", "report", "--out", str(tmp_path), "--limit", "30"])
    summary = json.loads((tmp_path / "cpu" / "suite.json").read_text())
    assert status == 1  # there is nothing to report on
    assert [(entry["name"], entry["status"]) for entry in summary["parts"]] == [("report", "failed")]
    assert "no results in" in summary["parts"][0]["tail"][-1]


@pytest.mark.long
def test_the_whole_suite_on_a_cpu(tmp_path):
    arguments = ["--device", "cpu", "--small", "--out", str(tmp_path), "--limit", "400"]
    assert gpu_suite.main(arguments) == 0
    written = {path.name for path in (tmp_path / "cpu").iterdir()}
    assert written == {"roofline.png", "suite.json", "step.json", *(f"{name}.json" for name in BENCHMARKS)}
