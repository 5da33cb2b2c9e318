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
from dit_fast.report.metrics import read_metrics
from dit_fast.report.reference import EVERY, STEPS, data_identity, differences, quantities, read_reference
from dit_fast.runs import TrainConfig, changed
from dit_fast.train.loop import train
from dit_fast.train.prepare import check_fields, fit_to_dataset
from dit_fast.train.stages import stages
from dit_fast.world import World

SEEDS = (0, 1, 2)  # run.seed; the two others follow it
NAMES = [name for name in RECIPES if name.partition("-")[0] == "quickstart"]
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
        config = fit_to_dataset(check_fields(load(name, [f"data.path={data}", *SHORT])), info)
        path = folder / f"{name}.json"
        if path.exists() and not (found := differences(read_reference(path), config, info)):
            say(f"{name}: {path} is there, of the same configuration and data")
        else:
            say(f"{name}: to be recorded{f' anew ({found[0]})' if path.exists() else ''}")
            todo[name] = config
    started, done, total = time.perf_counter(), 0, len(todo) * len(SEEDS)
    for name, config in todo.items():
        where, runs = environment(torch.device("cpu"), commit), []
        for seed in SEEDS:
            minutes = (time.perf_counter() - started) / done * (total - done) / 60 if done else 0
            say(f"{name}: run {done + 1} of {total}{f', about {minutes:.0f} minutes left' if done else ''}")
            runs.append(_run(config, seed))
            done += 1
        fields = dict.fromkeys(field for method in config.methods for field in METHODS[method.name].fields)
        content = {"recipe": name, **where, **occasion(), "remark": REMARK, "data": data_identity(info, list(fields))}
        steps = list(range(EVERY, STEPS + 1, EVERY))
        write(folder / f"{name}.json", {**content, "config": to_dict(config), "steps": steps, "runs": runs})
    return [folder / f"{name}.json" for name in todo]


def _run(config: TrainConfig, seed: int) -> dict[str, Any]:
    """One run, its last stage where it has several, in a folder that goes afterwards, as it stands in the file."""
    with tempfile.TemporaryDirectory() as folder:
        start, config = time.perf_counter(), changed(config, [f"run.dir={folder}/run", f"run.seed={seed}"])
        train(config, World(0, 1, torch.device("cpu")))
        metrics, seconds = read_metrics(stages(config)[-1].run.dir), time.perf_counter() - start
    values = {name: metrics.column(name)[1].tolist() for name in quantities(metrics)}
    broken = [name for name, column in values.items() if len(column) != STEPS // EVERY]
    if broken or any(row["skipped"] for row in metrics.rows):
        raise UserError(
            f"run.seed={seed}: steps were skipped, or {broken} are not in every row; no curve is made of it"
        )
    return {"seed": seed, "seconds": round(seconds, 1), "values": rounded(values)}
