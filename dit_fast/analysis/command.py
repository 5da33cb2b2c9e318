"""`dit-fast analyse RUN ...`."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_fast.errors import ConfigError, UserError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

MAPS = 10  # at most, in one figure
EXAMPLE = """example:
  dit-fast analyse runs/quickstart/diversedit
  dit-fast analyse runs/pair/quickstart-sit/seed0 runs/pair/quickstart/seed0 --times 0.04 --count 512

Arrays and figures go to RUN/analysis; those of several runs beside each other to that of the first. Numbers that are
there already, of the same weights and options, are kept."""


def add_commands(subparsers: Any) -> None:
    """Adds the command; it sets `run`, a function of the parsed options."""
    analysing = subparsers.add_parser(
        "analyse",
        help="similarity, diversity, rank and gradients of the blocks of runs",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    analysing.set_defaults(run=_analyse)
    add = analysing.add_argument
    add("folders", nargs="+", metavar="RUN", type=Path, help="run folder; several are also compared with each other")
    add("--checkpoints", default="", metavar="STEP,...", help="of these steps (default: all that the run has kept)")
    add("--times", default="0.04,0.25,0.5,0.75,0.96", help="noise levels, 0 = data, 1 = noise (default: %(default)s)")
    add("--kernels", default="linear,rbf", help="of the CKA (default: %(default)s)")
    add("--rbf-width", type=float, default=1.0, help="in medians of the distances (default: %(default)s)")
    add("--weights", choices=("ema", "model"), default="ema", help="moving averages or the weights themselves")
    add("--count", type=int, default=1024, help="images, the first of the data set (default: %(default)s)")
    add("--minibatch", type=int, help="images that a CKA compares; divides --count (default: 256, or --count if less)")
    add("--batch", type=int, default=64, help="images in a forward; changes memory alone (default: %(default)s)")
    add("--gradient-batches", type=int, default=4, help="micro-batches for gradients; 0 = none (default: %(default)s)")
    add("--seed", type=int, default=0, help="of noise, times and dropped labels (default: %(default)s)")
    add("--data", help="where the data set of the runs lies now, if it moved")


def _analyse(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from dit_fast import files
    from dit_fast.analysis.figures import to_png
    from dit_fast.analysis.study import BETWEEN, BLOCKS, FOLDER, checkpoints_of, known, save, study_between, study_run
    from dit_fast.checkpoint.run import load_run
    from dit_fast.sampling.output import check_writable, writing

    chosen = _options(options)
    names = _names(options.folders)
    steps = _numbers("--checkpoints", options.checkpoints, int) if options.checkpoints else ()
    found = {name: checkpoints_of(run, steps) for name, run in zip(names, options.folders, strict=True)}
    dataset = load_run(options.folders[0]).dataset(options.data)
    for run, checkpoints in zip(options.folders, found.values(), strict=True):
        check_writable(run / FOLDER)
        if checkpoints[-1].state["dataset_fingerprint"] != dataset.info.fingerprint:
            raise UserError(f"{run}: was trained on another data set than {options.folders[0]}; analyse it by itself")
    chosen.inputs(dataset)  # what it refuses is told now
    work: list[tuple[Path, Any, Any, int]] = []
    for run, checkpoints in zip(options.folders, found.values(), strict=True):
        micro = checkpoints[-1].state["micro_batch"] * chosen.gradient_batches
        images = len(checkpoints) * (chosen.count * len(chosen.times) + micro)
        work.append((run / FOLDER / BLOCKS, study_run, checkpoints, images))
    if len(found) > 1:
        last = {name: checkpoints[-1] for name, checkpoints in found.items()}
        images = chosen.count * len(chosen.times)
        work.append((options.folders[0] / FOLDER / BETWEEN, study_between, last, images))
    with tqdm(total=sum(images for *_, images in work), desc="analysing", unit="image", disable=None) as bar:
        for path, study, given, images in work:
            listed = list(given.values()) if isinstance(given, dict) else given
            with writing(path):
                arrays = known(path, chosen.protocol(listed, dataset))
            if arrays is None:
                arrays = study(given, dataset, chosen, bar.update)
                with writing(path):
                    save(path, arrays)
            else:
                bar.update(images)
            drawn = _figures(arrays) if study is study_run else _figures_between(arrays)
            with writing(path):
                for name, figure in drawn.items():
                    files.replace(path.parent / f"{name}.png", to_png(figure))
            bar.write(str(path))
    return 0


def _figures(arrays: Mapping[str, "np.ndarray"]) -> dict[str, "Figure"]:
    """By name. Over checkpoints at the smallest time (DiverseDiT's Figure 1), over times at the last checkpoint."""
    from dit_fast.analysis.figures import heat_maps, lines_figure, shares_figure

    steps, times = arrays["steps"], arrays["times"]
    shown, clean, order = _spread(len(steps)), int(times.argmin()), times.argsort()
    figures = {}
    for kernel in _kernels(arrays):
        cka = arrays[f"cka_{kernel}"]
        label = _label(kernel)
        figures[f"checkpoints-{kernel}"] = heat_maps({f"step {steps[i]:,}": cka[i, clean] for i in shown}, label)
        if len(times) > 1:
            figures[f"times-{kernel}"] = heat_maps({f"t = {times[j]:g}": cka[-1, j] for j in order}, label)
    ranks = {f"t = {times[clean]:g}": {f"step {steps[i]:,}": arrays["rank"][i, clean] for i in shown}}
    if len(times) > 1:
        ranks[f"step {steps[-1]:,}"] = {f"t = {times[j]:g}": arrays["rank"][-1, j] for j in order}
    figures["rank"] = lines_figure(ranks, "effective rank of tokens")
    if "gradient_norm" in arrays:
        panels = {}
        for i in shown:
            norms = arrays["gradient_norm"][i]
            counts = ~(norms != norms).any(axis=1)
            panels[f"step {steps[i]:,}"] = (arrays["gradient_terms"][counts].tolist(), norms[counts])
        if max(len(terms) for terms, _ in panels.values()) > 1:
            figures["gradients"] = shares_figure(panels)
        else:  # its share of itself says nothing
            of = {title: norms[0] for title, (_, norms) in panels.items()}
            figures["gradients"] = lines_figure({f"{arrays['gradient_terms'][0]}, the only term": of}, "gradient norm")
    return figures


def _figures_between(arrays: Mapping[str, "np.ndarray"]) -> dict[str, "Figure"]:
    from dit_fast.analysis.figures import heat_maps

    times, blocks, runs = arrays["times"], arrays["blocks"].tolist(), arrays["runs"].tolist()
    return {
        f"between-{kernel}": heat_maps(
            {f"t = {times[j]:g}": arrays[f"cka_{kernel}"][j] for j in times.argsort()}, _label(kernel), blocks, runs
        )
        for kernel in _kernels(arrays)
    }


def _kernels(arrays: Mapping[str, Any]) -> list[str]:
    return [name.removeprefix("cka_") for name in arrays if name.startswith("cka_")]


def _label(kernel: str) -> str:
    return {"linear": "linear CKA", "rbf": "RBF CKA"}[kernel]


def _spread(count: int) -> list[int]:
    """At most MAPS of `count` places, evenly, with the first and the last."""
    kept = min(count, MAPS)
    return sorted({round(i * (count - 1) / max(kept - 1, 1)) for i in range(kept)})


def _options(options: argparse.Namespace) -> Any:
    from dit_fast.analysis.study import Options

    return Options(
        times=_numbers("--times", options.times, float),
        kernels=tuple(options.kernels.split(",")),
        width=options.rbf_width,
        weights=options.weights,
        count=options.count,
        minibatch=min(256, options.count) if options.minibatch is None else options.minibatch,
        batch=options.batch,
        seed=options.seed,
        gradient_batches=options.gradient_batches,
    )


def _numbers(flag: str, text: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(item) for item in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag} {text}: expected numbers with commas between") from None


def _names(folders: Sequence[Path]) -> list[str]:
    """What tells these folders apart: their paths without what is common to all."""
    whole = [Path(os.path.abspath(folder)) for folder in folders]
    if len(set(whole)) < len(whole):
        raise UserError("a run is given twice; name each once")
    if len(whole) == 1:
        return [whole[0].name]
    common = Path(os.path.commonpath(whole))
    return [str(folder.relative_to(common)) for folder in whole]
