"""All results as Markdown tables, and a roofline figure per device."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_fast.benchmarks.cases.case import BACKWARD, BOTH, FORWARD
from dit_fast.benchmarks.ceilings import DTYPES
from dit_fast.benchmarks.results import load_all
from dit_fast.benchmarks.run import target_line, throughput
from dit_fast.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PUBLISHED, OURS, OTHER = "#8a8f98", "#2a6fdb", "#b7791f"
INK, GRID = "#3b4048", "#e4e6ea"
MARKERS = "osD^v<>ph*"
HEADS = (
    "case", "part", "side", "ms (median, quartiles)", "GB/s", "TFLOP/s", "of bound", "ratio", "peak MB", "moved MB",
    "waits",
)  # fmt: skip


def report(folder: Path) -> None:
    """Prints the tables and writes <folder>/<device>/roofline.png. Raises UserError where there is no result."""
    results = load_all(folder)
    if not results:
        raise UserError(f"no results in {folder}; run dit-fast bench all")
    for result in results:
        print(markdown(result))
    for device in sorted({result["device"]["slug"] for result in results}):
        here = [result for result in results if result["device"]["slug"] == device]
        path = folder / device / "roofline.png"
        roofline(here).savefig(path, dpi=150, bbox_inches="tight")
        print(f"-> {path}")


def markdown(result: dict[str, Any]) -> str:
    """One benchmark as a Markdown section."""
    versions, ceilings = result["versions"], result["ceilings"]
    state = {None: "", True: " with local changes", False: ""}[result["dirty"]]
    lines = [
        f"## {result['benchmark']} on {result['device']['name']}",
        "",
        f"torch {versions['torch']}, triton {versions['triton'] or 'absent'}, "
        f"commit {str(result['commit'])[:12]}{state}, "
        f"{result['written'][:10]}, {result['gate']['passed']} tests passed before; copy "
        f"{ceilings['copy_bytes_per_s'] / 1e9:.4g} GB/s, read {ceilings['read_bytes_per_s'] / 1e9:.4g} GB/s.",
        "",
        *(f"- {target_line(target)}" for target in result["targets"]),
        *([""] if result["targets"] else []),
        f"| {' | '.join(HEADS)} |",
        f"|{' --- |' * len(HEADS)}",
    ]
    for case in result["cases"]:
        for part, entry in case["parts"].items():
            for name, side in entry["sides"].items():
                low, high = side["quartiles_s"]
                lines.append(
                    f"| {case['name']} | {part} | {name}{throughput(side)} | {side['median_s'] * 1e3:.4g} "
                    f"({low * 1e3:.4g} to {high * 1e3:.4g}) | {side['bytes_per_s'] / 1e9:.4g} | "
                    f"{side['flops_per_s'] / 1e12:.3g} | {side['of_bound']:.1%} | {side['speedup']:.2f} | "
                    f"{_costs(part, case['costs'][name])} |"
                )
    reasons = {
        **{f"{case['name']}, {name}": why for case in result["cases"] for kind in ("skipped", "failed")
           for name, why in case.get(kind, {}).items()},
        **result.get("failed", {}),
        **dict.fromkeys(result.get("left_out", ()), "no time was left"),
    }  # fmt: skip
    lines += ["", *(f"- not measured: {what} ({why})" for what, why in reasons.items())] if reasons else []
    return "\n".join([*lines, ""])


def _costs(part: str, costs: dict[str, int]) -> str:
    """Costs belong to a whole call, so only its line has them."""
    if part in (FORWARD, BACKWARD):
        return " | | "
    moved, waits = costs.get("traffic_bytes"), costs.get("host_waits", "")
    return f"{costs['peak_memory_bytes'] / 1e6:.4g} | {'' if moved is None else f'{moved / 1e6:.4g}'} | {waits}"


def roofline(results: list[dict[str, Any]]) -> "Figure":
    """Achieved FLOP/s over unavoidable FLOP per unavoidable byte, forward + backward, one device's op results.

    Sides that do the same work stand above each other, and their distance is their ratio.
    """
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    points = [
        (result["benchmark"], side, values["flops"] / values["bytes"], values["flops_per_s"])
        for result in results
        for case in result["cases"]
        if (entry := case["parts"].get(BOTH))
        for side, values in entry["sides"].items()
    ]
    measured = [result["ceilings"] for result in results]
    memory = max(max(one["copy_bytes_per_s"], one["read_bytes_per_s"]) for one in measured)
    matmul = {dtype: max(one["matmul_flops_per_s"][dtype] for one in measured) for dtype in DTYPES}
    with matplotlib.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK}):
        figure = Figure(figsize=(7.6, 4.6))
        axes = figure.subplots()
        highest = max(matmul.values())
        low = min([0.5, *(x / 2 for _, _, x, _ in points)])
        high = max([4 * highest / memory, *(2 * x for _, _, x, _ in points)])
        for dtype, peak in matmul.items():
            intensity = np.geomspace(low, high, 400)
            axes.plot(intensity, np.minimum(intensity * memory, peak), color=INK, linewidth=1.2)
            axes.annotate(f"{dtype} matmul, {_si(peak)}FLOP/s", (high, peak), xytext=(-4, 3),
                          textcoords="offset points", ha="right", fontsize=8.5)  # fmt: skip
        axes.annotate(f"memory, {_si(memory)}B/s", (2 * low, 2 * low * memory), xytext=(8, -9),
                      textcoords="offset points", fontsize=8.5)  # fmt: skip
        benchmarks = sorted({name for name, *_ in points})
        for name, side, x, y in points:
            axes.plot(x, y, MARKERS[benchmarks.index(name) % len(MARKERS)], color=_colour(side), markersize=6,
                      alpha=0.85, markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
        for number, name in enumerate(benchmarks):
            axes.plot([], [], MARKERS[number % len(MARKERS)], color=INK, label=name)
        for colour, label in ((OURS, "dit_fast"), (PUBLISHED, "published or eager"), (OTHER, "torch.compile")):
            if any(
                colour == (OURS if s.startswith("dit_fast") else OTHER if "compile" in s else PUBLISHED)
                for _, s, _, _ in points
            ):
                axes.plot([], [], "s", color=colour, label=label)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="FLOP/s", xlim=(low, high))
        axes.set_title(f"{results[0]['device']['name']}, forward + backward", loc="left", fontsize=10.5)
        axes.grid(color=GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    return figure


def _colour(side: str) -> str:
    return OURS if side.startswith("dit_fast") else OTHER if "compile" in side else PUBLISHED


def _si(value: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "
