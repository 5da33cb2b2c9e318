"""The figures of a report as matplotlib Figures: loss, what methods logged, throughput."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dit_fast.analysis.figures import COLOURS, plain, style
from dit_fast.display import rate
from dit_fast.methods.base import Panel
from dit_fast.report.metrics import Metrics, smooth
from dit_fast.report.reference import Band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND = "#8a8f98"
WEIGHT_COLOUR = "#7b4fb5"


def loss_figure(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], axis: str) -> "Figure":
    """Loss against the step, (steps, values) for each run, smoothed over raw."""
    figure, (axes,) = _figure(1, height=3.2)
    for number, (label, (steps, values)) in enumerate(curves.items()):
        colour = _colour(number)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values, _window(values)), color=colour, linewidth=1.8, label=plain(label))
    axes.set(xlabel="step", ylabel=axis)
    _head_room(axes, [values for _, values in curves.values()])
    axes.legend(loc="upper right", frameon=False)
    return figure


def panel_figure(metrics: Metrics, panel: Panel) -> "Figure":
    """What a method logged: its curves, and below them the weight they are multiplied by, where it has one.

    The steps at which the weight acts (is above zero) are shaded.
    """
    below = panel.weight is not None
    figure, axes = _figure(2 if below else 1, height=5.0 if below else 3.2, ratios=(2.2, 1) if below else (1,))
    top = axes[0]
    for number, (label, column) in enumerate(panel.curves.items()):
        steps, values = metrics.column(column)
        top.plot(steps, values, color=_colour(number), linewidth=1.2 if number else 2.2, label=plain(label))
    for value, text in panel.limits.items():
        top.axhline(value, color=WEIGHT_COLOUR, linewidth=0.9, linestyle=(0, (4, 3)))
        top.annotate(
            f"{value:g}\n{text}", (1, value), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", va="center", color=WEIGHT_COLOUR, fontsize=8.5, annotation_clip=False,
        )  # fmt: skip
    top.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    if panel.weight is not None:
        steps, weight = metrics.column(panel.weight)
        axes[1].plot(steps, weight, color=WEIGHT_COLOUR, linewidth=1.8)
        top_weight = max(float(weight[np.isfinite(weight)].max(initial=0.0)), 1e-3)
        axes[1].set(ylabel="weight", ylim=(-0.05 * top_weight, 1.08 * top_weight))
        for start, stop in acting_spans(steps, weight):
            for each in axes:
                each.axvspan(start, stop, color=WEIGHT_COLOUR, alpha=0.08, linewidth=0)
    axes[-1].set(xlabel="step")
    return figure


def acting_spans(steps: np.ndarray, weight: np.ndarray) -> list[tuple[float, float]]:
    """(first, last) step of each unbroken stretch in which the logged weight is above zero."""
    spans: list[tuple[float, float]] = []
    acting = np.flatnonzero(weight > 0)
    for group in np.split(acting, np.flatnonzero(np.diff(acting) > 1) + 1):
        if len(group):
            spans.append((float(steps[group[0]]), float(steps[group[-1]])))
    return spans


def reference_figure(bands: Mapping[str, Band]) -> "Figure":
    """A small panel for each quantity: its band around the recorded mean, the run, and dots where that is outside."""
    from matplotlib.figure import Figure

    rows = -(-len(bands) // 3)
    with style(font_size=8, axes_titlesize=8.5):
        figure = Figure(figsize=(8.2, 0.4 + 1.5 * rows), layout="constrained", dpi=110)
        panels = iter(figure.subplots(rows, 3, squeeze=False).flat)
        for (name, band), axes in zip(bands.items(), panels, strict=False):
            low, high, out = band.middle - band.half, band.middle + band.half, band.outside
            axes.fill_between(band.steps, low, high, color=BAND, alpha=0.25, linewidth=0)
            axes.plot(band.steps, band.middle, color=BAND, linewidth=0.9)
            axes.plot(band.steps, band.values, color=COLOURS[0], linewidth=1.4)
            axes.plot(band.steps[out], band.values[out], "o", color=COLOURS[1], markersize=4)
            axes.set_title(plain(name))
        for axes in panels:
            axes.axis("off")
        figure.supxlabel("step")
    return figure


def throughput_figure(runs: Mapping[str, Metrics]) -> "Figure":
    """Samples per second against the step, all ranks together; the dotted line is the median."""
    figure, (axes,) = _figure(1, height=2.6)
    for number, (label, metrics) in enumerate(runs.items()):
        colour = _colour(number)
        steps, values = metrics.column("samples_per_s")
        if len(values) == 0:
            continue
        middle = float(np.median(values))
        axes.plot(steps, values, color=colour, linewidth=1.2, label=f"{plain(label)}: median {rate(middle)}")
        axes.axhline(middle, color=colour, linewidth=0.9, linestyle=":")
    axes.set(xlabel="step", ylabel="samples per second")
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(loc="lower right", frameon=False)
    return figure


def _figure(rows: int, height: float, ratios: Sequence[float] = (1,)) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(8.2, height), layout="constrained", dpi=110)
        grid = figure.subplots(rows, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios})
    return figure, [axes for (axes,) in grid]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _window(values: np.ndarray) -> int:
    return max(len(values) // 25, 1)


def _head_room(axes: "Axes", series: Sequence[np.ndarray]) -> None:
    """The first steps of a run dwarf the rest; the axis is cut so that what follows can be read."""
    finite = np.concatenate([values[np.isfinite(values)] for values in series])
    if len(finite) > 20:
        low, high = np.quantile(finite, [0.0, 0.97])
        axes.set_ylim(low - 0.05 * (high - low), high + 0.25 * (high - low))
