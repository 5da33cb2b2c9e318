"""Whole training steps on the fake GPU: what they launch, without a GPU.

    PYTHONPATH=.cache/triton-3.6.0 python -m tests.ops.fake_step diversedit-xl2-256 engine.global_batch=32

A recipe and `key=value` overrides; SingleEngine, so one process and no DeepSpeed.
"""

from tests.ops.fake_device import GPU, Trace, trace

# isort: split
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_fast.data.description import DatasetInfo
from dit_fast.data.field import Field
from dit_fast.methods import build_methods
from dit_fast.models import new_model
from dit_fast.objectives import OBJECTIVES
from dit_fast.recipes import load
from dit_fast.runs import TrainConfig
from dit_fast.train.engine import SingleEngine
from dit_fast.train.loss import TrainingLoss
from dit_fast.train.stages import stages
from dit_fast.world import World

WIDTH = 768  # of features and class tokens: DINOv2-B's
SIDE = 256  # of images, in pixels


def data_set(config: TrainConfig, tokens: int) -> DatasetInfo:
    """One that a recipe fits, with the fields of every method that reads ready-made features."""
    return DatasetInfo(
        num_samples=1 << 20,
        num_classes=config.model.num_classes,
        class_names=(),
        channels=config.model.in_channels,
        size=config.model.input_size,
        scale=0.18215,
        shift=0.0,
        fields={
            "features": Field("features.npy", (tokens, WIDTH), "float16"),
            "class_token": Field("class_token.npy", (WIDTH,), "float16"),
            "image": Field("image.npy", (3, SIDE, SIDE), "uint8"),
        },
        dtype="float32",
        autoencoder="",
        autoencoder_identity="",
        autoencoder_config={},
        source="",
        statistics=None,
        shards=(),
        fingerprint="",
    )


class Step:
    """A model, its loss and its engine on the fake GPU, as a run of this configuration has them; made in `trace()`."""

    def __init__(self, config: TrainConfig):
        self.config = config
        with GPU:
            model = new_model(config.model)
            info = data_set(config, model.num_tokens)
            methods = build_methods(config.methods, model, info)
            for method in methods:
                method.prepare(lambda *_: (new_model(config.model).requires_grad_(False).eval(), ""))
            loss = TrainingLoss(
                model,
                OBJECTIVES[config.objective.name](config.objective, model),
                methods,
                seed=config.noise_seed,
                scale=info.scale,
                shift=info.shift,
                label_dropout=config.model.label_dropout,
                precision=config.engine.precision,
            )
        for module in (loss, *(teacher for method in methods for teacher in method.teachers)):
            _move_buffers(module)
        loss.to = lambda device: loss  # it is there, and torch cannot move fake parameters that are in use
        groups = [group for method in methods for group in method.param_groups()]
        self.engine = SingleEngine(loss, config, World(0, 1, GPU), groups)
        self.engine._checked = True  # what the first step of a run asks about its graph reads elements
        self.fields = {name: info.fields[name].shape for method in methods for name in method.fields}
        self.shape = (2, info.channels, info.size, info.size)

    def batch(self) -> dict[str, Tensor]:
        size = self.config.engine.global_batch
        with GPU:
            return {
                "moments": torch.empty(size, *self.shape),
                "label": torch.empty(size, dtype=torch.int64),
                "position": torch.empty(size, dtype=torch.int64),
                **{name: torch.empty(size, *shape) for name, shape in self.fields.items()},
            }

    def __call__(self) -> Any:
        return self.engine.train_step([self.batch()], 1, 1e-4)


def _move_buffers(module: nn.Module) -> None:
    """Those that are made on the CPU whatever the default device is, as `loss.to` does it in a run."""
    for each in module.modules():
        for name, buffer in each.named_buffers(recurse=False):
            each._buffers[name] = buffer.to(GPU)


def traced(recipe: str, overrides: Sequence[str] = ()) -> Trace:
    """One step of each stage of a recipe, after a first one that is not counted (caches, states of the optimizer)."""
    steps = [_traced(config) for config in stages(load(recipe, overrides))]
    return sum(steps[1:], start=steps[0])


def _traced(config: TrainConfig) -> Trace:
    with trace():
        step = Step(config)
        step()
        with trace() as found:
            step()
    return found


def main() -> None:
    recipe, *overrides = sys.argv[1:]
    found = traced(recipe, overrides)
    ours, aten = found.kernels, found.aten
    print(f"{found.total} launches: {sum(ours.values())} of our kernels, {sum(aten.values())} operations of torch")
    for counts in (ours, aten):
        for name, count in counts.most_common(30):
            print(f"{count:6d} {name}")
    for place in dict.fromkeys(found.reads):
        print(f"the host reads an element at {place}")
    print("\n".join(found.mismatches) or f"{sum(found.calls.values())} calls of ops are as their fakes promise")


if __name__ == "__main__":
    main()
