"""Checks made before anything is built, and the configuration with every "as the data set says" filled in."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from dit_fast.checkpoint.step import Checkpoint
from dit_fast.data import DatasetInfo
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.models import Backbone
from dit_fast.objectives import Objective
from dit_fast.runs import EngineConfig, TrainConfig, checked, forbidden_changes, stored


def check_fields(config: TrainConfig) -> TrainConfig:
    """The configuration, checked. Raises ConfigError for what cannot run with any data, naming the key and the fix."""
    config = checked(config)
    if not config.run.dir:
        raise ConfigError("run.dir is not set; give the folder of this run, e.g. run.dir=runs/first")
    try:
        config.run.dir.encode()
    except UnicodeEncodeError:  # safetensors would write there and never read it back
        raise ConfigError(f"run.dir={config.run.dir}: the name is not UTF-8; rename the folder") from None
    if getattr(config.model, "residual_dtype", "") == "bf16" and config.engine.precision == "fp32":
        raise ConfigError(
            "model.residual_dtype=bf16 says what the stream is under engine.precision=bf16; set that too, or "
            "model.residual_dtype=fp32"
        )
    if not config.data.path:
        raise ConfigError("data.path is not set; give the folder that holds dataset.json (`dit-fast shards build`)")
    return config


def micro_batch(engine: EngineConfig, world_size: int) -> int:
    """Samples per rank and backward pass. Raises ConfigError with the numbers and the fix where they do not divide."""
    batch = engine.global_batch
    if batch % world_size:
        near = max(n for n in range(1, world_size) if batch % n == 0)
        raise ConfigError(
            f"engine.global_batch={batch} does not divide over {world_size} ranks; use a multiple of {world_size} "
            f"({batch - batch % world_size or world_size}) or {near} processes"
        )
    share = batch // world_size
    micro = engine.micro_batch or share
    if share % micro:
        fits = max(n for n in range(1, min(micro, share) + 1) if share % n == 0)
        raise ConfigError(
            f"engine.micro_batch={micro} does not divide the {share} samples of each rank (engine.global_batch={batch} "
            f"over {world_size} ranks); use engine.micro_batch={fits}"
        )
    return micro


def kind_of(engine: EngineConfig) -> str:
    """What shares the work of several ranks, in a word."""
    return "DDP" if engine.name == "ddp" else f"ZeRO-{engine.zero_stage}"


def check_stage(engine: EngineConfig, parts: Iterable[Any]) -> None:
    """Raises ConfigError where an objective, a method or what is recomputed cannot run in ZeRO stage 3."""
    if engine.name == "ddp" or engine.zero_stage < 3:
        return
    if engine.activation_checkpointing == "selective":
        raise ConfigError(
            "engine.activation_checkpointing=selective repeats a block operation by operation, and engine.zero_stage=3 "
            "gathers weights in between, not twice alike; set engine.activation_checkpointing=full, or "
            "engine.zero_stage=2"
        )
    for part in parts:
        if part.functional:
            raise ConfigError(
                f"engine.zero_stage=3 cannot run '{part.name}', which differentiates within a forward (jvp, a second "
                "derivative) or calls the model with other parameters, and stage 3 holds none outside of a plain "
                "forward; use engine.zero_stage=2"
            )


def fit_to_dataset(config: TrainConfig, info: DatasetInfo) -> TrainConfig:
    """Fills model sizes left at 0. Raises ConfigError where a size that is set contradicts the data set."""
    model, path = config.model, config.data.path
    for key, found in (("input_size", info.size), ("input_width", info.size), ("in_channels", info.channels)):
        value = getattr(model, key)
        if value not in (0, found):
            raise ConfigError(f"model.{key}={value}, but the latents of {path} have {found}; use model.{key}={found}")
    if 0 < model.num_classes < info.num_classes:
        raise ConfigError(
            f"model.num_classes={model.num_classes}, but labels of {path} go up to {info.num_classes - 1}; use "
            f"model.num_classes={info.num_classes}"
        )
    filled = dataclasses.replace(
        model,
        input_size=info.size,
        in_channels=info.channels,
        num_classes=model.num_classes or info.num_classes,
    )
    return dataclasses.replace(config, model=filled)


def narrow_model(model: Backbone, objective: Objective, info: DatasetInfo) -> str | None:
    """What to warn of where a token of latents without a std has more numbers than the model is wide.

    The noise in the target of a velocity has all of them (RAE, arXiv 2510.11690, Theorem 1); clean data need not.
    """
    numbers = math.prod(model.shapes["image"]) // model.num_tokens
    if info.std or objective.prediction == "x" or model.hidden_size >= numbers:
        return None
    return (
        f"the model is {model.hidden_size} wide and each of its tokens holds {numbers} numbers: a "
        f"{objective.prediction} of them cannot be fitted (arXiv 2510.11690); use a model at least as wide, or "
        "objective.prediction=x"
    )


def check_resume(
    checkpoint: Checkpoint,
    config: TrainConfig,
    info: DatasetInfo,
    fields: Iterable[str],
    digests: Mapping[str, str],
) -> None:
    """Raises ConfigError with every difference that would change the training, CheckpointError for other data.

    fields: what the run reads beside latents and labels. digests: of the frozen files it reads, by method and name.
    """
    state = checkpoint.state
    lines = forbidden_changes(stored(state["config"]), config)
    if lines:
        raise ConfigError(
            f"{config.run.dir}: the configuration differs from the one this run was started with ({'; '.join(lines)}); "
            "restore it or set another run.dir"
        )
    if state["dataset_fingerprint"] != info.fingerprint:
        raise CheckpointError(
            f"data.path={config.data.path}: another data set (fingerprint {info.fingerprint[:12]}) than the one "
            f"{checkpoint.path} was trained on ({state['dataset_fingerprint'][:12]}); restore it or set another run.dir"
        )
    before, now = state.get("field_fingerprints", {}), info.field_fingerprints(fields)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise CheckpointError(
                f"data.path={config.data.path}: its field '{name}' is another one than {checkpoint.path} was trained "
                "with; restore it or set another run.dir"
            )
    frozen = state.get("digests", {})
    for name in sorted(frozen.keys() | digests.keys()):
        if frozen.get(name) != digests.get(name):
            if name not in digests or name not in frozen:
                raise CheckpointError(
                    f"methods.{name}: {checkpoint.path} was trained with{'out' * (name in digests)} it; "
                    "restore the configuration or set another run.dir"
                )
            had, has = (each[name][:12] for each in (frozen, digests))
            raise CheckpointError(
                f"methods.{name}: its weights have the sha256 {has}, those that {checkpoint.path} was trained with "
                f"{had}; give the file or step folder that holds those (it may lie anywhere) or set another run.dir"
            )


def check_fits(checkpoint: Checkpoint, expected: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raises CheckpointError where names, shapes or dtypes of a checkpoint are not the expected ones of each kind."""
    for kind, tensors in expected.items():
        checkpoint.require(kind, tensors)
        for name in checkpoint.names(kind):
            if name not in tensors:
                raise CheckpointError(
                    f"{checkpoint.path}: holds {kind} of '{name}', unknown to this model; was it made by another?"
                )
