"""Reading a training run back: the model from its configuration, with averaged or raw weights. Needs no DeepSpeed."""

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dit_fast.autoencoders import Autoencoder
from dit_fast.autoencoders.from_diffusers import DiffusersAutoencoder
from dit_fast.checkpoint.manifest import MANIFEST, STATE
from dit_fast.checkpoint.step import FOLDER, Checkpoint, newest_checkpoint, open_checkpoint
from dit_fast.data import LatentDataset, open_dataset
from dit_fast.errors import CheckpointError, ConfigError, DataError
from dit_fast.methods.base import NORM, NORM_EPS, VAE
from dit_fast.models import Backbone, new_model
from dit_fast.objectives import OBJECTIVES, Objective
from dit_fast.runs import TrainConfig, stored


@dataclass(frozen=True)
class LoadedRun:
    """model: on the CPU, in eval mode. state: what the checkpoint says about itself (step, samples_seen, ...).
    Unpacked it is model, config, state.

    `load_run` adds "weights_sha256" to the state: `Checkpoint.digest` of what was read. autoencoder: that of a
    run that has trained one with its model, in the place of the data set's; its scale and shift too are the run's own.
    """

    model: Backbone
    config: TrainConfig
    state: dict[str, Any]
    autoencoder: Autoencoder | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.config, self.state))

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def objective(self) -> Objective:
        """What the model was trained with, bound to it."""
        return OBJECTIVES[self.config.objective.name](self.config.objective, self.model)

    def dataset(self, path: str | Path | None = None) -> LatentDataset:
        """The data set that the run was trained on: at `path`, or else where it lay while training.

        Without a path, `data.path` is tried as it was given, then as it was resolved by the run. Raises DataError where
        no data set with the run's fingerprint is found.
        """
        recorded = [self.config.data.path, *([self.state["dataset_root"]] if "dataset_root" in self.state else [])]
        errors: list[str] = []
        for place in dict.fromkeys(recorded) if path is None else [str(path)]:
            try:
                dataset = open_dataset(place)
            except DataError as error:
                errors.append(str(error))
                continue
            if dataset.info.fingerprint == self.state.get("dataset_fingerprint"):
                return dataset
            errors.append(
                f"{place}: another data set ({dataset.info.fingerprint[:12]}) than the one this run was trained on "
                f"({self.state['dataset_fingerprint'][:12]}); name the place of that one with --data"
            )
        raise DataError(errors[-1])


def load_run(path: str | Path, weights: Literal["ema", "model"] = "ema") -> LoadedRun:
    """The newest complete checkpoint of a run folder, or the given step folder.

    weights: the moving averages or the weights themselves, float32; only their files are read and verified. Modules
    that training methods added (projectors) are left out; `Checkpoint.state_dict` has their weights. Raises
    CheckpointError where nothing whole is found.
    """
    if weights not in ("ema", "model"):
        raise CheckpointError(f"unknown weights '{weights}'; valid: ema, model")
    checkpoint = find_checkpoint(path, (weights,))
    state = checkpoint.state
    try:
        config = stored(state.get("config"))
        model = new_model(config.model)
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint.path / STATE}: its configuration cannot be read: {error}") from None
    own, tensors = model.state_dict(), checkpoint.state_dict(weights)
    checkpoint.require(weights, own)
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name in own})
    state["weights_sha256"] = checkpoint.digest(weights)
    run = LoadedRun(model.eval(), config, state, own_autoencoder(state.get("autoencoder"), tensors))
    model.prediction, model.path = run.objective.prediction, run.objective.path.name
    return run


def own_autoencoder(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> Autoencoder | None:
    """The autoencoder among a run's tensors, None where it has none (`Method.autoencoder`).

    Its latents are scaled as the batch norm does it that stands before the model, by running statistics. Raises
    CheckpointError where something of it is missing.
    """
    if config is None:
        return None
    for name in (f"{NORM}.running_mean", f"{NORM}.running_var"):
        if name not in tensors:
            raise CheckpointError(f"the run has an autoencoder of its own, and its weights lack '{name}'; restore them")
    weights = {name.removeprefix(f"{VAE}."): x for name, x in tensors.items() if name.startswith(f"{VAE}.")}
    mean, var = (tensors[f"{NORM}.{name}"].double() for name in ("running_mean", "running_var"))
    return DiffusersAutoencoder.trained(config, weights, mean, (var + NORM_EPS).sqrt(), "the run's own")


def find_checkpoint(path: str | Path, kinds: Collection[str]) -> Checkpoint:
    """The checkpoint a run or step folder stands for; `kinds` of it verified against the manifest."""
    path = Path(path)
    if os.path.isfile(path):  # False for a name that cannot be
        raise CheckpointError(
            f"{path}: is a file, not the folder of a run; from one of published weights draw in Python, by "
            "load_official and sample (docs/sampling.md, Published checkpoints)"
        )
    try:
        if (path / MANIFEST).is_file():
            given = open_checkpoint(path)
            given.verify(kinds)
            return given
        checkpoint, complaints = newest_checkpoint(path, kinds)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    if checkpoint is None:
        if complaints:
            raise CheckpointError(f"{complaints[0]}, and no older checkpoint is whole; restore it")
        refuse_runs_inside(path)
        raise CheckpointError(f"{path / FOLDER}: holds no checkpoint; give the folder of a run that has saved one")
    return checkpoint


def refuse_runs_inside(path: Path) -> None:
    """Raises CheckpointError for a folder that is no run itself but holds some, as that of a run in stages, or that is
    inside one and holds its checkpoints."""
    if next(path.glob(f"*/{MANIFEST}"), None) is not None:
        raise CheckpointError(f"{path}: holds checkpoints, and is no run itself; give one of them, or the run's folder")
    inside = ", ".join(str(folder.parent) for folder in sorted(path.glob(f"*/{FOLDER}")))
    if inside and not (path / FOLDER).exists():
        raise CheckpointError(f"{path}: is no run itself; name one of those in it: {inside}")
