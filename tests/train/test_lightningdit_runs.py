"""Whole runs of a LightningDiT beside DiverseDiT: all pairs of blocks, long skips, its own loss and times."""

import math

import pytest
import torch

from dit_fast.cli import main as command
from dit_fast.sampling.samples import Samples
from dit_fast.train.__main__ import main
from tests.helpers.parts import settings
from tests.helpers.toy_runs import arguments, losses, rows, tensors

LIGHTNING = ("model=LightningDiT-Nano/1", "objective.time=lognormal", "objective.cosine_weight=1.0")


def start(shards, run, *overrides):
    return arguments(shards, run, *settings(("diversedit",), steps=8), *LIGHTNING, *overrides)


@pytest.mark.parametrize("wiring", ["input", "output"])
def test_a_run_resumes_exactly_and_samples(shards, tmp_path, wiring):
    once, again = tmp_path / "once", tmp_path / "again"
    options = (f"model.skip_wiring={wiring}", "run.steps=8")
    assert main(start(shards, once, *options)) == 0
    assert main(start(shards, again, *options, "run.steps=4")) == 0
    assert main(start(shards, again, *options)) == 0
    assert losses(once) == losses(again)
    first, second = tensors(once, 8), tensors(again, 8)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    before = tensors(once, 4)
    still = {key for key in first if key.startswith("model/") and torch.equal(first[key], before[key])}
    assert still == {"model/pos_embed", "model/feat_rope.freqs_cos", "model/feat_rope.freqs_sin"}
    last = rows(once)[-1]
    assert "diversedit/total" in last
    assert last["flow"] == pytest.approx(last["flow/squared_error"] + last["flow/cosine"], rel=1e-5)
    out = tmp_path / "images.npz"
    guided = ["--cfg-channels", "first_three", "--time-shift", str(1 / 0.3), "--guidance-high", "0.89"]
    assert command(["sample", str(once), "--out", str(out), "--per-class", "1", "--num-steps", "4", *guided]) == 0
    drawn = Samples.load(out)
    assert drawn.images.std() > 0
    assert math.isfinite(last["loss"])


@pytest.mark.parametrize("cell", [("mean_flow", "diversedit"), ("ddpm",)], ids="-".join)
def test_other_objectives_train_it_or_say_why_not(shards, tmp_path, cell, capsys):
    """A mean velocity is differentiated in forward mode through every part of the block."""
    model = ("model=LightningDiT-Nano/1", f"model.times={2 if 'mean_flow' in cell else 1}", "model.qk_norm=true")
    status = main(arguments(shards, tmp_path / "run", *settings(cell, steps=2), *model))
    if "ddpm" in cell:
        assert status == 2
        assert "objective=ddpm needs a model that predicts a variance, unlike LightningDiT" in capsys.readouterr().err
    else:
        assert status == 0
        assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "run"))
