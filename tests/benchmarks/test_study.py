"""The study's list, its order of commands, and the table made of what runs left; nothing is trained here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import quickstart
import study as script

from dit_fast.analysis.study import save
from dit_fast.benchmarks import study
from dit_fast.evaluation.records import Evaluation, Protocol, append_evaluation
from dit_fast.sweep.plan import members, read_sweep
from dit_fast.train.journal import METRICS
from tests.helpers.cases import refused

PROTOCOL = Protocol(
    network="EffLite0", network_identity="0", resizing="bicubic", metrics="", reference="shards",
    reference_identity="0", reference_count=8, count=8, size="32x32",
)  # fmt: skip


def test_the_list_has_ten_configurations_that_can_be_trained(shards, token_shards, tmp_path):
    sweep = read_sweep(script.LIST)
    assert (len(sweep.runs), sweep.seeds) == (10, (0, 1, 2))
    found = members(type(sweep)(sweep.runs, (*sweep.changes, f"data.path={shards}"), sweep.seeds), tmp_path)
    assert len({json.dumps(repr((run.runs[0].model, run.runs[0].methods))) for run in found}) == 10
    by_name = {run.name: run.runs[0] for run in found}
    assert {run.run.steps for run in by_name.values()} == {1000}
    assert by_name["sit"].model.skip_wiring == "off"
    assert by_name["diversedit-output-release"].model.skip_wiring == "output"
    assert [method.name for method in by_name["diversedit-sra"].methods] == ["diversedit", "sra"]


def entry(name, seed, **more):
    arguments = ["quickstart", "run.seed=1", "run.dir=x"]
    return {"name": name, "seed": seed, "folder": f"{name}/seed{seed}", "state": "done", "seconds": 1.0, "steps": 40,
            "arguments": arguments, "error": None, **more}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Of two configurations, one with two seeds, as sweep, analyse and evaluate leave it."""
    entries = [entry("sit", 0), entry("sit", 1), entry("repa", 0)]
    (tmp_path / "sweep.json").write_text(json.dumps({"format": 1, "runs": entries}))
    for number, each in enumerate(entries):
        run = tmp_path / each["folder"]
        run.mkdir(parents=True)
        off = np.array([[1, 0.2 + number / 10], [0.2 + number / 10, 1]])
        maps = np.stack([np.stack([off * 0, off])] * 2)  # [steps, times]; times out of order
        norms = np.array([[[3.0, 3.0], [np.nan, np.nan]], [[3.0, 1.0], [1.0, 1.0]]])
        save(
            run / "analysis" / "blocks.npz",
            {
                "steps": np.array([20, 40]), "times": np.array([0.5, 0.04]), "cka_linear": maps, "cka_rbf": maps,
                "cosine": maps, "rank": np.full((2, 2, 2), 7.0), "gradient_norm": norms,
                "orthogonality": np.ones((2, 2)), "mutual_information": np.ones((2, 2)),
                "dispersion": np.ones((2, 2)), "protocol": np.array("{}"),
            },
        )  # fmt: skip
        rows = [{"step": step, "flow": 2.0 if step < 40 else 0.5 + number} for step in range(2, 41, 2)]
        (run / METRICS).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        append_evaluation(run, Evaluation(step=40, values={"FD-EffLite0": 10.0 + number}, protocol=PROTOCOL))
    return tmp_path


def test_the_table_has_means_over_seeds_and_says_how_it_was_measured(folder, capsys):
    assert study.main([str(folder)]) == 0
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[2] == (
        "| sit | 2 | 10.50 ± 0.71 | 0.250 ± 0.071 | 0.250 ± 0.071 | 0.250 ± 0.071 | 7.0 ± 0.0 | 0.375 ± 0.000 | "
        "1.5000 ± 0.3536 |"
    )
    assert lines[3].startswith("| repa | 1 | 12.00 | 0.400 |")
    assert lines[5] == "After 40 steps; blocks at t = 0.04."
    assert "8 images of 32x32" in lines[6]
    recorded = json.loads((folder / "study.json").read_text())["runs"]
    assert recorded[0]["arguments"] == ["quickstart", "run.seed=1"]
    assert recorded[0]["by_step"]["share"] == [0, 0.375]
    assert (folder / "similarity.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_named_with_its_command(folder, tmp_path):
    (folder / "repa/seed0/evaluations.jsonl").unlink()
    assert "dit-fast evaluate" in refused(study._work, [str(folder)])
    (folder / "sit/seed1/analysis/blocks.npz").unlink()
    assert "dit-fast analyse" in refused(study._work, [str(folder)])
    (folder / "sweep.json").write_text(json.dumps({"format": 1, "runs": [entry("sit", 0, state="failed")]}))
    assert "sit/seed0 is failed" in refused(study._work, [str(folder)])
    assert "holds no sweep" in refused(study._work, [str(tmp_path / "none")])


def test_stages_run_in_order_and_finished_distances_are_kept(folder, monkeypatch, tmp_path):
    commands = []
    monkeypatch.chdir(tmp_path)
    np.savez("toy.npz", images=np.zeros((4, 32, 32), np.uint8), labels=np.arange(4) % 2)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command))
    monkeypatch.setattr(quickstart, "program", lambda name: name)
    (folder / "repa/seed0/evaluations.jsonl").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs").symlink_to(folder)
    words = ["--data", "toy.npz", "--out", "out", "--steps", "10", "--seeds", "0", "--only", "sit", "--record"]
    monkeypatch.setattr(sys, "argv", ["study.py", *words])
    assert script.main() == 0
    names = [command[1] if command[1] != "-m" else command[2] for command in commands]
    assert names == ["shards", "sweep", *["analyse"] * 3, "evaluate", "dit_fast.benchmarks.study", "compare"]
    sweep = commands[1]
    assert sweep[2:4] == [str(script.LIST), "data.path=out/shards"]
    assert {"run.steps=10", "run.checkpoint_every=2", "--only"} <= set(sweep)
    assert commands[5][2] == "out/runs/repa/seed0"
    assert commands[6][-1] == "--record"
