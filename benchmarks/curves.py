"""Reference curves: every recipe of quick-start size, three runs of 200 steps in which all three seeds change.

`benchmarks/results/cpu/curves/RECIPE.json` holds what the runs logged, raw; `dit-fast report` judges a run by it
(`dit_fast.report.reference`). One process on the CPU; the values depend neither on its load nor on its clock.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dit_fast.benchmarks.results import environment, occasion, rounded, write
from dit_fast.data import open_dataset
from dit_fast.errors import UserError
from dit_fast.methods import METHODS
from dit_fast.options import to_dict
from dit_fast.recipes import RECIPES, load
from dit_fast.report.metrics import Metrics, read_metrics
from dit_fast.report.reference import EVERY, STEPS, data_identity, differences, quantities, read_reference
from dit_fast.runs import TrainConfig, changed
from dit_fast.train.loop import train
from dit_fast.train.prepare import check_fields, fit_to_dataset
from dit_fast.train.stages import stages
from dit_fast.world import World

SEEDS = (0, 1, 2)  # run.seed; the two others follow it
ELSEWHERE = ("haste", "rae", "repa_e")  # need an encoder's weights, its latents, or an autoencoder to train
NAMES = [name for name in RECIPES if name.partition("-")[0] == "quickstart" and not name.endswith(ELSEWHERE)]
SHORT = (  # none of it changes a value
    f"run.steps={STEPS}",
    f"run.log_every={EVERY}",
    "run.checkpoint_every=0",
    "run.tensorboard=false",
    "preview.every=0",
)
REMARK = "seconds: of each run on a machine that others used too; no measurement of speed"


def record_curves(
    data: str,
    folder: Path,
    only: Sequence[str] = (),
    commit: str | None = None,
    say: Callable[[str], None] = partial(print, flush=True),  # noqa: B008
) -> list[Path]:
    """Records the recipes named `only` (default: all of quick-start size) on the shards at `data`; the files written.

    One whose file is there, of the same configuration and data, is left out. Raises UserError for an unknown name, and
    for what the trainer refuses.
    """
    for name in only:
        if name not in NAMES:
            raise UserError(f"'{name}' is no recipe of quick-start size; those are: {', '.join(NAMES)}")
    info, todo = open_dataset(data).info, dict[str, TrainConfig]()
    for name in only or NAMES:
        config = check_fields(load(name, [f"data.path={data}", *SHORT]))
        reasons = []
        for path, stage in _curves(name, config, folder):
            found = differences(read_reference(path), fit_to_dataset(stage, info), info) if path.exists() else ["new"]
            reasons += found
        if reasons:
            say(f"{name}: to be recorded ({reasons[0]})")
            todo[name] = config
        else:
            say(f"{name}: is there, of the same configuration and data")
    where = environment(torch.device("cpu"), commit)  # of the code that runs, whatever is committed meanwhile
    started, done, total, written = time.perf_counter(), 0, len(todo) * len(SEEDS), list[Path]()
    for name, config in todo.items():
        runs = []
        for seed in SEEDS:
            minutes = (time.perf_counter() - started) / done * (total - done) / 60 if done else 0
            say(f"{name}: run {done + 1} of {total}{f', about {minutes:.0f} minutes left' if done else ''}")
            runs.append(_run(config, seed))
            done += 1
        for (path, stage), entries in zip(_curves(name, config, folder), zip(*runs, strict=True), strict=True):
            fields = dict.fromkeys(field for method in stage.methods for field in METHODS[method.name].fields)
            content: dict[str, Any] = {"recipe": path.stem, **where, **occasion(), "remark": REMARK}
            content |= {"data": data_identity(info, list(fields)), "config": to_dict(fit_to_dataset(stage, info))}
            write(path, {**content, "steps": list(range(EVERY, STEPS + 1, EVERY)), "runs": list(entries)})
            written.append(path)
    return written


def _curves(name: str, config: TrainConfig, folder: Path) -> list[tuple[Path, TrainConfig]]:
    """The file of each run that a recipe stands for, with its configuration; stages have their name after its own."""
    runs = stages(config)
    names = [f"{name}-{Path(run.run.dir).name}" for run in runs] if len(runs) > 1 else [name]
    return [(folder / f"{each}.json", run) for each, run in zip(names, runs, strict=True)]


def _run(config: TrainConfig, seed: int) -> list[dict[str, Any]]:
    """One run, each of its stages as it stands in the file; their folder goes afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        start, config = time.perf_counter(), changed(config, [f"run.dir={folder}/run", f"run.seed={seed}"])
        train(config, World(0, 1, torch.device("cpu")))
        seconds = round(time.perf_counter() - start, 1)
        return [
            {"seed": seed, "seconds": seconds, "values": _values(read_metrics(run.run.dir))} for run in stages(config)
        ]


def _values(metrics: Metrics) -> dict[str, list[float]]:
    """What is kept of a log: its first STEPS. Raises UserError where a step was skipped."""
    first = Metrics(tuple(row for row in metrics.rows if row["step"] <= STEPS))
    values = {name: first.column(name)[1].tolist() for name in quantities(first)}
    broken = [name for name, column in values.items() if len(column) != STEPS // EVERY]
    if broken or any(row["skipped"] for row in first.rows):
        raise UserError(f"steps were skipped, or {broken} are not in every row; no curve comes of such a run")
    return rounded(values)
