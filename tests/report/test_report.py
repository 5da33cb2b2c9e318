"""Samples and the report of two tiny runs made by the real trainer on real shards."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dit_fast.cli import main
from dit_fast.data import open_dataset
from dit_fast.methods import METHODS
from dit_fast.report import story
from dit_fast.report.page import _what_you_see
from dit_fast.report.real import real_images
from dit_fast.report.story import RunStory, read_story, run_name
from dit_fast.sampling.samples import Samples
from tests.helpers.two_runs import STEPS


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_real_images_come_back_through_the_autoencoder(place):
    dataset = open_dataset(place / "shards")
    pictures, labels = real_images(dataset, (2, 0), 3)
    assert labels.tolist() == [2, 2, 2, 0, 0, 0]
    means = [pictures[labels == label].mean() for label in (0, 2)]
    assert means == pytest.approx([29.5, 149.5], abs=4)  # uniform in 0..59, plus 60 for each class


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
    monkeypatch.setattr(story, "sample_images", lambda run, options, *_: asked.append(options) or [drawn])
    assert read_story(run, like=drawn).samples.text == text
    assert [options.classes for options in asked] == ([(2, 0)] if text == "new" else [])


def test_names_of_runs():
    def config(methods, wiring="input", objective="flow"):
        model = {"name": "SiT-S/2", "skip_wiring": wiring}
        return {"methods": dict.fromkeys(methods), "model": model, "objective": {"name": objective}}

    assert run_name(config(["diversedit", "repa"])) == "DiverseDiT + REPA"
    assert run_name(config([])) == "SiT with long skips"
    assert run_name(config([], "off")) == "plain SiT"
    assert run_name(config(["reg"], "off", "mean_flow")) == "mean flow + REG"


@pytest.mark.parametrize("name", METHODS)
def test_a_report_names_every_method_and_what_it_does(name):
    config = {"model": {"name": "SiT-Nano/2"}, "methods": {name: {}}, "objective": {"name": "flow"}}
    assert run_name(config) != name
    (text,) = _what_you_see(SimpleNamespace(config=config)).paragraphs[1:]
    assert text.startswith("What sets this run apart: ")


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        ({"name": "flow"}, "squared error of the predicted velocity. It falls"),
        ({"name": "flow", "prediction": "x", "weighting": "none"}, "squared error of the predicted clean latent. It"),
        (
            {"name": "flow", "prediction": "score", "weighting": "likelihood"},
            "predicted score times sigma, weighted as the likelihood bound asks. It falls",
        ),
        ({"name": "ddpm"}, "squared error of the predicted noise, the larger part"),
    ],
)
def test_a_learning_curve_is_said_to_be_of_what_was_predicted(objective, text):
    assert text in RunStory(*["", None, {"objective": objective}, *[None] * 5]).curve.text
