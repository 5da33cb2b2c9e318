"""Whole runs of JiT and DDT beside DiverseDiT and REPA: exact resume, samples, ZeRO stages, and what they refuse."""

import pytest
import torch

from dit_fast.cli import main as command
from dit_fast.sampling.samples import Samples
from dit_fast.train.__main__ import main
from tests.helpers.parts import settings
from tests.helpers.toy_runs import arguments, losses, rows, tensors

X = ("objective.prediction=x", "objective.weighting=velocity", "objective.time=logit_normal")
MODELS = {
    "JiT": ("model=JiT-Nano/2", "model.skip_wiring=input", "model.in_context_start=1", *X),
    "DDT": ("model=DDT-Nano/2", "model.encoder_depth=2", "objective.time=lognormal"),
}
SAMPLED = {
    "JiT": ("--sampler", "heun", "--guidance-high", "0.9", "--guidance-bounds", "exclusive", "--heun-guidance", "each"),
    "DDT": ("--sampler", "euler", "--state-refresh", "2", "--guidance-high", "0.7"),
}


def start(kind, shards, run, *overrides, steps=4):
    lines = arguments(shards, run, *settings(("repa", "diversedit"), steps=steps), *MODELS[kind], *overrides)
    return [line for line in lines if kind == "JiT" or not line.startswith("model.skip_wiring")]


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_resumes_exactly_and_samples(kind, token_shards, tmp_path):
    once, again = tmp_path / "once", tmp_path / "again"
    options = ("run.checkpoint_every=2",)
    assert main(start(kind, token_shards, once, *options)) == 0
    assert main(start(kind, token_shards, again, *options, steps=2)) == 0
    assert main(start(kind, token_shards, again, *options)) == 0
    assert losses(once) == losses(again)
    first, second = tensors(once, 4), tensors(again, 4)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    before = tensors(once, 2)
    still = {key for key in first if key.startswith("model/") and torch.equal(first[key], before[key])}
    assert still == {"model/pos_embed"} & first.keys()
    assert {"diversedit/total", "repa/alignment"} <= rows(once)[-1].keys()
    out = tmp_path / "images.npz"
    assert (
        command(["sample", str(once), "--out", str(out), "--per-class", "1", "--num-steps", "4", *SAMPLED[kind]]) == 0
    )
    drawn = Samples.load(out)
    assert drawn.images.std() > 0
    assert ("encoder in every 2. step" in drawn.text) == (kind == "DDT")


@pytest.mark.parametrize("kind", MODELS)
def test_sharded_parameters_train_the_same(kind, token_shards, tmp_path):
    found = []
    for stage in (0, 3):
        run = tmp_path / str(stage)
        assert main(start(kind, token_shards, run, f"engine.zero_stage={stage}", "run.checkpoint_every=0")) == 0
        found.append(losses(run))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_ddt_refuses_what_it_has_no_place_for(token_shards, tmp_path, capsys):
    for cell, named in (
        (("reg",), "DDT denoises an image alone, at one time; set model.class_token=0"),
        (("mean_flow",), "set model.times=1"),
        (("ddpm",), "objective=ddpm needs a model that predicts a variance, unlike DDT-Nano/2; set model=DiT-"),
        (("diversedit",), "unknown configuration key 'model.skip_wiring'"),
    ):
        lines = arguments(token_shards, tmp_path / "run", *settings(cell, steps=2), "model=DDT-Nano/2")
        lines = [line for line in lines if line != "model.skip_wiring=off"]
        assert main([*lines, "model.encoder_depth=2"]) == 2
        assert named in capsys.readouterr().err
