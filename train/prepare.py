"""Checks made before anything is built, and the configuration with every "as the data set says" filled in."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dit_fast.checkpoint.step import Checkpoint
from dit_fast.config import EngineConfig, ModelConfig, TrainConfig, diff, to_dict
from dit_fast.data import DatasetInfo
from dit_fast.errors import CheckpointError, ConfigError

# What may change when a run is resumed: where and how it runs, never what it computes. Micro-batch and ranks are among
# them because elastic restarts need it, although statistics over a rank's micro-batch change with them.
CHANGEABLE = (
    "run.dir",
    "run.steps",
    "run.log_every",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.keep_every",
    "run.tensorboard",
    "preview.",
    "data.path",
    "data.reader",
    "data.num_workers",
    "data.check_crc",
    "engine.zero_stage",
    "engine.micro_batch",
    "engine.overlap_comm",
    "engine.reduce_bucket_size",
    "engine.allgather_bucket_size",
    "engine.compile",
    "model.attention",
    "model.checkpoint_blocks",
    "optimizer.name",
)


def check_fields(config: TrainConfig) -> None:
    """Raises ConfigError for values that cannot run whatever the data, naming the key and the fix."""
    if not config.run.dir:
        raise ConfigError("run.dir is not set; give the folder of this run, e.g. run.dir=runs/first")
    if not config.data.path:
        raise ConfigError("data.path is not set; give the folder that holds dataset.json (`dit-fast shards build`)")
    least = {"run.steps": 1, "run.log_every": 1, "run.checkpoint_every": 0, "run.keep_checkpoints": 0}
    least |= {"run.keep_every": 0, "run.seed": 0, "preview.every": 0, "preview.count": 1, "preview.num_steps": 1}
    least |= {"engine.global_batch": 1, "engine.micro_batch": 0, "optimizer.warmup_steps": 0, "data.num_workers": 0}
    least |= {"data.shuffle_group": 0, "optimizer.grad_clip": 0, "optimizer.lr": 0, "optimizer.weight_decay": 0}
    for key, bound in least.items():
        group, name = key.split(".")
        value = getattr(getattr(config, group), name)
        if not value >= bound:
            raise ConfigError(f"{key}={value} must be at least {bound}")
    if not 0 <= config.optimizer.ema_decay < 1:
        raise ConfigError(f"optimizer.ema_decay={config.optimizer.ema_decay} must lie in [0, 1)")


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


def fit_to_dataset(config: TrainConfig, info: DatasetInfo) -> TrainConfig:
    """Fills model sizes left at 0. Raises ConfigError where a size that is set contradicts the data set."""
    model, path = config.model, config.data.path
    for key, found in (("input_size", info.size), ("in_channels", info.channels)):
        value = getattr(model, key)
        if value not in (0, found):
            raise ConfigError(f"model.{key}={value}, but the latents of {path} have {found}; use model.{key}={found}")
    if 0 < model.num_classes < info.num_classes:
        raise ConfigError(
            f"model.num_classes={model.num_classes}, but labels of {path} go up to {info.num_classes - 1}; use "
            f"model.num_classes={info.num_classes}"
        )
    filled: ModelConfig = dataclasses.replace(
        model,
        input_size=info.size,
        in_channels=info.channels,
        num_classes=model.num_classes or info.num_classes,
    )
    return dataclasses.replace(config, model=filled)


def check_resume(checkpoint: Checkpoint, config: TrainConfig, info: DatasetInfo) -> None:
    """Raises ConfigError with every difference that would change the training, CheckpointError for other data."""
    state = checkpoint.state
    lines = forbidden_changes(state["config"], to_dict(config))
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


def forbidden_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences ("key: old -> new") between two configurations that a resumed run may not have."""
    return [line for line in diff(old, new) if not line.startswith(CHANGEABLE)]
