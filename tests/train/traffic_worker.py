"""Counts what one step of every engine sends, and what a save writes: python -m tests.train.traffic_worker OUT.json,
as ranks.

Each collective passes torch's dispatcher, whoever calls it (DDP's own C++ too). Counted are the bytes of the whole:
what is reduced on a rank, what is gathered on it.
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_fast.models import build_model
from dit_fast.objectives import OBJECTIVES
from dit_fast.train.checkpoints import Checkpoints
from dit_fast.train.ddp import DDPEngine
from dit_fast.train.group import start_world
from dit_fast.train.loss import TrainingLoss
from dit_fast.train.zero import ZeroEngine
from tests.train.engine_worker import BATCH, config_of, micro_batches

ENGINES = {"ddp": {"engine": "ddp"}, **{f"ZeRO-{stage}": {"stage": stage} for stage in range(4)}}


class Traffic(TorchDispatchMode):
    """Bytes by collective; what takes less than `small` is counted as "small"."""

    small = 4096

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            tensors = [tree_leaves(arg) for arg in args]
            size = max(sum(x.nbytes for x in each if isinstance(x, torch.Tensor)) for each in tensors)
            name = "small" if size < self.small else op._schema.name.removeprefix("c10d::").strip("_")
            self.bytes[name] = self.bytes.get(name, 0) + size
        return op(*args, **(kwargs or {}))


def step_of(engine, world, count):
    """A third step: the first compares the ranks, in the second DeepSpeed still learns its order."""
    micro = BATCH // world.size // count
    config = config_of({"micro": micro, **ENGINES[engine]})
    torch.manual_seed(0)
    sizes = {"input_size": 4, "in_channels": 12, "num_classes": 3, "hidden_size": 64, "depth": 2, "num_heads": 2}
    model = build_model("SiT-Nano/2", **sizes)
    objective = OBJECTIVES[config.objective.name](config.objective, model)
    loss = TrainingLoss(model, objective, (), seed=3, label_dropout=0.1, precision="fp32")
    made = DDPEngine(loss, config, world) if engine == "ddp" else ZeroEngine(loss, config, world, micro)
    for step in range(2):
        made.train_step(micro_batches(step, world, micro, ()), step, 1e-3)
    with Traffic() as traffic:
        made.train_step(micro_batches(2, world, micro, ()), 2, 1e-3)
    sizes = [shape.numel() for _, shape in made.trainable()]
    saver = Checkpoints(Path(sys.argv[1]).parent / f"{engine}-{count}", world)
    saver.save(made, {}, {"step": 1})
    assert saver.settle()
    made.close()
    return {"bytes": traffic.bytes, "sizes": sizes, "saved": written(saver.folder, world)}


def written(folder, world):
    """Bytes of tensors in the files of each rank."""
    found = [0] * world.size
    for path in folder.glob("*/*.safetensors"):
        with path.open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        found[int(path.stem.split("-")[1]) - 1] += path.stat().st_size - header
    return found


def main():
    torch.set_num_threads(1)
    world = start_world()
    found = {f"{name}, {count}": step_of(name, world, count) for name in ENGINES for count in (1, 2)}
    if world.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    world.close()


if __name__ == "__main__":
    main()
