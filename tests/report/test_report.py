"""Samples and the report of two tiny runs made by the real trainer on real shards."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dit_fast.cli import main
from dit_fast.data import open_dataset
from dit_fast.evaluation.records import Evaluation, append_evaluation
from dit_fast.methods import METHODS
from dit_fast.report import story
from dit_fast.report.page import _next_steps, _what_you_see
from dit_fast.report.real import real_images
from dit_fast.report.story import RunStory, read_story, run_name
from dit_fast.sampling.samples import Samples
from tests.helpers.two_runs import STEPS
from tests.report.test_comparison import PROTOCOL


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
    names = {"samples", "loss", "diversedit", "similarity", "throughput"}
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", *(f"{name}.png" for name in names)}
    analysed = [path for run in ("diverse", "plain") for path in (place / run / "analysis").glob("*.png")]
    assert page.count("data:image/png;base64,") == len(names) + len(analysed)
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "a &lt;b&gt; &amp; c" in page
    assert "plain SiT" in page
    for heading in ("What you see", "Samples beside real images", "Learning curve", "How alike the blocks are"):
        assert f">{heading}</h2>" in page
    assert page.count("<td>methods</td>") == 1
    assert "<td>model.skip_wiring</td><td>&#34;input&#34;</td><td>&#34;off&#34;</td>" in page
    with Image.open(tmp_path / "samples.png") as image:
        one_group = image.width
    assert one_group > 5 * 64 + 2 * 2 * 64


def test_a_report_beside_itself_is_refused(place, tmp_path, capsys):
    arguments = ["report", str(place / "plain"), "--baseline", str(place / "plain"), "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert "is named twice" in capsys.readouterr().err


def test_report_of_a_plain_run_has_no_diversity_section(place, tmp_path):
    assert main(["report", str(place / "plain"), "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "diversedit.png").exists()
    assert "Diversity between blocks" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("step", "text"), [(STEPS, "kept"), (STEPS - 1, "new")])
def test_samples_of_an_older_step_are_drawn_anew(place, tmp_path, monkeypatch, step, text):
    run = shutil.copytree(place / "diverse", tmp_path / "run")
    images, labels = np.zeros((2, 32, 32, 3), np.uint8), np.array([2, 0])
    Samples(images, labels, step, "kept").save(run / "samples.npz")
    drawn = Samples(images, labels, STEPS, "new")
    asked = []
    monkeypatch.setattr(story, "sample_images", lambda run, options, *_: asked.append(options) or [drawn])
    assert read_story(run, like=Samples(images, labels, STEPS, "kept")).samples.text == text
    assert [options.classes for options in asked] == ([(2, 0)] if text == "new" else [])
    asked.clear()
    read_story(run, like=Samples(images, labels, STEPS, "drawn in another way"))
    assert [options.classes for options in asked] == [(2, 0)]


def test_names_of_runs():
    def config(methods, wiring="input", objective="flow"):
        model = {"name": "SiT-S/2", "skip_wiring": wiring}
        return {"methods": dict.fromkeys(methods), "model": model, "objective": {"name": objective}}

    assert run_name(config(["diversedit", "repa"])) == "DiverseDiT + REPA"
    assert run_name(config([])) == "SiT with long skips"
    assert run_name(config([], "off")) == "plain SiT"
    assert run_name(config(["reg"], "off", "mean_flow")) == "mean flow + REG"


def test_runs_of_one_name_are_told_apart_and_numbers_have_their_protocol(place, tmp_path, capsys):
    runs = [shutil.copytree(place / "plain", tmp_path / name / "run") for name in ("a", "b", "c")]
    for number, run in enumerate(runs):
        config = json.loads((run / "config.json").read_text())
        config["run"]["seed"] = number
        (run / "config.json").write_text(json.dumps(config))
        append_evaluation(
            run, Evaluation(step=STEPS, values={"FD-EffLite0": 3.0 + number, "KD-EffLite0": 1.0}, protocol=PROTOCOL)
        )
    (runs[0] / "analysis").mkdir()
    shutil.copy(Path(__file__).parents[2] / "docs" / "quickstart_samples.png", runs[0] / "analysis" / "cka_blocks.png")
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "plain SiT (a/run)" in page
    assert "FD-EffLite0 at step" in page
    assert "<td>4</td><td>1</td>" in page  # mean and spread
    assert page.count("guidance 1, weights ema") == 1
    assert "FD-EffLite0, KD-EffLite0: " in page
    assert "plain SiT (a/run): cka blocks" in page
    assert "Made by <code>dit-fast analyse</code>; " in page
    assert main(["report", str(runs[0]), "--out", str(tmp_path / "one")]) == 0
    page = (tmp_path / "one" / "report.html").read_text()
    assert (
        f"<th>step</th><th>FD-EffLite0</th><th>KD-EffLite0</th></tr></thead><tbody><tr><td>{STEPS}</td><td>3</td>"
        in page
    )
    other = Evaluation(step=STEPS, values={"FD-EffLite0": 5.0}, protocol=replace(PROTOCOL, guidance=3.0))
    append_evaluation(runs[0], other)
    assert main(["report", str(runs[0]), "--out", str(tmp_path / "one")]) == 0
    page = (tmp_path / "one" / "report.html").read_text()
    assert page.count("guidance 3, seed 0, weights ema") == page.count("guidance 1, seed 0, weights ema") == 1
    assert f"<td>2</td><td>{STEPS}</td><td>5</td><td>-</td>" in page


@pytest.mark.parametrize(("objective", "offered"), [("flow", True), ("ddpm", False), ("mean_flow", False)])
def test_only_samplers_that_a_run_has_are_offered(objective, offered):
    run = SimpleNamespace(folder="run", config={"objective": {"name": objective}})
    assert ("--sampler sde" in str(_next_steps(run).commands)) == offered


@pytest.mark.parametrize("name", METHODS)
def test_a_report_names_every_method_and_what_it_does(name):
    config = {"model": {"name": "SiT-Nano/2"}, "methods": {name: {}}, "objective": {"name": "flow"}}
    assert run_name(config) != name
    (text,) = _what_you_see(SimpleNamespace(config=config)).paragraphs[1:]
    assert text == f"What sets this run apart: {METHODS[name].about}."


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
