"""From images to samples in the space of an encoder's tokens: built, trained, sampled and decoded."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_fast.cli import main
from dit_fast.data import open_dataset
from dit_fast.objectives import Flow
from dit_fast.recipes import load
from dit_fast.sampling.samples import Samples
from dit_fast.train.__main__ import main as train
from dit_fast.train.prepare import narrow_model
from tests.helpers.encoder_weights import WIDTH, official
from tests.helpers.shard_sets import make_images
from tests.helpers.toy_runs import arguments, rows, tensors

SMALL = ("model.depth=2", "model.hidden_size=32", "model.num_heads=2", "run.steps=4", "engine.micro_batch=4")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Tokens of a DINOv2 of random weights, from the command line."""
    folder = tmp_path_factory.mktemp("rae")
    torch.save(official("dinov2-vit-b"), folder / "dino.pth")
    images, labels = make_images(24)
    np.savez(folder / "images.npz", images=images, labels=labels)
    made_of = f"features:dinov2-vit-b:{folder / 'dino.pth'}"
    command = ["shards", "build", str(folder / "images.npz"), str(folder / "shards"), "--autoencoder", made_of]
    assert main([*command, "--size", "16", "--patch", "4", "--no-progress"]) == 0
    (folder / "dino.pth").unlink()  # nothing needs it again
    return folder / "shards"


def test_it_trains_resumes_samples_and_decodes(shards, tmp_path, caplog):
    config = load("quickstart-rae")
    assert (config.objective.prediction, config.objective.time_shift) == ("x", 0)
    line = lambda run, *more: ["quickstart-rae", *arguments(shards, run, *SMALL, *more)[1:]]  # noqa: E731
    once, stopped = tmp_path / "once", tmp_path / "stopped"
    assert train(line(once, "preview.every=4", "preview.num_steps=1")) == 0
    assert (once / "samples" / "step_00000004.png").exists()
    assert train(line(stopped, "run.steps=2")) == 0
    assert train(line(stopped)) == 0
    ours, theirs = tensors(stopped, 4), tensors(once, 4)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert np.isfinite([row["loss"] for row in rows(once)]).all()
    assert open_dataset(shards).info.channels == WIDTH
    out = tmp_path / "images.npz"
    assert main(["sample", str(once), "--per-class", "1", "--num-steps", "2", "--out", str(out)]) == 0
    drawn = Samples.load(out)
    assert drawn.images.shape == (3, 16, 16, 3)
    assert drawn.images.std() > 0
    shift = (WIDTH * 4 * 4 / 4096) ** 0.5
    assert f"times shifted by {shift:g}"[:24] in drawn.text
    assert "numbers" not in caplog.text


def test_a_velocity_of_wide_tokens_in_a_narrow_model_is_warned_of(shards, tmp_path, caplog):
    command = arguments(shards, tmp_path / "run", *SMALL, "run.steps=1", "model.patch_size=1", "methods=none")
    assert train(command) == 0
    assert f"the model is 32 wide and each of its tokens holds {WIDTH} numbers: a velocity" in caplog.text


@pytest.mark.parametrize(
    ("std", "prediction", "width", "warned"),
    [(False, "velocity", 11, True), (False, "noise", 11, True), (False, "x", 11, False), (False, "velocity", 12, False),
     (True, "velocity", 11, False)],
)  # fmt: skip
def test_when_it_is_warned(std, prediction, width, warned):
    model = SimpleNamespace(shapes={"image": (3, 8, 8)}, num_tokens=16, hidden_size=width)
    objective = SimpleNamespace(prediction=prediction)
    assert bool(narrow_model(model, objective, SimpleNamespace(std=std))) is warned


def test_the_published_recipe_has_the_published_shift():
    config = load("rae-xl1-256")
    model = SimpleNamespace(shapes={"image": (768, 16, 16)}, learns_variance=False, times=1)
    assert (config.model.in_channels, config.model.input_size, config.model.name) == (768, 16, "LightningDiT-XL/1")
    assert Flow(config.objective, model).time_shift == pytest.approx((768 * 16 * 16 / 4096) ** 0.5)
