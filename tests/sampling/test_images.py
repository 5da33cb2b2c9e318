"""What leaves a run as images: guidance as captioned, nothing that is not finite, and data found where it lies now."""

import dataclasses
import logging
import shutil
import sys

import numpy as np
import pytest
import torch

from dit_fast.analysis.blocks import Inputs, study_blocks
from dit_fast.autoencoders.pixels import from_model_space, to_model_space, to_uint8
from dit_fast.checkpoint.run import load_run
from dit_fast.cli import main
from dit_fast.diffusion import flow_loss, sample
from dit_fast.errors import UserError
from dit_fast.models import new_model
from dit_fast.objectives import Flow, ImprovedMeanFlow, MeanFlow
from dit_fast.preparation.build import build_shards
from dit_fast.recipes import load
from dit_fast.sampling import images as sampling
from dit_fast.sampling.images import sample_images
from dit_fast.sampling.options import SampleOptions
from dit_fast.sampling.samples import Samples
from dit_fast.train import preview
from dit_fast.train.loop import train
from dit_fast.world import single
from tests.helpers.cases import loop_over
from tests.helpers.tiny_sit import tiny_sit
from tests.helpers.two_runs import STEPS, sample_run


def options(**changes):
    return SampleOptions(**{"num_steps": 1, "per_class": 1, "chunk": 4, "sampler": "euler", **changes})


def draw(run, dataset, chosen, world=None, **more):
    return list(sample_images(run, chosen, world or single(), dataset, **more))


@pytest.fixture(scope="module")
def opened(place):
    """A run with a model that draws something: its head is not zero, and its labels differ."""
    loaded = load_run(place / "plain")
    torch.manual_seed(0)
    for name, parameter in loaded.model.named_parameters():
        if name.startswith(("final_layer", "y_embedder")):
            torch.nn.init.normal_(parameter, std=0.5)
    return loaded, loaded.dataset()


def test_every_guidance_scale_is_computed_and_captioned(opened):
    drawn = {scale: draw(*opened, options(cfg_scale=scale))[0] for scale in (-1.0, 0.0, 0.5, 1.0, 2.5, None)}
    pictures = [samples.images for scale, samples in drawn.items() if scale is not None]
    for i, first in enumerate(pictures):
        assert all((first != second).any() for second in pictures[:i])
    np.testing.assert_array_equal(drawn[None].images, drawn[2.5].images)
    assert [drawn[scale].text for scale in (0.5, None)] == [
        "euler, 1 steps, guidance 0.5, seed 0",
        "euler, 1 steps, guidance 2.5, seed 0",
    ]
    unlabelled = draw(*opened, options(cfg_scale=0.0, classes=(2, 1, 0)))[0].images
    np.testing.assert_array_equal(drawn[0.0].images, unlabelled)  # without the label the class does not matter


def test_captions_say_what_was_computed(opened):
    text = options(cfg_scale=1.0000001, guidance_high=0.7, cfg_channels="first_three", seed=3)
    run, dataset = opened
    assert (
        text.resolved(run, dataset).text()
        == "euler, 1 steps, guidance 1.0000001 for t in [0, 0.7] on channels 0 to 2, seed 3"
    )
    plain = options(cfg_scale=1.0, guidance_high=0.7, cfg_channels="first_three", weights="model")
    assert plain.resolved(run, dataset).text() == "euler, 1 steps, guidance 1, seed 0, raw weights"


@loop_over(
    ("changes", "text"),
    [
        ({"sampler": "sde"}, "sde, 3 steps, guidance 2, seed 0"),
        (
            {"sampler": "sde_heun", "diffusion": "sigma", "last_step": "tweedie", "last_step_size": 0.02},
            "sde_heun, 3 steps, diffusion 1 sigma, last step tweedie of 0.02, guidance 2, seed 0",
        ),
        (
            {"sampler": "sde", "diffusion_norm": 0.5, "last_step": "none"},
            "sde, 3 steps, diffusion 0.5 linear, last step none, guidance 2, seed 0",
        ),
        (
            {"time_range": (0.9, 0.1), "time_shift": 3.0},
            "euler, 3 steps, t from 0.9 to 0.1, times shifted by 3, guidance 2, seed 0",
        ),
        (
            {"guidance_low": 0.1, "guidance_bounds": "exclusive", "heun_guidance": "each"},
            "euler, 3 steps, guidance 2 for t in (0.1, 1] of each evaluation, seed 0",
        ),
        (
            {"guidance_high": 0.9, "guidance_bounds": "exclusive"},
            "euler, 3 steps, guidance 2 for t in (0, 0.9), seed 0",
        ),
    ],
)
def test_captions_say_what_is_not_the_default(place, changes, text):
    run = load_run(place / "plain")
    assert options(**{"num_steps": 3, "cfg_scale": 2.0, **changes}).resolved(run, run.dataset()).text() == text


def test_dopri5_is_captioned_by_its_tolerances(place):
    (samples,) = draw(run := load_run(place / "plain"), run.dataset(), options(sampler="dopri5", rtol=0.1))
    assert samples.text == "dopri5, atol 1e-06, rtol 0.1, guidance 2.5, seed 0"


def test_an_absent_package_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(UserError, match=r"sampler 'dopri5' needs torchdiffeq; run `pip install 'dit_fast\[ode\]'`"):
        options(sampler="dopri5")


def test_a_run_that_predicts_noise_on_vp_draws_finite_images(place, tmp_path):
    """In the preview and afterwards, by each kind of solver: at t = 0 its velocity would be infinite."""
    changes = [
        f"data.path={place / 'shards'}", f"run.dir={tmp_path}", "run.steps=2", "engine.global_batch=4",
        "preview.every=2", "preview.count=2", "preview.num_steps=2", "run.tensorboard=false",
        "objective.path=vp", "objective.prediction=noise",
    ]  # fmt: skip
    assert train(load("quickstart", changes), single()) == 2
    assert len(list(tmp_path.glob("samples/*.png"))) == 1
    model = load_run(tmp_path).model
    assert (model.prediction, model.path) == ("noise", "vp")  # so that `sample` knows it, too
    x, y = torch.randn(2, *model.shapes["image"]), torch.arange(2)
    given = {"path": "vp", "prediction": "noise"}
    assert torch.equal(sample(model, x, y, num_steps=2), sample(model, x, y, num_steps=2, **given))
    for call in (lambda: sample(model, x, y, path="linear"), lambda: flow_loss(model, x, y)):
        with pytest.raises(UserError, match="this SiT was trained on the vp path, not on 'linear'; give path='vp'"):
            call()
    for sampler in ("heun", "heun2", "rk4", "sde", "sde_heun"):
        samples = sample_run(tmp_path, per_class=1, sampler=sampler)
        assert samples.images.shape == (3, 32, 32, 3)


def test_a_run_without_label_dropout_is_not_guided(opened):
    loaded, dataset = opened
    model = dataclasses.replace(loaded.config.model, label_dropout=0.0)
    undropped = dataclasses.replace(loaded, model=new_model(model).eval())
    assert draw(undropped, dataset, options())[0].text == "euler, 1 steps, guidance 1, seed 0"
    with pytest.raises(UserError, match="trained null_label"):
        draw(undropped, dataset, options(cfg_scale=2.0))
    config = dataclasses.replace(loaded.config, model=model)
    with pytest.raises(UserError, match=r"preview\.cfg_scale=1 "):
        preview.Preview(config, dataset, single())


def test_images_that_are_not_finite_are_an_error(place, opened, monkeypatch):
    loaded, dataset = load_run(place / "plain"), opened[1]
    with torch.no_grad():
        loaded.model.final_layer.linear.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"image 0 \(weights of step 4\): its latent holds NaN or Inf \(3 of 3 images"):
        draw(loaded, dataset, options())
    with torch.no_grad():
        loaded.model.blocks[2].mlp.fc1.weight[0] = float("inf")
    with pytest.raises(UserError, match="block 2 gives NaN or Inf with the weights of step 4"):
        study_blocks(loaded, Inputs(dataset, 4, 4, 4))
    pictures = np.zeros((4, 3, 2, 2), np.float32)
    pictures[2, 1, 0, 0] = np.inf
    with pytest.raises(UserError, match=r"image 6 \(here\): its pixels hold NaN or Inf"):
        to_uint8(pictures, "here", first=4)


def test_levels_are_rounded_and_cut():
    values = np.array([-2.0, -1.0, 0.0, 1.0, 1.5, 2 / 255 * 3.6 - 1])
    images = np.broadcast_to(values[:, None, None, None], (6, 3, 2, 2))
    assert to_uint8(images, "here")[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255, 4]
    assert to_uint8(images, "here").shape == (6, 2, 2, 3)


