"""Several runs by one command, each in a folder of its own, and models of other runs that a run reads, frozen."""

from collections.abc import Sequence
from pathlib import Path

import torch

from dit_fast.checkpoint.run import load_run, refuse_runs_inside
from dit_fast.checkpoint.step import FOLDER, newest_checkpoint, step_folders
from dit_fast.data import DatasetInfo
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.methods import METHODS, build_methods
from dit_fast.models import Backbone, new_model
from dit_fast.runs import TrainConfig


def stages(config: TrainConfig) -> list[TrainConfig]:
    """The runs that a configuration stands for, in order: itself, unless a method says otherwise.

    Raises UserError where one run would lie inside the folder of another: neither would then be found by its folder.
    """
    runs, folder = [config], Path(config.run.dir)
    for method in config.methods:
        runs = [stage for run in runs for stage in METHODS[method.name].stages(method, run)]
    if len(runs) == 1:
        refuse_runs_inside(folder)
    elif (folder / FOLDER).exists():
        raise ConfigError(f"run.dir={folder}: holds a run; stages of another may not lie in it, so set another run.dir")
    return runs


def check_ahead(config: TrainConfig, info: DatasetInfo, micro_batch: int) -> None:
    """Raises what a later stage would raise when it is built, before an earlier one has trained for days."""
    with torch.device("meta"):
        model = new_model(config.model)
        for method in build_methods(config.methods, model, info):
            method.check_batch(micro_batch)
            method.prepare(lambda path, weights: (model, ""))


def unfinished(runs: Sequence[TrainConfig]) -> int:
    """Where to go on: the last stage with a checkpoint, or the one after it if that has all its steps.

    What a started stage reads of an earlier one is as it was then, so the earlier is not gone into again.
    """
    last = len(runs) - 1
    started = max((index for index, stage in enumerate(runs) if step_folders(stage.run.dir)), default=0)
    if started == last:
        return last
    checkpoint, _ = newest_checkpoint(runs[started].run.dir)
    return started + (checkpoint is not None and checkpoint.step >= runs[started].run.steps)


def newest_folder(path: str) -> str:
    """The newest step folder of a run folder, whole or not; a step folder stays as it is."""
    found = step_folders(path)
    return str(found[0][1] if found else Path(path))


def load_frozen(path: str, weights: str, config: TrainConfig, info: DatasetInfo) -> tuple[Backbone, str]:
    """The model of a step folder on the CPU, in eval mode and without gradients, and the sha256 of its weights' file.

    Raises ConfigError where what it was trained on is not what this run would show it.
    """
    loaded = load_run(path, weights)  # type: ignore[arg-type]
    theirs, ours = loaded.config.objective, config.objective
    if (theirs.name, getattr(theirs, "path", "")) != (ours.name, getattr(ours, "path", "")):
        raise ConfigError(
            f"{path}: was trained with {_shown(theirs)}, this run with {_shown(ours)}, so the same times mean other "
            "noise to it; give a model of the same objective"
        )
    if loaded.state["dataset_fingerprint"] != info.fingerprint:
        raise CheckpointError(
            f"{path}: was trained on another data set ({loaded.state['dataset_fingerprint'][:12]}) than this run's "
            f"({info.fingerprint[:12]}), in which labels and values may differ; give a model of the same data"
        )
    return loaded.model.requires_grad_(False), loaded.state["weights_sha256"]


def _shown(objective: object) -> str:
    path = getattr(objective, "path", "")
    return f"objective={objective.name}" + (f" objective.path={path}" if path else "")  # type: ignore[attr-defined]
