"""Whole runs of REG, SRA and mean flow from real shards, alone, together and beside DiverseDiT."""

import re

import pytest
import torch

from dit_fast.cli import main as command
from dit_fast.sampling.samples import Samples
from dit_fast.train import loop
from dit_fast.train.__main__ import main
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.toy_runs import Ranks, arguments, losses, rows, tensors

SMALL = ("model.depth=4", "model.hidden_size=32", "model.num_heads=2", "optimizer.ema_decay=0.5")
REG = ("methods=diversedit,reg", "methods.reg.encoder_depth=2", "methods.reg.projector_width=8", "model.class_token=6")
MEAN_FLOW = ("objective=mean_flow", "model.times=2")
SRA = ("methods.sra.student_depth=1", "methods.sra.teacher_depth=3", "methods.sra.decay=0.5")
ALL = (*REG, "methods=diversedit,reg,sra", *SRA)
IMPROVED = (
    "objective=improved_mean_flow", "model.times=2", "model.velocity_head=true", "model.guidance_condition=true",
)  # fmt: skip
PREVIEW = (
    "preview.every=8",
    "preview.sampler=mean_flow",
    "preview.cfg_scale=1",
    "preview.omega=4",
    "preview.t_max=0.6",
)
RUNS = {"flow": ALL, "mean_flow": (*MEAN_FLOW, *ALL), "improved_mean_flow": (*IMPROVED, *ALL, *PREVIEW)}


def start(shards, run, name, *overrides):
    return arguments(shards, run, *SMALL, *RUNS[name], "run.steps=8", *overrides)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_exactly_and_samples(name, token_shards, tmp_path):
    once, again = tmp_path / "once", tmp_path / "again"
    assert main(start(token_shards, once, name)) == 0
    assert main(start(token_shards, again, name, "run.steps=4")) == 0
    assert main(start(token_shards, again, name)) == 0
    assert losses(once) == losses(again)
    first, second = tensors(once, 8), tensors(again, 8)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert {name, "diversedit/total", "reg/class_token", "reg/alignment", "sra/alignment"} <= rows(once)[-1].keys()
    assert (once / "samples" / "step_00000008.png").exists() == (name == "improved_mean_flow")
    own = {"flow": ["--num-steps", "3", "--sampler", "sde"], "improved_mean_flow": ["--omega", "4", "--t-max", "0.6"]}
    options = ["--per-class", "2", *own.get(name, [])]
    assert command(["sample", str(once), "--out", str(tmp_path / "images.npz"), *options]) == 0
    drawn = Samples.load(tmp_path / "images.npz")
    assert drawn.images.shape == (6, 16, 16, 3)
    told = "omega 4 for t in [0, 0.6], " if name == "improved_mean_flow" else ""
    assert drawn.text.startswith("sde, 3 steps" if name == "flow" else f"mean_flow, 1 steps, {told}guidance 1,")
    assert command(["report", str(once), "--out", str(tmp_path / "report")]) == 0
    page = re.sub('base64,[^"]*', "", (tmp_path / "report" / "report.html").read_text())
    assert "nan" not in page
    assert name.replace("_", " ").replace("flow", "flow + ") * (name != "flow") + "DiverseDiT + REG + SRA" in page


@pytest.mark.launch
def test_two_ranks_draw_the_same_numbers(token_shards, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert main(start(token_shards, alone, "mean_flow")) == 0
    with Ranks(start(token_shards, shared, "mean_flow", "engine.zero_stage=2"), tmp_path / "log") as ranks:
        assert ranks.wait() == [0, 0], ranks.text()
    assert [row["mean_flow"] for row in rows(shared)] == pytest.approx(
        [row["mean_flow"] for row in rows(alone)], rel=1e-4
    )


def test_launched_ranks_refuse_stage_3(token_shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "launched", lambda: True)
    assert main(start(token_shards, tmp_path / "run", "mean_flow", "engine.zero_stage=3")) == 2
    assert "engine.zero_stage=3 cannot run 'mean_flow'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("flow", "model.class_token=5", "reg: class tokens of the shards have the width 6; set model.class_token=6"),
        ("flow", "methods.reg.encoder_depth=5", "methods.reg.encoder_depth=5 is not one of this model's blocks 1..4"),
        ("mean_flow", "model.times=1", "objective=mean_flow needs a model of two times; set model.times=2"),
        (
            "flow",
            "model.times=2",
            "objective=flow needs a model of one time; set model.times=1, or objective=mean_flow",
        ),
        (
            "mean_flow",
            "preview.every=4",
            "preview.sampler=heun does not fit objective=mean_flow; set preview.sampler=mean_",
        ),
        (
            "mean_flow",
            "preview.every=4 preview.sampler=mean_flow preview.cfg_scale=1 preview.omega=2",
            "preview: omega is for a model that was trained with model.guidance_condition=true",
        ),
        (
            "improved_mean_flow",
            "model.auxiliary_depth=2",
            "velocity_head and auxiliary_depth are both a second output; set one of them",
        ),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(name, override, message, token_shards, tmp_path, capsys):
    assert main(start(token_shards, tmp_path / "run", name, *override.split())) == 2
    assert message in capsys.readouterr().err