def test_a_preview_that_is_not_finite_is_a_warning(place, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sampling, "sample", lambda model, noise, y, **_: noise * float("nan"))
    changes = [
        f"data.path={place / 'shards'}", f"run.dir={tmp_path}", "run.steps=1", "engine.global_batch=4",
        "preview.every=1", "preview.count=2", "run.tensorboard=false",
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING, "dit_fast"):
        assert train(load("quickstart", changes), single()) == 1
    (warning,) = [message for message in caplog.messages if "step_00000001.png" in message]
    assert "image 0 (weights of step 1)" in warning
    assert not list(tmp_path.glob("samples/*.png"))
    assert load_run(tmp_path).step == 1


def test_data_that_moved_is_named_or_found(place, tmp_path, capsys, monkeypatch):
    for name in ("shards", "plain"):
        shutil.copytree(place / name, tmp_path / name)
    loaded = load_run(tmp_path / "plain")
    assert loaded.state["dataset_root"] == str(place / "shards")
    relative = dataclasses.replace(loaded.config, data=dataclasses.replace(loaded.config.data, path="shards"))
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path)
        assert dataclasses.replace(loaded, config=relative).dataset().root == "shards"
        patched.chdir("/")
        assert dataclasses.replace(loaded, config=relative).dataset().root == str(place / "shards")
        old = {key: value for key, value in loaded.state.items() if key != "dataset_root"}
        with pytest.raises(UserError, match=r"shards.*: no such folder.*--data"):
            dataclasses.replace(loaded, config=relative, state=old).dataset()
    moved = ["--data", str(tmp_path / "shards"), "--out"]
    few = ["--per-class", "1", "--num-steps", "1"]
    assert main(["sample", str(tmp_path / "plain"), *few, *moved, str(tmp_path / "a.png")]) == 0
    assert main(["report", str(tmp_path / "plain"), *moved, str(tmp_path / "report")]) == 0
    np.savez(tmp_path / "b.npz", images=np.zeros((4, 32, 32, 3), np.uint8), labels=np.arange(4) % 2)
    build_shards(tmp_path / "b.npz", tmp_path / "other", autoencoder="pca", size=32, progress=False)
    capsys.readouterr()
    for command in ("sample", "report"):
        assert main([command, str(tmp_path / "plain"), "--data", str(tmp_path / "other")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "another data set" in line
        assert "--data" in line


def test_an_image_depends_on_seed_and_number_only(place):
    few = sample_run(place / "diverse", per_class=1)
    more = sample_run(place / "diverse", per_class=4)
    other = sample_run(place / "diverse", per_class=1, seed=1)
    assert (few.images.shape, few.images.dtype, few.step) == ((3, 32, 32, 3), np.uint8, STEPS)
    assert more.labels.tolist() == [0, 1, 2] * 4
    np.testing.assert_array_equal(few.images, more.images[:3])
    assert (few.images != other.images).mean() > 0.5
    assert (more.images[0] != more.images[3]).mean() > 0.5


def test_averaged_and_raw_weights_differ(place):
    drawn = [sample_run(place / "diverse", per_class=1, weights=name) for name in ("ema", "model")]
    assert (drawn[0].images != drawn[1].images).any()


def test_ranks_draw_whole_chunks_whose_bytes_do_not_depend_on_their_number(opened):
    chosen, alone = options(per_class=6), single()
    whole = draw(*opened, chosen)
    assert [(part.first, len(part.images)) for part in whole] == [(0, 4), (4, 4), (8, 4), (12, 4), (16, 2)]
    shares = [draw(*opened, chosen, dataclasses.replace(alone, rank=rank, size=3)) for rank in range(3)]
    assert [[part.first for part in share] for share in shares] == [[0, 12], [4, 16], [8]]
    parts = sorted((part for share in shares for part in share), key=lambda part: part.first)
    np.testing.assert_array_equal(Samples.join(parts).images, Samples.join(whole).images)
    assert [part.first for part in draw(*opened, chosen, done={0, 8})] == [4, 12, 16]


def test_samples_need_no_other_file_of_a_checkpoint_than_their_weights(place, tmp_path):
    run = shutil.copytree(place / "plain", tmp_path / "run")
    newest = run / "checkpoints" / f"step_{STEPS:08d}"
    for path in newest.glob("optim-*"):
        path.unlink()
    (newest / "model.safetensors").write_bytes(b"damage")
    assert load_run(run).step == STEPS
    assert load_run(run, weights="model").step == STEPS - 2
    with (newest / "ema.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert load_run(run).step == STEPS - 2


def test_scaling_and_its_inverse():
    class Info:
        scale, shift = (2.0, 0.5), 0.25

    latents = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(to_model_space(latents, Info)[:, 1], latents[:, 1] * 0.5 + 0.25)
    torch.testing.assert_close(from_model_space(to_model_space(latents, Info), Info), latents)


TOLD = {"2.5": {}, "8": {"omega": 8.0}, "8 for t in [0.5, 1]": {"omega": 8.0, "t_min": 0.5}}


def test_the_model_decides_what_was_left_open(opened):
    """A class token is sampled with the image; a mean velocity has its own solver, and guidance in its target."""
    run, dataset = opened
    changed = dataclasses.replace
    joint, mean = (
        dataclasses.replace(run, model=new_model(changed(run.config.model, **more)).eval())
        for more in ({"class_token": 6}, {"times": 2})
    )
    mean = dataclasses.replace(mean, config=changed(run.config, objective=MeanFlow.Config()))
    (drawn,) = draw(joint, dataset, options(class_token_cfg_scale=1.5))
    assert drawn.text == "euler, 1 steps, guidance 2.5 (1.5 of the class token), seed 0"
    (drawn,) = draw(mean, dataset, options(sampler=None))
    assert (drawn.images.shape, drawn.text) == ((3, 32, 32, 3), "mean_flow, 1 steps, guidance 1, seed 0")
    more = {"times": 2, "velocity_head": True, "guidance_condition": True}
    told = dataclasses.replace(
        run,
        model=tiny_sit(**{**dataclasses.asdict(run.model.config), **more}),
        config=changed(run.config, objective=ImprovedMeanFlow.Config()),
    )
    found = {text: draw(told, dataset, options(sampler=None, **given))[0] for text, given in TOLD.items()}
    assert [drawn.text for drawn in found.values()] == [
        f"mean_flow, 1 steps, omega {text}, guidance 1, seed 0" for text in TOLD
    ]
    assert len({drawn.images.tobytes() for drawn in found.values()}) == len(TOLD)
    with pytest.raises(UserError, match="'heun' does not fit the objective of this run; use mean_flow"):
        draw(mean, dataset, options(sampler="heun"))


def test_samplers_take_the_shift_that_a_run_was_trained_with(opened):
    """Unless they are told another; a solver that chooses its own steps has none."""
    run, dataset = opened
    shifted = dataclasses.replace(run, config=dataclasses.replace(run.config, objective=Flow.Config(time_shift=3.0)))
    told = {"sampler": "euler", "num_steps": 4}
    (own,), (same,) = draw(shifted, dataset, options(**told)), draw(run, dataset, options(**told, time_shift=3.0))
    assert own.text == same.text == "euler, 4 steps, times shifted by 3, guidance 2.5, seed 0"
    assert np.array_equal(own.images, same.images)
    assert draw(shifted, dataset, options(**told, time_shift=2.0))[0].text.startswith(
        "euler, 4 steps, times shifted by 2"
    )
    assert options(sampler="dopri5").resolved(shifted, dataset).time_shift is None


def test_labels_are_a_function_of_the_seed_and_the_number(opened):
    """Balanced or uniform over the classes, whatever is asked for together."""
    index = torch.arange(3000)
    few = options(per_class=None, count=10, labels="random", classes=(0, 2), seed=3).resolved(*opened)
    drawn = few.labels_of(index)
    assert few.total == 10
    torch.testing.assert_close(drawn[5:9], few.labels_of(index[5:9]))
    shares = torch.bincount(drawn) / len(index)
    assert shares[1] == 0
    assert abs(shares[0] - 0.5) < 0.04
    assert (options(per_class=None, count=10, labels="random", classes=(0, 2)).labels_of(index) != drawn).any()
    even = options(per_class=None, count=7).resolved(*opened)
    assert even.labels_of(index[:7]).tolist() == [0, 1, 2, 0, 1, 2, 0]
    chunks = draw(*opened, dataclasses.replace(few, chunk=4))
    assert [len(samples.images) for samples in chunks] == [4, 4, 2]
    assert np.concatenate([samples.labels for samples in chunks]).tolist() == drawn[:10].tolist()


def test_an_image_does_not_depend_on_how_many_are_decoded_with_it(opened):
    whole, part = (draw(*opened, options(per_class=None, count=count, chunk=5))[0].images for count in (5, 3))
    np.testing.assert_array_equal(whole[:3], part)
