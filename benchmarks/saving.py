"""How long a save keeps training waiting, in the background and not: python -m dit_fast.benchmarks.saving [--write]

One engine with all that a checkpoint of SiT-B/2 holds (weights, average, two moments). Both kinds of save take turns in
one process, into a temporary folder here; before each the one before is finished. `stall_s`: from the call of `save` to
its return; `written_s`: until the checkpoint is on the disk, with nothing else for this process to do.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dit_fast.benchmarks.results import RESULTS, environment, occasion, rounded, slug, write
from dit_fast.errors import UserError
from dit_fast.models import build_model
from dit_fast.runs import TrainConfig
from dit_fast.train.checkpoints import Checkpoints
from dit_fast.train.engine import SingleEngine
from dit_fast.world import single

MODEL, ROUNDS = "SiT-B/2", 5


class Weights(nn.Module):
    """A loss that nobody asks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = build_model(MODEL, input_size=32, num_classes=1000, skip_wiring="input")


def measure(rounds: int = ROUNDS) -> dict[str, Any]:
    """Samples of both kinds of save, and the ratio of their median stalls."""
    world = single()
    engine = SingleEngine(Weights(), TrainConfig(), world)
    found: dict[str, list[dict[str, float]]] = {"synchronous": [], "background": []}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=Path.cwd()) as place:
        savers = {kind: Checkpoints(Path(place) / kind, world, 1, background=kind == "background") for kind in found}
        for number in tqdm(range(rounds + 1), unit="pair"):
            for kind, saver in savers.items():
                began = time.perf_counter()
                saver.save(engine, {}, {"step": number + 1})
                stall = time.perf_counter() - began
                if not saver.settle():
                    raise UserError(f"{place}: no checkpoint could be written there")
                if number:  # the first reserves memory
                    found[kind].append({"stall_s": stall, "written_s": time.perf_counter() - began})
        size = sum(path.stat().st_size for path in Path(place).rglob("background/*/*/*") if path.is_file())
    medians = {kind: statistics.median(each["stall_s"] for each in samples) for kind, samples in found.items()}
    return {
        "schema": 1,
        "run": "saving",
        "model": MODEL,
        "bytes": size,
        "stall_s": medians,
        "ratio": medians["background"] / medians["synchronous"],
        "samples": found,
    }


def main() -> int:
    if sys.argv[1:] not in ([], ["--write"]):
        raise UserError("usage: python -m dit_fast.benchmarks.saving [--write]")
    result = measure()
    for kind, stall in result["stall_s"].items():
        print(f"{kind:12} {stall:7.3f} s of waiting for {result['bytes'] / 1e9:.2f} GB")
    print(f"ratio        {result['ratio']:7.3f}")
    if sys.argv[1:]:
        device = single().device
        write(RESULTS / slug(device) / "saving.json", rounded(result | environment(device) | occasion()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
