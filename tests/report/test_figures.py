"""Figures say what was logged: their lines, shaded spans and colours are checked, not pixels alone."""

import io

import numpy as np
import pytest
from PIL import Image

from dit_fast.analysis.figures import to_png
from dit_fast.methods import METHODS
from dit_fast.report import figures
from dit_fast.report.metrics import Metrics

SETTINGS = {"weight": "paper", "low": 0.1, "high": 0.5}


def logged(count=40, diverse=True):
    rows = []
    for number in range(count):
        step, total = 10 * (number + 1), 0.6 * 0.93**number
        row = {"step": step, "flow": 0.5 + 2 * 0.9**number, "samples_per_s": 100.0 + number % 3}
        if diverse:
            row |= {f"diversedit/{term}": total for term in ("total", "orthogonality", "mutual_information")}
            row |= {"diversedit/dispersion": -0.01, "diversedit/weight": max(total - 0.1, 0.0)}
        rows.append(row)
    return Metrics(tuple(rows))


def is_picture(figure):
    with Image.open(io.BytesIO(to_png(figure))) as image:
        pixels = np.asarray(image.convert("RGB"))
    return min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_loss_of_both_runs_is_drawn_raw_and_smoothed():
    curves = {"one": logged().column("flow"), "two": logged(25).column("flow")}
    figure = figures.loss_figure(curves, "loss")
    lines = figure.axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [40, 40, 25, 25]
    np.testing.assert_array_equal(lines[0].get_ydata(), curves["one"][1])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["one", "two"]
    assert is_picture(figure)


@pytest.mark.parametrize("rows", [logged(1).rows, ({"step": 1, "flow": None},), tuple(
    {"step": step, "flow": float("nan"), "samples_per_s": float("inf"), "diversedit/weight": float("nan")}
    for step in range(30)
)])  # fmt: skip
def test_figures_of_runs_that_logged_little_or_nothing_finite(rows):
    metrics = Metrics(rows)
    assert is_picture(figures.loss_figure({"a folder $x^$": metrics.column("flow")}, "loss"))
    panel = METHODS["diversedit"].panel(SETTINGS, metrics)
    assert (panel is None) == (not metrics.has("diversedit/weight"))
    if panel is not None:
        assert is_picture(figures.panel_figure(metrics, panel))
    assert is_picture(figures.throughput_figure({"a folder $x^$": metrics}))


def test_diversity_figure_shades_where_the_weight_acts():
    metrics = logged()
    steps, weight = metrics.column("diversedit/weight")
    (span,) = figures.acting_spans(steps, weight)
    assert span == (10.0, float(steps[weight > 0][-1]))
    panel = METHODS["diversedit"].panel(SETTINGS, metrics)
    assert any("acted in" in text for text in panel.paragraphs)
    figure = figures.panel_figure(metrics, panel)
    for axes in figure.axes:
        (shade,) = axes.patches
        assert (shade.get_x(), shade.get_x() + shade.get_width()) == pytest.approx(span)
    assert is_picture(figure)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ([0, 0, 0], []),
        ([1, 1, 1], [(1.0, 3.0)]),
        ([1, 0, 1], [(1.0, 1.0), (3.0, 3.0)]),
        ([0, 0.2, 0.1], [(2.0, 3.0)]),
    ],
)
def test_acting_spans(weight, expected):
    assert figures.acting_spans(np.arange(1, 4), np.array(weight, float)) == expected


def test_throughput_names_the_median_and_skips_runs_without_it():
    figure = figures.throughput_figure({"one": logged(), "none": Metrics(({"step": 1},))})
    (text,) = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert text == "one: median 101"
    assert is_picture(figure)
