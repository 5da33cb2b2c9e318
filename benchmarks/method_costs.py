"""What each method costs at published size, counted and not timed: python -m dit_fast.benchmarks.method_costs.

A whole micro-batch of a recipe (draws, forward, backward, all terms) runs on tensors without values, through the plain
torch reference of every op. Counted are the FLOPs of matrix products, convolutions and attention (multiply-add = 2;
torch's FlopCounterMode), the bytes that autograd keeps for the backward pass (each storage once, parameters not),
the trained parameters, and the float32 bytes of frozen and moving copies beside them. Fused ops keep less. An operation
that needs a value on the host would fail here: none of the losses has one.
"""

import dataclasses
import sys
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit_fast.backend import force
from dit_fast.benchmarks.gate import ROOT
from dit_fast.benchmarks.results import RESULTS, environment, write, write_table
from dit_fast.methods import build_methods
from dit_fast.models import Backbone, new_model
from dit_fast.objectives import OBJECTIVES
from dit_fast.recipes import RECIPES
from dit_fast.runs import TrainConfig
from dit_fast.train.loss import TrainingLoss
from dit_fast.train.memory import assumed, one_mode

MODE = one_mode()
BATCH, TOKENS, WIDTH = 4, 256, 768
PAGE = ROOT / "docs" / "methods.md"
SIZES = {"b2": ("b2", "b1", "b16"), "xl2": ("xl2", "xl1")}  # names of one size, with 256 tokens at 256 pixels
WEIGHTS = ("haste", "repa_e")  # need those of an encoder or autoencoder
BASE = "sit"  # what the others are compared with
FIELDS = {"features": (TOKENS, WIDTH), "class_token": (WIDTH,)}  # DINOv2-B at 256 pixels


class Kept:
    """Bytes of the storages that autograd keeps within, parameters and buffers excepted."""

    def __init__(self, module: torch.nn.Module):
        self._known = {self._key(x) for x in (*module.parameters(), *module.buffers())}
        self._sizes: dict[Any, int] = {}

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def __enter__(self) -> "Kept":
        def keep(tensor: Tensor) -> Tensor:
            if (key := self._key(tensor)) not in self._known:
                self._sizes[key] = tensor.untyped_storage().nbytes()
                self._alive.append(tensor)
            return tensor

        self._alive: list[Tensor] = []  # a storage that was freed would lend its address to another
        self._hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())


def batch_of(config: TrainConfig) -> dict[str, Tensor]:
    size, channels = config.model.input_size, config.model.in_channels
    batch = {
        "moments": torch.empty(BATCH, 2, channels, size, size),
        "label": torch.empty(BATCH, dtype=torch.int64),
        "position": torch.empty(BATCH, dtype=torch.int64),
    }
    return batch | {name: torch.empty(BATCH, *shape) for name, shape in FIELDS.items()}


def count(config: TrainConfig) -> dict[str, int]:
    """FLOPs and bytes of one sample, bytes of one copy of the state, for a configuration at 256 pixels."""
    loaded: list[Backbone] = []

    def load(path: str, weights: str) -> tuple[Backbone, str]:
        loaded.append(new_model(config.model).eval().requires_grad_(False))
        return loaded[-1], ""

    with MODE, force("torch"):
        model = new_model(config.model)
        objective = OBJECTIVES[config.objective.name](config.objective, model)
        methods = build_methods(config.methods, model, assumed(config, TOKENS))
        for method in methods:
            method.prepare(load)
        loss = TrainingLoss(model, objective, methods, seed=0, label_dropout=config.model.label_dropout)
        with FlopCounterMode(display=False) as flops, Kept(loss) as kept:
            total, _ = loss(batch_of(config), 0)
            forward = flops.get_total_flops()
            total.backward()
    copies = [tensor for method in methods for tensor in method.tensors().values()]
    copies += [tensor for teacher in loaded for tensor in teacher.parameters()]
    return {
        "forward_flops": forward // BATCH,
        "flops": flops.get_total_flops() // BATCH,
        "kept_bytes": kept.bytes // BATCH,
        "parameters": sum(x.numel() for x in model.parameters() if x.requires_grad),
        "copies_bytes": sum(4 * tensor.numel() for tensor in copies),
    }


def main() -> None:
    where = environment(torch.device("cpu"))
    rows = []
    for size, same in SIZES.items():
        ends = tuple(f"-{each}-256" for each in same)
        names = [name for name in RECIPES if name.endswith(ends) and not any(part in name for part in WEIGHTS)]
        for name in sorted(names, key=lambda name: name != f"{BASE}-{size}-256"):
            config = RECIPES[name]()
            precision = dataclasses.replace(config.engine, precision="fp32")
            rows.append({"recipe": name, "size": size, **count(dataclasses.replace(config, engine=precision))})
            print(rows[-1], file=sys.stderr)
    result = {
        "schema": 1,
        "run": "method_costs",
        **where,
        "command": "python -m dit_fast.benchmarks.method_costs",
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "counted_on": "fake tensors, float32, reference ops; nothing is timed",
        "batch": BATCH,
        "rows": rows,
    }
    write(RESULTS / "cpu" / "method_costs.json", result)
    write_table(PAGE, "costs", table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Costs against plain SiT of the same size, in Markdown."""
    lines = ["| recipe | GFLOPs a sample | against SiT | kept MiB a sample | against SiT | trained M | copies MiB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        base = next(other for other in rows if other["recipe"] == f"{BASE}-{row['size']}-256")
        flops, kept = row["flops"] / base["flops"], row["kept_bytes"] / base["kept_bytes"]
        lines.append(
            f"| `{row['recipe']}` | {row['flops'] / 1e9:.1f} | {flops:.2f} | {row['kept_bytes'] / 2**20:.0f} | "
            f"{kept:.2f} | {row['parameters'] / 1e6:.1f} | {row['copies_bytes'] / 2**20:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
