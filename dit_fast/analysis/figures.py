"""Figures of block outputs: heat maps over checkpoints or times (DiverseDiT's Figure 1), ranks, gradients by term."""

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#2a6fdb", "#d1495b", "#2f9e73", "#b7791f", "#7b4fb5", "#3aa6b9", "#8a8f98")
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
COLUMNS = 3  # side by side: a page of 10 inches can still be read
NUMBERS = 8  # blocks, at most, whose values are written into the cells


def heat_maps(
    matrices: Mapping[str, np.ndarray], label: str, bounds: Sequence[int] = (), names: Sequence[str] = ()
) -> "Figure":
    """Square maps [K, K] on a common scale from 0 to 1, blocks counted from 1; titles give the mean off the diagonal.

    bounds: of several runs in one map, the blocks of each. They are called A, B ..., which the head explains, and
    titles give the mean between runs.
    """
    from matplotlib.figure import Figure

    columns = min(len(matrices), COLUMNS)
    rows = -(-len(matrices) // columns)
    side = 4.4 if columns < 3 else 3.0
    with style():
        figure = Figure(figsize=(side * columns + 0.8, (side - 0.3) * rows), layout="constrained", dpi=110)
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (title, matrix) in zip(grid, matrices.items(), strict=False):
            image = axes.imshow(matrix, vmin=0, vmax=1, cmap="magma", origin="lower")
            mean = between(matrix, bounds) if bounds else off_diagonal(matrix)
            what = "between runs" if bounds else "over different blocks"
            axes.set_title(f"{plain(title)}\nmean {what} {mean:.2f}")
            axes.grid(False)
            if bounds:
                _mark_runs(axes, bounds)
            else:
                ticks = range(0, len(matrix), 1 + (len(matrix) - 1) // 14)
                axes.set_xticks(ticks, [str(i + 1) for i in ticks])
                axes.set_yticks(ticks, [str(i + 1) for i in ticks])
                axes.set(xlabel="block", ylabel="block")
            if len(matrix) <= NUMBERS:
                for (i, j), value in np.ndenumerate(matrix):
                    colour = "white" if not value >= 0.65 else "black"
                    size = 11 if side > 4 else 8
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=size)
        for axes in grid[len(matrices) :]:
            axes.axis("off")
        figure.colorbar(image, ax=grid, label=label, shrink=0.85)
        if bounds:
            listed = "\n".join(f"{_letter(i)}: {plain(name)}" for i, name in enumerate(names))
            figure.suptitle(listed, x=0.01, ha="left", fontsize=9)
    return figure


def _letter(index: int) -> str:
    """A .. Z, AA .."""
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def _mark_runs(axes: Any, bounds: Sequence[int]) -> None:
    ends = np.cumsum(bounds)
    middles = ends - np.array(bounds) / 2 - 0.5
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=1.2)
        axes.axvline(end - 0.5, color="white", linewidth=1.2)
    letters = [_letter(index) for index in range(len(bounds))]
    axes.set_xticks(middles, letters)
    axes.set_yticks(middles, letters)


def off_diagonal(matrix: np.ndarray) -> float:
    """Mean over different blocks; NaN where there is one block."""
    count = len(matrix)
    return float(matrix[~np.eye(count, dtype=bool)].mean()) if count > 1 else float("nan")


def between(matrix: np.ndarray, bounds: Sequence[int]) -> float:
    """Mean over pairs of blocks of different runs, of `bounds` blocks each."""
    run = np.repeat(np.arange(len(bounds)), bounds)
    return float(matrix[run[:, None] != run].mean())


def lines_figure(panels: Mapping[str, Mapping[str, np.ndarray]], axis: str) -> "Figure":
    """A panel for each title; in it, a line over the blocks for each label, from light to dark in their order."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(4.2 * len(panels) + 0.4, 3.4), layout="constrained", dpi=110)
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (title, lines) in zip(grid, panels.items(), strict=True):
            shades = colormaps["viridis_r"](np.linspace(0.15, 0.95, len(lines)))
            for (label, values), colour in zip(lines.items(), shades, strict=True):
                axes.plot(
                    np.arange(len(values)) + 1, values, color=colour, marker="o", markersize=3, label=plain(label)
                )
            axes.set(xlabel="block", title=plain(title))
            axes.legend(frameon=False, fontsize=8)
            _whole_ticks(axes, max(len(values) for values in lines.values()))
        grid[0].set_ylabel(axis)
    return figure


def shares_figure(panels: Mapping[str, tuple[Sequence[str], np.ndarray]]) -> "Figure":
    """A panel for each title with (terms, norms [terms, K]): stacked bars, each term's share of the sum of norms."""
    from matplotlib.figure import Figure

    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for terms, _ in panels.values() for name in terms))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    with style():
        figure = Figure(figsize=(max(2.6 * columns, 4.6), 2.6 * rows + 0.6), layout="constrained", dpi=110)
        grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
        for axes, (title, (terms, norms)) in zip(grid, panels.items(), strict=False):
            shares = norms / np.maximum(norms.sum(axis=0), np.finfo(float).tiny)
            base = np.zeros(shares.shape[1])
            for name, share in zip(terms, shares, strict=True):
                axes.bar(np.arange(len(share)) + 1, share, bottom=base, color=colours[name], label=plain(name))
                base = base + share
            axes.set(xlabel="block", title=plain(title), ylim=(0, 1))
            axes.grid(visible=False, axis="x")
            axes.set_axisbelow(True)
            _whole_ticks(axes, shares.shape[1])
        for axes in grid[len(panels) :]:
            axes.axis("off")
        grid[0].set_ylabel("share of gradient norm")
        handles = dict(zip(*reversed(_handles(grid)), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def _handles(grid: Sequence[Any]) -> tuple[list[Any], list[str]]:
    pairs = [axes.get_legend_handles_labels() for axes in grid]
    return [handle for handles, _ in pairs for handle in handles], [label for _, labels in pairs for label in labels]


def _whole_ticks(axes: Any, count: int) -> None:
    axes.set_xticks(range(1, count + 1, 1 + (count - 1) // 14))


def to_png(figure: "Figure") -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def style(**more: Any) -> AbstractContextManager[None]:
    """The look of all figures; more: rcParams with _ for the dot."""
    import matplotlib

    return matplotlib.rc_context(STYLE | {name.replace("_", "."): value for name, value in more.items()})


def plain(text: str) -> str:
    """Text that matplotlib takes as it is: a dollar sign starts a formula otherwise."""
    return text.replace("$", r"\$")
