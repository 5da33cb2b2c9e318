"""The figures of a report as matplotlib Figures: loss, diversity and its weight, throughput."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dit_fast.analysis.figures import plain, style
from dit_fast.display import rate
from dit_fast.report.metrics import Metrics, smooth
from dit_fast.report.reference import Band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RUN_COLOURS = ("#2a6fdb", "#8a8f98")  # the run, the baseline
TERM_COLOURS = {
    "total": "#2a6fdb",
    "orthogonality": "#d1495b",
    "mutual_information": "#2f9e73",
    "dispersion": "#b7791f",
}
WEIGHT_COLOUR = "#7b4fb5"


def loss_figure(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], axis: str) -> "Figure":
    """Loss against the step, (steps, values) for each run (first: the run, second: the baseline), smoothed over raw."""
    figure, (axes,) = _figure(1, height=3.2)
    for (label, (steps, values)), colour in zip(curves.items(), RUN_COLOURS, strict=False):
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values, _window(values)), color=colour, linewidth=1.8, label=plain(label))
    axes.set(xlabel="step", ylabel=axis)
    _head_room(axes, [values for _, values in curves.values()])
    axes.legend(loc="upper right", frameon=False)
    return figure


def diversity_figure(metrics: Metrics, low: float | None = None, high: float | None = None) -> "Figure":
    """The diversity loss with its three terms above, and the weight it is multiplied by below.

    The steps at which the weight acts (is above zero) are shaded; `low` and `high` are the thresholds of the adaptive
    weight, drawn as lines.
    """
    figure, (top, bottom) = _figure(2, height=5.0, ratios=(2.2, 1))
    steps, weight = metrics.column("diversedit/weight")
    for term, colour in TERM_COLOURS.items():
        at, values = metrics.column(f"diversedit/{term}")
        width = 2.2 if term == "total" else 1.2
        top.plot(at, values, color=colour, linewidth=width, label=term.replace("_", " "))
    for threshold, text in ((low, "weight > 0"), (high, "weight = 1")):
        if threshold is not None:
            top.axhline(threshold, color=WEIGHT_COLOUR, linewidth=0.9, linestyle=(0, (4, 3)))
            top.annotate(
                f"{threshold:g}\n{text}", (1, threshold), xycoords=("axes fraction", "data"), xytext=(5, 0),
                textcoords="offset points", va="center", color=WEIGHT_COLOUR, fontsize=8.5, annotation_clip=False,
            )  # fmt: skip
    top.set(ylabel="diversity loss")
    top.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=4, frameon=False)
    bottom.plot(steps, weight, color=WEIGHT_COLOUR, linewidth=1.8)
    top_weight = max(float(weight[np.isfinite(weight)].max(initial=0.0)), 1e-3)
    bottom.set(xlabel="step", ylabel="weight", ylim=(-0.05 * top_weight, 1.08 * top_weight))
    for start, stop in acting_spans(steps, weight):
        for axes in (top, bottom):
            axes.axvspan(start, stop, color=WEIGHT_COLOUR, alpha=0.08, linewidth=0)
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
            axes.fill_between(band.steps, low, high, color=RUN_COLOURS[1], alpha=0.25, linewidth=0)
            axes.plot(band.steps, band.middle, color=RUN_COLOURS[1], linewidth=0.9)
            axes.plot(band.steps, band.values, color=RUN_COLOURS[0], linewidth=1.4)
            axes.plot(band.steps[out], band.values[out], "o", color=TERM_COLOURS["orthogonality"], markersize=4)
            axes.set_title(plain(name))
        for axes in panels:
            axes.axis("off")
        figure.supxlabel("step")
    return figure


def throughput_figure(runs: Mapping[str, Metrics]) -> "Figure":
    """Samples per second against the step, all ranks together; the dotted line is the median."""
    figure, (axes,) = _figure(1, height=2.6)
    for (label, metrics), colour in zip(runs.items(), RUN_COLOURS, strict=False):
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


def _window(values: np.ndarray) -> int:
    return max(len(values) // 25, 1)


def _head_room(axes: "Axes", series: Sequence[np.ndarray]) -> None:
    """The first steps of a run dwarf the rest; the axis is cut so that what follows can be read."""
    finite = np.concatenate([values[np.isfinite(values)] for values in series])
    if len(finite) > 20:
        low, high = np.quantile(finite, [0.0, 0.97])
        axes.set_ylim(low - 0.05 * (high - low), high + 0.25 * (high - low))
