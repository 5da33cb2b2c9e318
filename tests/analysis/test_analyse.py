"""Two tiny runs through `dit-fast analyse`: the same numbers however it is cut, gradients that add up, files."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dit_fast.analysis import command
from dit_fast.analysis.blocks import Inputs, compare_runs, study_blocks
from dit_fast.analysis.gradients import term_gradients
from dit_fast.analysis.study import checkpoints_of, read
from dit_fast.checkpoint.run import load_run
from dit_fast.cli import main
from dit_fast.methods.haste import HASTE
from dit_fast.recipes import load
from dit_fast.train.loop import train
from dit_fast.train.loss import TrainingLoss
from dit_fast.world import single
from tests.helpers.cases import loop_over, refused
from tests.helpers.two_runs import STEPS

FAST = ["--count", "24", "--minibatch", "12", "--times", "0.5,0.04", "--gradient-batches", "2"]


@pytest.fixture(scope="module")
def loaded(place):
    run = load_run(place / "diverse")
    return run, run.dataset()


def test_a_study_does_not_depend_on_the_batch_of_a_forward(loaded):
    run, dataset = loaded
    one, other = (study_blocks(run, Inputs(dataset, 24, 12, batch)) for batch in (12, 5))
    for kernel in one.cka:
        np.testing.assert_allclose(one.cka[kernel], other.cka[kernel], atol=1e-5)
        np.testing.assert_allclose(one.cka[kernel].diagonal(), 1, atol=1e-9)
    np.testing.assert_allclose(one.rank, other.rank, rtol=1e-4)
    assert one.orthogonality == pytest.approx(other.orthogonality, abs=1e-5)
    assert one.cosine.shape == (6, 6)
    assert ((one.rank > 1) & (one.rank < 160)).all()
    assert one.parameters > 1_000_000


def test_a_run_beside_itself_repeats_its_own_similarity(loaded):
    run, dataset = loaded
    inputs = Inputs(dataset, 24, 12, 8)
    own, both = study_blocks(run, inputs), compare_runs([run, run], inputs)
    for kernel, matrix in both.items():
        for rows in (slice(6), slice(6, 12)):
            for columns in (slice(6), slice(6, 12)):
                np.testing.assert_allclose(matrix[rows, columns], own.cka[kernel], atol=1e-9)


def test_a_run_with_a_head_of_its_method_is_studied(place, tmp_path):
    changes = [f"data.path={place / 'shards'}", f"run.dir={tmp_path / 'run'}", "run.steps=1", "engine.global_batch=12"]
    off = ["preview.every=0", "run.tensorboard=false"]
    train(load("quickstart-internal_guidance", [*changes, *off]), single())
    run = load_run(tmp_path / "run")
    assert len(study_blocks(run, Inputs(run.dataset(), 12, 12, 12)).rank) == run.model.depth


def test_files_that_only_training_needs_may_be_gone(loaded):
    run, dataset = loaded
    gone = HASTE.Config(encoders=("dinov2-vit-b:/gone",), student_depths=(1,), teacher_depths=(1,))
    run = replace(run, config=replace(run.config, methods=(gone,)))
    assert study_blocks(run, Inputs(dataset, 12, 12, 12)).cosine.shape == (6, 6)


def test_gradients_of_the_terms_add_up_to_that_of_the_loss(loaded, place, monkeypatch):
    _, dataset = loaded
    (checkpoint,) = checkpoints_of(place / "diverse", [STEPS])
    seen = []
    found = term_gradients(checkpoint, dataset, batches=1, seed=3, seen=seen.append)
    assert found.terms == ("flow", "diversedit/total")
    assert found.norm.shape == found.projection.shape == (2, 6)
    np.testing.assert_allclose(found.projection.sum(0), 1, atol=1e-9)
    assert seen == [12]
    assert (found.norm > 0).all()

    whole = {}
    forward = TrainingLoss.forward

    def remember(self, batch, number):
        total, _ = forward(self, batch, number)
        blocks = [[*block.parameters()] for block in self.model.blocks]
        flat = torch.autograd.grad(total, [weight for block in blocks for weight in block])
        pieces = iter(flat)
        whole["norm"] = [torch.cat([next(pieces).flatten() for _ in block]).norm().item() for block in blocks]
        return forward(self, batch, number)

    monkeypatch.setattr(TrainingLoss, "forward", remember)
    term_gradients(checkpoint, dataset, batches=1, seed=3)
    # |g|^2 = sum over terms of g_term . g, and g_term . g / |g|^2 is the projection; by the law of cosines from norms:
    flow, diverse = found.norm**2
    share = found.projection[0]
    squared = np.array(whole["norm"]) ** 2
    np.testing.assert_allclose((squared + flow - diverse) / (2 * squared), share, rtol=1e-3)


def test_the_command_writes_arrays_and_figures_and_keeps_what_it_knows(place, tmp_path, monkeypatch, capsys):
    runs = [shutil.copytree(place / name, tmp_path / name) for name in ("diverse", "plain")]
    fast = [*FAST, "--kernels", "rbf"]
    assert main(["analyse", *map(str, runs), *fast]) == 0
    arrays = read(runs[0] / "analysis/blocks.npz")
    assert arrays["steps"].tolist() == [2, STEPS]
    assert arrays["cka_rbf"].shape == arrays["cosine"].shape == (2, 2, 6, 6)
    assert arrays["rank"].shape == (2, 2, 6)
    assert arrays["gradient_terms"].tolist() == ["flow", "diversedit/total"]
    assert arrays["gradient_norm"].shape == (2, 2, 6)
    protocol = json.loads(str(arrays["protocol"]))
    assert (protocol["count"], protocol["minibatch"], protocol["weights"]) == (24, 12, "ema")
    between = read(runs[0] / "analysis/between.npz")
    assert between["runs"].tolist() == ["diverse", "plain"]
    assert between["cka_rbf"].shape == (2, 12, 12)
    np.testing.assert_allclose(between["cka_rbf"][1, :6, :6], arrays["cka_rbf"][1, 1], atol=1e-6)
    names = {path.name for path in (runs[0] / "analysis").glob("*.png")}
    assert names == {f"{name}.png" for name in ("checkpoints-rbf", "times-rbf", "rank", "gradients", "between-rbf")}
    for name in names:
        with Image.open(runs[0] / "analysis" / name) as image:
            assert min(image.size) > 200
    monkeypatch.setattr("dit_fast.analysis.study.study_blocks", None)  # nothing is computed anew
    assert main(["analyse", str(runs[1]), *fast, "--batch", "3"]) == 0
    only = read(runs[1] / "analysis/blocks.npz")
    axes = command._figures(only)["gradients"].axes[0]  # a share of one term would be 1 everywhere
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), only["gradient_norm"][1, 0])
    assert (axes.get_ylabel(), axes.get_title(loc="left")) == ("gradient norm", "flow, the only term")
    assert main(["analyse", str(runs[1]), *fast, "--seed", "1"]) == 1


@loop_over(
    ("more", "said"),
    [
        (["--count", "37"], "the data set has 36 samples"),
        (["--minibatch", "7"], "must be at least 4 and divide --count 24"),
        (["--times", "0.04,2"], "from 0 (data) to 1 (noise)"),
        (["--times", "x"], "expected numbers"),
        (["--kernels", "linear,cubic"], "one or more of linear,rbf"),
        (["--checkpoints", "3"], "has no checkpoint of step 3, but 2,4"),
        (["--gradient-batches", "9"], "give at most 3"),
        (["--rbf-width", "0"], "must be above 0"),
    ],
)
def test_what_cannot_be_studied_is_refused(place, capsys, more, said):
    assert main(["analyse", str(place / "diverse"), *FAST, *more]) == 2
    assert said in capsys.readouterr().err


def test_a_foreign_file_is_named(tmp_path):
    path = tmp_path / "blocks.npz"
    path.write_bytes(b"no")
    assert str(path) in refused(read, path)
