"""Samples and the report of two tiny runs made by the real trainer on real shards."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from dit_fast.autoencoders.pixels import unscale
from dit_fast.checkpoint.run import load_run
from dit_fast.cli import main
from dit_fast.data import open_dataset
from dit_fast.errors import UserError
from dit_fast.report import story
from dit_fast.report.blocks import real_images, scaled_means, study_blocks
from dit_fast.report.sampling import SampleOptions, Samples, sample_run
from dit_fast.report.story import read_story, run_name

STEPS = 4
FAST = {"num_steps": 2, "cfg_scale": 1.0, "chunk": 4}


def test_an_image_depends_on_seed_and_number_only(place):
    few = sample_run(place / "diverse", SampleOptions(per_class=1, **FAST))
    more = sample_run(place / "diverse", SampleOptions(per_class=4, **FAST))
    other = sample_run(place / "diverse", SampleOptions(per_class=1, seed=1, **FAST))
    assert (few.images.shape, few.images.dtype, few.step) == ((3, 32, 32, 3), np.uint8, STEPS)
    assert more.labels.tolist() == [0, 1, 2] * 4
    np.testing.assert_array_equal(few.images, more.images[:3])
    assert (few.images != other.images).mean() > 0.5
    assert (more.images[0] != more.images[3]).mean() > 0.5


def test_averaged_and_raw_weights_differ(place):
    drawn = [
        sample_run(place / "diverse", SampleOptions(per_class=1, weights=name, **FAST)) for name in ("ema", "model")
    ]
    assert (drawn[0].images != drawn[1].images).any()


def test_progress_counts_to_its_total(place):
    calls = []
    sample_run(place / "plain", SampleOptions(classes=(2,), per_class=5, **FAST), lambda *call: calls.append(call))
    assert calls == [(4, 5), (5, 5)]


def test_a_class_outside_the_data_set_is_refused(place):
    with pytest.raises(UserError, match=r"class 3 is not in this data set; labels are 0\.\.2"):
        sample_run(place / "diverse", SampleOptions(classes=(0, 3)))


def test_sample_command_writes_a_grid_or_an_archive(place, tmp_path, capsys):
    fixed = ["sample", str(place / "diverse"), "--classes", "2,0", "--per-class", "2", "--num-steps", "2"]
    assert main([*fixed, "--out", str(tmp_path / "a.png")]) == 0
    assert main([*fixed, "--out", str(tmp_path / "a.npz")]) == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 128
    samples = Samples.load(tmp_path / "a.npz")
    assert samples.labels.tolist() == [2, 0, 2, 0]
    assert samples.text == "heun, 2 steps, guidance 2.5, seed 0"
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "a.png"), str(tmp_path / "a.npz")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--out", "a.jpg"], "must end in .png or .npz"),
        (["--out", "/proc/a.png"], "another place with --out"),
        (["--classes", "1,x"], "whole numbers"),
        (["--classes", ","], "whole numbers"),
        (["--classes", "1,0,1"], "class 1 is listed twice"),
        (["--classes", "3"], "labels are 0..2"),
        (["--sampler", "ddim"], "unknown sampler 'ddim'"),
        (["--cfg-scale", "nan"], "cfg_scale=nan"),
        (["--guidance-high", "1.5"], "guidance_high=1.5"),
        (["--per-class", "0"], "per_class=0"),
        (["--num-steps", "0"], "num_steps=0"),
        (["--batch", "0"], "chunk (--batch)=0"),
        (["--seed", "-1"], "seed=-1"),
        (["--data", "absent"], "no such folder"),
    ],
)
def test_wrong_options_are_one_line(place, capsys, changes, message):
    assert main(["sample", str(place / "diverse"), *changes]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_real_images_come_back_through_the_autoencoder(place):
    dataset = open_dataset(place / "shards")
    pictures, labels = real_images(dataset, (2, 0), 3)
    assert labels.tolist() == [2, 2, 2, 0, 0, 0]
    means = [pictures[labels == label].mean() for label in (0, 2)]
    assert means == pytest.approx([29.5, 149.5], abs=4)  # uniform in 0..59, plus 60 for each class


def test_scaling_and_its_inverse():
    import torch

    class Fake:
        class info:
            scale, shift = (2.0, 0.5), 0.25

    moments = torch.randn(3, 2, 2, 4, 4)
    torch.testing.assert_close(unscale(scaled_means(moments, Fake), Fake.info), moments[:, 0])


def test_block_study_has_one_row_per_block(place):
    study, plain = (
        study_blocks(loaded, loaded.dataset(), count=8)
        for loaded in (load_run(place / "diverse"), load_run(place / "plain"))
    )
    assert study.cka.shape == study.cosine.shape == (6, 6)
    np.testing.assert_allclose(study.cka.diagonal(), 1, atol=1e-9)
    assert ((study.rank > 1) & (study.rank < 160)).all()
    assert study.parameters > plain.parameters > 1_000_000


def test_report_stands_alone_and_shows_both_runs(place, tmp_path):
    arguments = ["report", str(place / "diverse"), "--baseline", str(place / "plain"), "--out", str(tmp_path)]
    assert main([*arguments, "--note", "a <b> & c"]) == 0
    page = (tmp_path / "report.html").read_text()
    names = {"samples", "loss", "diversity", "similarity", "throughput"}
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", *(f"{name}.png" for name in names)}
    assert page.count("data:image/png;base64,") == len(names)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "a &lt;b&gt; &amp; c" in page
    assert "plain SiT" in page
    for heading in ("What you see", "Samples beside real images", "Learning curve", "How alike the blocks are"):
        assert f"<h2>{heading}</h2>" in page
    with Image.open(tmp_path / "samples.png") as image:
        one_group = image.width
    assert one_group > 5 * 64 + 2 * 2 * 64


def test_a_report_beside_itself_is_refused(place, tmp_path, capsys):
    arguments = ["report", str(place / "plain"), "--baseline", str(place / "plain"), "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert "is the run itself" in capsys.readouterr().err


def test_report_of_a_plain_run_has_no_diversity_section(place, tmp_path):
    assert main(["report", str(place / "plain"), "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "diversity.png").exists()
    assert "Diversity between blocks" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("step", "text"), [(STEPS, "kept"), (STEPS - 1, "new")])
def test_samples_of_an_older_step_are_drawn_anew(place, tmp_path, monkeypatch, step, text):
    run = shutil.copytree(place / "diverse", tmp_path / "run")
    images, labels = np.zeros((2, 32, 32, 3), np.uint8), np.array([2, 0])
    Samples(images, labels, step, "kept").save(run / "samples.npz")
    drawn = Samples(images, labels, STEPS, "new")
    asked = []
    monkeypatch.setattr(story, "draw_samples", lambda loaded, dataset, options: asked.append(options) or drawn)
    assert read_story(run, like=drawn).samples.text == text
    assert [options.classes for options in asked] == ([(2, 0)] if text == "new" else [])


def test_names_of_runs():
    def config(methods, wiring="input"):
        return {"methods": dict.fromkeys(methods), "model": {"skip_wiring": wiring}}

    assert run_name(config(["diversedit", "repa"])) == "DiverseDiT + REPA"
    assert run_name(config([])) == "SiT with long skips"
    assert run_name(config([], "off")) == "plain SiT"


def test_damaged_samples_are_named(tmp_path):
    path, images = tmp_path / "samples.npz", np.zeros((2, 4, 4, 3), np.uint8)
    Samples(images, np.array([0, 1]), 1, "whole").save(path)
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[:-40], whole[:200] + b"damage" + whole[206:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"samples\.npz"):
            Samples.load(path)
    for wrong in ((images[:1], np.array([0, 1])), (images + 0.0, np.array([0, 1])), (images[:0], np.array([], int))):
        Samples(*wrong, 1, "wrong").save(path)
        with pytest.raises(UserError, match=r"samples\.npz"):
            Samples.load(path)
