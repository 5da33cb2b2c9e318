"""Whole runs of REG, SRA and mean flow from real shards, alone, together and beside DiverseDiT."""

import re

import pytest
import torch

from dit_fast.cli import main as command
from dit_fast.sampling.samples import Samples
from dit_fast.train.__main__ import main
from tests.helpers.toy_runs import Ranks, arguments, losses, rows, tensors

SMALL = ("model.depth=4", "model.hidden_size=32", "model.num_heads=2", "optimizer.ema_decay=0.5")
REG = ("methods=diversedit,reg", "methods.reg.encoder_depth=2", "methods.reg.projector_width=8", "model.class_token=6")
MEAN_FLOW = ("objective=mean_flow", "model.times=2")
SRA = ("methods.sra.student_depth=1", "methods.sra.teacher_depth=3", "methods.sra.decay=0.5")
RUNS = {
    "reg": REG,
    "mean_flow": (*MEAN_FLOW, "methods=diversedit"),
    "sra": ("methods=diversedit,sra", *SRA),
    "both": (*MEAN_FLOW, *REG, "methods=diversedit,reg,sra", *SRA),
}
TITLES = {
    "reg": "REG",
    "mean_flow": "mean flow + DiverseDiT",
    "sra": "DiverseDiT + SRA",
    "both": "mean flow + DiverseDiT + REG + SRA",
}


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
    flow, last = MEAN_FLOW[0] not in RUNS[name], rows(once)[-1]
    logged = {"diversedit/total", "flow" if flow else "mean_flow"}
    logged |= {"reg/class_token", "reg/alignment"} if name in ("reg", "both") else set()
    logged |= {"sra/alignment"} if name in ("sra", "both") else set()
    assert logged <= last.keys()
    options = ["--per-class", "2", *(["--num-steps", "3", "--sampler", "sde"] if flow else [])]
    assert command(["sample", str(once), "--out", str(tmp_path / "images.npz"), *options]) == 0
    drawn = Samples.load(tmp_path / "images.npz")
    assert drawn.images.shape == (6, 16, 16, 3)
    assert drawn.text.startswith("sde, 3 steps" if flow else "mean_flow, 1 steps, guidance 1,")
    assert command(["report", str(once), "--out", str(tmp_path / "report")]) == 0
    page = re.sub('base64,[^"]*', "", (tmp_path / "report" / "report.html").read_text())
    assert "nan" not in page
    assert TITLES[name] in page


def test_repa_beside_reg_has_a_projector_of_its_own(token_shards, tmp_path):
    repa = ("methods=reg,repa", "methods.repa.encoder_depth=3", "methods.repa.projector_width=4")
    assert main(start(token_shards, tmp_path / "run", "reg", *repa, "run.steps=2")) == 0
    assert {"reg/class_token", "reg/alignment", "repa/alignment"} <= rows(tmp_path / "run")[-1].keys()
    saved = tensors(tmp_path / "run", 2)
    assert [len(saved[f"model/projectors.{place}.0.bias"]) for place in (0, 1)] == [8, 4]


@pytest.mark.launch
def test_two_ranks_draw_the_same_numbers_and_stage_3_is_refused(token_shards, tmp_path):
    alone, shared, refused = (tmp_path / name for name in ("alone", "shared", "refused"))
    assert main(start(token_shards, alone, "both")) == 0
    with Ranks(start(token_shards, shared, "both", "engine.zero_stage=2"), tmp_path / "log") as ranks:
        assert ranks.wait() == [0, 0], ranks.text()
    assert [row["mean_flow"] for row in rows(shared)] == pytest.approx(
        [row["mean_flow"] for row in rows(alone)], rel=1e-4
    )
    with Ranks(start(token_shards, refused, "both", "engine.zero_stage=3"), tmp_path / "log3") as ranks:
        assert ranks.wait() == [2, 2]
    assert "engine.zero_stage=3 cannot run 'mean_flow'" in ranks.text()


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("reg", "model.class_token=5", "reg: the shards hold class tokens of width 6; set model.class_token=6"),
        ("reg", "methods.reg.encoder_depth=5", "methods.reg.encoder_depth=5 is not one of this model's blocks 1..4"),
        (
            "mean_flow",
            "model.class_token=6",
            "no method of this run adds it; set model.class_token=0, or use one that does (reg)",
        ),
        ("mean_flow", "model.times=1", "objective=mean_flow needs a model of two times; set model.times=2"),
        ("reg", "model.times=2", "objective=flow needs a model of one time; set model.times=1, or objective=mean_flow"),
        (
            "mean_flow",
            "preview.every=4",
            "preview.sampler=heun does not fit objective=mean_flow; set preview.sampler=mean_",
        ),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(name, override, message, token_shards, tmp_path, capsys):
    assert main(start(token_shards, tmp_path / "run", name, *override.split())) == 2
    assert message in capsys.readouterr().err
