"""The quick start's order of commands, without running them; the real thing is a `long` test."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import quickstart

from tests.helpers.no_gpu import no_gpu  # noqa: F401

SCRIPT = Path(quickstart.__file__)


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Commands the script would run, as lists; the script's files go to tmp_path."""
    np.savez(tmp_path / "toy.npz", images=np.zeros((4, 32, 32), np.uint8), labels=np.arange(4) % 2)
    monkeypatch.chdir(tmp_path)
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append((command, options["env"])))
    return commands


def start(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--data", "toy.npz", *arguments])
    return quickstart.main()


def names(calls):
    return [(Path(command[0]).name, command[1]) for command, _ in calls]


def test_stages_run_in_order_on_the_same_folders(calls, monkeypatch, capsys):
    assert start(monkeypatch, "--steps", "7") == 0
    assert "\n[1/5] data\ntoy: toy.npz\n" in capsys.readouterr().out
    assert names(calls) == [
        ("dit-fast", "shards"),
        ("deepspeed", "--num_gpus"),
        ("dit-fast", "sample"),
        ("dit-fast", "report"),
    ]
    build, train, sample, report = (command for command, _ in calls)
    assert build[2:5] == ["build", "toy.npz", "runs/quickstart/shards"]
    assert train[3] == "--master_port"
    assert train[5:] == [
        "--module", "dit_fast.train", "quickstart", "data.path=runs/quickstart/shards",
        "run.dir=runs/quickstart/diversedit", "run.steps=7",
    ]  # fmt: skip
    assert sample[2] == report[2] == "runs/quickstart/diversedit"
    assert report[-2:] == ["--out", "runs/quickstart"]
    assert "--baseline" not in report


def test_baseline_differs_in_model_and_methods_only(calls, monkeypatch):
    assert start(monkeypatch, "--baseline") == 0
    one, two = (command for command, _ in calls if Path(command[0]).name == "deepspeed")
    one, two = ([part for part in command if not part.isdigit()] for command in (one, two))  # ports are drawn
    assert set(two) - set(one) == {"run.dir=runs/quickstart/baseline", "quickstart-sit"}
    report = calls[-1][0]
    assert report[report.index("--baseline") + 1] == "runs/quickstart/baseline"


def test_repa_has_shards_and_a_run_of_its_own(calls, monkeypatch):
    assert start(monkeypatch, "--repa", "--out", "there") == 0
    build, train = calls[0][0], calls[1][0]
    assert build[4] == "there/shards-features"
    assert build[-2:] == ["--encoder", "efficientnet-lite0"]
    assert {"data.path=there/shards-features", "run.dir=there/diversedit-repa", "quickstart-diversedit-repa"} <= set(
        train
    )


def test_other_data_in_the_same_folder_is_refused(calls, monkeypatch, capsys, tmp_path):
    assert start(monkeypatch) == 0
    (tmp_path / "toy.npz").rename(tmp_path / "other.npz")
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--data", "other.npz"])
    assert quickstart.main() == 2
    assert "was begun with toy, not other; use another folder (OUT=runs/quickstart-other)" in capsys.readouterr().err


def test_a_failing_stage_ends_the_script_with_its_status(calls, monkeypatch, capsys):
    def fail(command, **options):
        raise subprocess.CalledProcessError(3, command)

    monkeypatch.setattr(subprocess, "run", fail)
    assert start(monkeypatch) == 3
    assert "this stage failed (exit status 3)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "cores", "expected"),
    [
        (0, 1, (1, 1, False)),
        (0, 2, (2, 1, False)),
        (0, 9, (2, 4, False)),
        (1, 16, (1, 16, True)),
        (5, 16, (4, 3, True)),  # five do not divide a batch of 96
        (8, 4, (8, 1, True)),
    ],
)
def test_processes_and_threads_fit_the_machine(monkeypatch, gpus, cores, expected):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(quickstart, "cores", lambda: cores)
    assert quickstart.this_machine(96) == quickstart.Machine(*expected)


@pytest.mark.long
@pytest.mark.launch
def test_the_whole_quick_start_and_its_second_call(tmp_path):
    rng, labels = np.random.default_rng(0), np.arange(40) % 2
    np.savez(tmp_path / "toy.npz", images=rng.integers(0, 256, (40, 32, 32, 3), np.uint8), labels=labels)
    command = [
        sys.executable,
        str(SCRIPT),
        "--data",
        "toy.npz",
        "--steps",
        "4",
        "--baseline",
    ]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        out = tmp_path / "runs" / "quickstart"
        assert (out / "report.html").stat().st_size > 100_000
        assert {"diversedit", "baseline", "shards"} <= {path.name for path in out.iterdir()}
