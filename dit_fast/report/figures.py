"""The figures of a report as matplotlib Figures: loss, diversity and its weight, block similarity, throughput."""

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

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
INK, GRID = "#3b4048", "#e4e6ea"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c9ccd2",
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def loss_figure(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], axis: str) -> "Figure":
    """Loss against the step, (steps, values) for each run (first: the run, second: the baseline), smoothed over raw."""
    figure, (axes,) = _figure(1, height=3.2)
    for (label, (steps, values)), colour in zip(curves.items(), RUN_COLOURS, strict=False):
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values, _window(values)), color=colour, linewidth=1.8, label=_plain(label))
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


def similarity_figure(matrices: Mapping[str, np.ndarray]) -> "Figure":
    """One heat map [K, K] per run on a common scale from 0 to 1; blocks are counted from 1. Titles give the mean
    over different blocks."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(4.4 * len(matrices) + 0.6, 4.1), layout="constrained", dpi=110)
        grid = figure.subplots(1, len(matrices), squeeze=False)[0]
        for axes, (label, matrix) in zip(grid, matrices.items(), strict=True):
            count = len(matrix)
            image = axes.imshow(matrix, vmin=0, vmax=1, cmap="magma", origin="lower")
            off = matrix[~np.eye(count, dtype=bool)].mean() if count > 1 else float("nan")
            axes.set_title(f"{_plain(label)}\nmean over different blocks {off:.2f}")
            ticks = range(0, count, 1 + (count - 1) // 14)
            axes.set_xticks(ticks, [str(i + 1) for i in ticks])
            axes.set_yticks(ticks, [str(i + 1) for i in ticks])
            axes.set(xlabel="block", ylabel="block")
            axes.grid(False)
            if count <= 8:
                for (i, j), value in np.ndenumerate(matrix):
                    colour = "white" if value < 0.65 else "black"
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
        figure.colorbar(image, ax=list(grid), label="linear CKA", shrink=0.85)
    return figure


def reference_figure(bands: Mapping[str, Band]) -> "Figure":
    """A small panel for each quantity: its band around the recorded mean, the run, and dots where that is outside."""
    from matplotlib.figure import Figure

    rows = -(-len(bands) // 3)
    with _style(font_size=8, axes_titlesize=8.5):
        figure = Figure(figsize=(8.2, 0.4 + 1.5 * rows), layout="constrained", dpi=110)
        panels = iter(figure.subplots(rows, 3, squeeze=False).flat)
        for (name, band), axes in zip(bands.items(), panels, strict=False):
            low, high, out = band.middle - band.half, band.middle + band.half, band.outside
            axes.fill_between(band.steps, low, high, color=RUN_COLOURS[1], alpha=0.25, linewidth=0)
            axes.plot(band.steps, band.middle, color=RUN_COLOURS[1], linewidth=0.9)
            axes.plot(band.steps, band.values, color=RUN_COLOURS[0], linewidth=1.4)
            axes.plot(band.steps[out], band.values[out], "o", color=TERM_COLOURS["orthogonality"], markersize=4)
            axes.set_title(_plain(name))
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
        axes.plot(steps, values, color=colour, linewidth=1.2, label=f"{_plain(label)}: median {rate(middle)}")
        axes.axhline(middle, color=colour, linewidth=0.9, linestyle=":")
    axes.set(xlabel="step", ylabel="samples per second")
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(loc="lower right", frameon=False)
    return figure


def to_png(figure: "Figure") -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _style(**more: Any) -> AbstractContextManager[None]:
    import matplotlib

    return matplotlib.rc_context(STYLE | {name.replace("_", "."): value for name, value in more.items()})


def _figure(rows: int, height: float, ratios: Sequence[float] = (1,)) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(8.2, height), layout="constrained", dpi=110)
        grid = figure.subplots(rows, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios})
    return figure, [axes for (axes,) in grid]


def _plain(text: str) -> str:
    """Text that matplotlib takes as it is: a dollar sign starts a formula otherwise."""
    return text.replace("$", r"\$")


def _window(values: np.ndarray) -> int:
    return max(len(values) // 25, 1)


def _head_room(axes: "Axes", series: Sequence[np.ndarray]) -> None:
    """The first steps of a run dwarf the rest; the axis is cut so that what follows can be read."""
    finite = np.concatenate([values[np.isfinite(values)] for values in series])
    if len(finite) > 20:
        low, high = np.quantile(finite, [0.0, 0.97])
        axes.set_ylim(low - 0.05 * (high - low), high + 0.25 * (high - low))
