"""Reading a training run back: the model from its configuration, with averaged or raw weights. Needs no DeepSpeed."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from dit_fast.checkpoint.step import FOLDER, MANIFEST, Checkpoint, newest_checkpoint, open_checkpoint
from dit_fast.config import ModelConfig, TrainConfig
from dit_fast.errors import CheckpointError
from dit_fast.models import SiT, build_model
from dit_fast.options import from_dict
from dit_fast.recipes import METHOD_CONFIGS


class LoadedRun(NamedTuple):
    """model: on the CPU, in eval mode. state: what the checkpoint says about itself (step, samples_seen, ...)."""

    model: SiT
    config: TrainConfig
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]


def load_run(path: str | Path, weights: Literal["ema", "model"] = "ema") -> LoadedRun:
    """The newest complete checkpoint of a run folder, or the given step folder.

    weights: the moving averages or the weights themselves, float32. Modules that training methods added (projectors)
    are left out; `Checkpoint.state_dict` has their weights. Raises CheckpointError where nothing whole is found.
    """
    if weights not in ("ema", "model"):
        raise CheckpointError(f"unknown weights '{weights}'; valid: ema, model")
    checkpoint = find_checkpoint(path)
    state = checkpoint.state
    config = from_dict(TrainConfig, state["config"], METHOD_CONFIGS)
    model = model_from_config(config.model)
    own = model.state_dict()
    loaded = {name: tensor for name, tensor in checkpoint.state_dict(weights).items() if name in own}
    try:
        model.load_state_dict(loaded)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise CheckpointError(f"{checkpoint.path}: does not fit model '{config.model.name}': {reason}") from None
    return LoadedRun(model.eval(), config, state)


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint a run or step folder stands for, its content verified against the manifest."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        given = open_checkpoint(path)
        given.verify()
        return given
    checkpoint, complaints = newest_checkpoint(path)
    if checkpoint is None:
        reason = complaints[0] if complaints else f"{path / FOLDER}: holds no checkpoint"
        raise CheckpointError(f"{reason}; give the folder of a run that has saved at least once")
    return checkpoint


def model_from_config(config: ModelConfig) -> SiT:
    """The bare model of a resolved configuration (no field left at "as the data set says"), newly initialised."""
    return build_model(
        config.name,
        input_size=config.input_size,
        in_channels=config.in_channels,
        num_classes=config.num_classes,
        label_dropout=config.label_dropout,
        skip_wiring=config.skip_wiring,
        qk_norm=config.qk_norm,
        attention=config.attention,
        residual_dtype=config.residual_dtype,
        checkpoint_blocks=config.checkpoint_blocks,
    )
