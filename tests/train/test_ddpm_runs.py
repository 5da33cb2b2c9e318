"""Whole runs of a DiT: DDPM beside DiverseDiT, SRA and Dispersive Loss."""

import re

import pytest
import torch

from dit_fast.cli import main as command
from dit_fast.sampling.samples import Samples
from dit_fast.train.__main__ import main
from tests.helpers.parts import settings
from tests.helpers.toy_runs import arguments, losses, rows, tensors

PREVIEW = ("preview.sampler=ddim", "preview.num_steps=3", "preview.every=8", "preview.count=3")


def start(shards, run, *overrides):
    parts = settings(("ddpm", "diversedit", "sra", "dispersive"), steps=8)
    return arguments(shards, run, *parts, *PREVIEW, "run.steps=8", "optimizer.ema_decay=0.5", *overrides)


def test_a_run_resumes_exactly_and_samples(shards, tmp_path):
    once, again = tmp_path / "once", tmp_path / "again"
    assert main(start(shards, once)) == 0
    assert main(start(shards, again, "run.steps=4")) == 0
    assert main(start(shards, again)) == 0
    assert losses(once) == losses(again)
    first, second = tensors(once, 8), tensors(again, 8)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    last = rows(once)[-1]
    assert {"ddpm", "diversedit/total", "sra/alignment"} <= last.keys()
    assert any(key.startswith("dispersive/") for key in last)
    assert last["ddpm"] == pytest.approx(last["ddpm/mse"] + last["ddpm/variational"], rel=1e-5)
    assert (once / "samples" / "step_00000008.png").is_file()
    for options, text in (
        (["--num-steps", "4"], "ddpm, 4 steps, guidance 2.5, "),
        (["--sampler", "ddim", "--cfg-channels", "first_three"], "ddim, 20 steps, guidance 2.5 on channels 0 to 2, "),
    ):
        assert command(["sample", str(once), "--out", str(tmp_path / "images.npz"), "--per-class", "2", *options]) == 0
        drawn = Samples.load(tmp_path / "images.npz")
        assert drawn.images.shape == (6, 16, 16, 3)
        assert drawn.text.startswith(text)
        (tmp_path / "images.npz").unlink()
    assert command(["sample", str(once), "--num-steps", "4", "--per-class", "2"]) == 0
    assert command(["report", str(once), "--out", str(tmp_path / "report")]) == 0
    page = re.sub('base64,[^"]*', "", (tmp_path / "report" / "report.html").read_text())
    assert "nan" not in page
    assert "DDPM + DiverseDiT + SRA" in page
    assert "predicted noise" in page


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("preview.sampler=heun", "preview.sampler=heun does not fit objective=ddpm; set preview.sampler=ddpm"),
        ("preview.num_steps=1", "preview: num_steps=1 must lie from 2 to 1000"),
        ("objective=flow", "objective=flow trains no variance, which DiT-Nano/2 predicts"),
        ("model=SiT-Nano/2", "objective=ddpm needs a model that predicts a variance, unlike SiT-Nano/2"),
        ("model.class_token=6", "set model.class_token=0, or objective=flow"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(override, message, shards, tmp_path, capsys):
    assert main(start(shards, tmp_path / "run", override)) == 2
    assert message in capsys.readouterr().err
