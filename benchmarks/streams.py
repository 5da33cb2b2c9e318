"""Does a residual stream in bf16 learn as one in fp32 does? python -m dit_fast.benchmarks.streams SHARDS.

A recipe under `engine.precision=bf16`, 300 steps on the CPU with `model.residual_dtype` fp32 and bf16 and two seeds, on
real latents. Kept are the means over each 20 steps of loss and gradient norm, and how far streams and seeds lie apart.
The values depend neither on the machine's load nor on its clock.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from dit_fast.benchmarks.results import RESULTS, environment, occasion, rounded, write
from dit_fast.data import open_dataset
from dit_fast.recipes import load
from dit_fast.report.metrics import read_metrics
from dit_fast.report.reference import data_identity
from dit_fast.train.loop import train
from dit_fast.world import World

RECIPE, STEPS, EVERY = "quickstart", 300, 20
STREAMS, SEEDS = ("fp32", "bf16"), (0, 1)
SETTINGS = (
    f"run.steps={STEPS}",
    f"run.log_every={EVERY}",
    "run.checkpoint_every=0",
    "run.tensorboard=false",
    "preview.every=0",
    "engine.precision=bf16",
    "engine.global_batch=24",
)


def curve(data: str, stream: str, seed: int) -> dict[str, list[float]]:
    """Loss and gradient norm of one run, [STEPS / EVERY] each."""
    with tempfile.TemporaryDirectory() as folder:
        own = (f"data.path={data}", f"run.dir={folder}/run", f"run.seed={seed}", f"model.residual_dtype={stream}")
        train(load(RECIPE, [*SETTINGS, *own]), World(0, 1, torch.device("cpu")))
        metrics = read_metrics(Path(folder, "run"))
        return {name: metrics.column(name)[1].tolist() for name in ("loss", "grad_norm")}


def apart(one: list[float], other: list[float]) -> float:
    """Mean distance of two curves in their second half, in shares of the first one's mean there."""
    late = torch.tensor([one, other], dtype=torch.float64)[:, len(one) // 2 :]
    return float((late[0] - late[1]).abs().mean() / late[0].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="SHARDS", help="latent shards of the quick start")
    data, where = parser.parse_args().data, environment(torch.device("cpu"))
    runs = {stream: [curve(data, stream, seed) for seed in SEEDS] for stream in STREAMS}
    loss = {stream: [run["loss"] for run in each] for stream, each in runs.items()}
    distances = {
        "two seeds of fp32": apart(*loss["fp32"]),
        **{
            f"{stream} from fp32, seed {seed}": apart(loss["fp32"][index], loss[stream][index])
            for stream in STREAMS[1:]
            for index, seed in enumerate(SEEDS)
        },
    }
    content = {"schema": 1, "run": "streams", **where, **occasion(), "recipe": RECIPE, "settings": SETTINGS}
    content["command"] = "python -m dit_fast.benchmarks.streams SHARDS"
    content |= {"data": data_identity(open_dataset(data).info, []), "seeds": SEEDS, "every": EVERY}
    content |= {"apart": rounded(distances), "runs": rounded(runs)}
    write(RESULTS / "cpu" / "streams.json", content)
    for name, distance in distances.items():
        print(f"{name:28}{distance:.5f}")


if __name__ == "__main__":
    main()
