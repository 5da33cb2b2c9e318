"""The table and the figure of docs/study.md, from the runs of a sweep that were analysed and evaluated.

    python -m dit_fast.benchmarks.study FOLDER [--record]

FOLDER: of `dit-fast sweep`, as `make study` leaves it. Writes study.json (the numbers of each run), table.md and
similarity.png into it. --record: also benchmarks/results/cpu/study.json, the table of docs/study.md, and its figure.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_fast import files, terminal
from dit_fast.analysis.figures import heat_maps, off_diagonal, to_png
from dit_fast.analysis.study import BLOCKS, read
from dit_fast.analysis.study import FOLDER as ANALYSIS
from dit_fast.benchmarks.gate import ROOT
from dit_fast.benchmarks.results import RESULTS, environment, occasion, rounded, write, write_table
from dit_fast.errors import UserError
from dit_fast.evaluation.records import read_evaluations
from dit_fast.report.metrics import read_metrics
from dit_fast.sweep.jobs import read_record

PAGE, FIGURE = ROOT / "docs" / "study.md", ROOT / "docs" / "study_similarity.png"
DISTANCE = "FD-EffLite0"
TAIL = 0.1  # of the run, over which its loss is averaged
COLUMNS = {  # quantity of a run -> heading, digits
    DISTANCE: (DISTANCE, 2),
    "cka_rbf": ("CKA (RBF)", 3),
    "cka_linear": ("CKA (linear)", 3),
    "cosine": ("token cosine", 3),
    "rank": ("rank, last block", 1),
    "share": ("methods' share of gradient", 3),
    "flow": ("flow loss", 4),
}


def main(arguments: list[str] | None = None) -> int:
    return terminal.run(_work, arguments)


def _work(arguments: list[str]) -> int:
    parser = terminal.Parser(prog="python -m dit_fast.benchmarks.study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of a sweep whose runs were analysed and evaluated")
    parser.add_argument("--record", action="store_true", help="also write the recorded result and docs/study.md")
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    entries = read_record(folder)
    if not entries:
        raise UserError(f"{folder}: holds no sweep; give the folder that `dit-fast sweep --out` was given")
    for entry in entries:
        if entry["state"] != "done":
            raise UserError(f"{folder}: {entry['folder']} is {entry['state']}; start the same sweep again")
    runs = [{**_about(entry), **_numbers(folder / entry["folder"])} for entry in entries]
    text, figure = table(runs), to_png(_figure(folder, entries))
    result = {"schema": 1, "run": "study", **environment(torch.device("cpu")), **occasion(), "runs": runs}
    write(folder / "study.json", rounded(result))
    files.replace(folder / "table.md", f"{text}\n".encode())
    files.replace(folder / "similarity.png", figure)
    if options.record:
        write(RESULTS / "cpu" / "study.json", rounded(result))
        write_table(PAGE, "study", text)
        files.replace(FIGURE, figure)
    print(text)
    return 0


def _about(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Without folders: where a run lay says nothing of it."""
    words = [word for word in entry["arguments"] if word.partition("=")[0] not in ("run.dir", "data.path")]
    return {"name": entry["name"], "seed": entry["seed"], "arguments": words, "seconds": entry["seconds"]}


def _numbers(run: Path) -> dict[str, Any]:
    """Of one run at its last checkpoint and the smallest time that was analysed; `by_step`: at all checkpoints."""
    path = run / ANALYSIS / BLOCKS
    if not path.is_file():
        raise UserError(f"{path}: is missing; run `dit-fast analyse {run}`")
    arrays = read(path)
    t, step = int(arrays["times"].argmin()), int(arrays["steps"][-1])
    found = [each for each in read_evaluations(run) if each.step == step and DISTANCE in each.values]
    if not found:
        raise UserError(f"{run}: has no {DISTANCE} of step {step}; run `dit-fast evaluate {run}`")
    flow = read_metrics(run).column("flow")[1]
    means = {
        f"cka_{kernel}": [off_diagonal(matrix) for matrix in arrays[f"cka_{kernel}"][:, t]]
        for kernel in ("linear", "rbf")
    }
    means["cosine"] = [off_diagonal(matrix) for matrix in arrays["cosine"][:, t]]
    means["rank"] = arrays["rank"][:, t, -1].tolist()
    means["share"] = [_share(norms) for norms in arrays["gradient_norm"]]
    return {
        DISTANCE: found[-1].values[DISTANCE],
        **{name: values[-1] for name, values in means.items()},
        "flow": float(np.mean(flow[-max(int(len(flow) * TAIL), 1) :])),
        **{name: float(arrays[name][-1, t]) for name in ("orthogonality", "mutual_information", "dispersion")},
        "t": float(arrays["times"][t]),
        "by_step": {"step": arrays["steps"].tolist(), **means},
        "protocol": found[-1].protocol.text(),
        "analysis": str(arrays["protocol"]),
    }


def _share(norms: np.ndarray) -> float:
    """Of all terms but the objective's in the sum of norms [terms, K], mean over blocks."""
    norms = np.nan_to_num(norms)  # a term that did not count
    return float((norms[1:].sum(0) / norms.sum(0)).mean())


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard deviation over the seeds of each configuration, in Markdown, and how they were measured."""
    names = list(dict.fromkeys(run["name"] for run in runs))
    lines = ["| | seeds | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |"]
    lines.append("|---" * (2 + len(COLUMNS)) + "|")
    for name in names:
        own = [run for run in runs if run["name"] == name]
        cells = [_cell([run[column] for run in own], digits) for column, (_, digits) in COLUMNS.items()]
        lines.append(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")
    steps = sorted({run["by_step"]["step"][-1] for run in runs})
    protocols = list(dict.fromkeys(run["protocol"] for run in runs))
    lines += ["", f"After {_listed(steps)} steps; blocks at t = {_listed(sorted({run['t'] for run in runs}))}."]
    lines += [f"{DISTANCE}: {_listed(protocols)}."]
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _listed(values: Sequence[Any]) -> str:
    return " / ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _figure(folder: Path, entries: Sequence[Mapping[str, Any]]) -> Any:
    """The last checkpoint of the first seed of each configuration."""
    first: dict[str, np.ndarray] = {}
    for entry in entries:
        if entry["name"] not in first:
            arrays = read(folder / entry["folder"] / ANALYSIS / BLOCKS)
            first[entry["name"]] = arrays["cka_rbf"][-1, int(arrays["times"].argmin())]
    return heat_maps(first, "RBF CKA")


if __name__ == "__main__":
    sys.exit(main())
