"""What REPA-E does to autoencoder and alignment beside a frozen autoencoder, at small size.

    python -m dit_fast.benchmarks.repa_e SOURCE

SOURCE: an .npz or a folder of labelled images, e.g. .cache/quickstart/twemoji.npz (`make quickstart DATA=twemoji`). For
each seed a small AutoencoderKL is trained briefly, shards are built with it and EfficientNet-Lite0's features, and
`quickstart-repa_e` runs twice on them: as it is, and with methods.repa_e.vae_lr=0, by which nothing but the
autoencoder's updates is left out. Both log the same terms; the result holds every logged row. One process, CPU.
"""

import argparse
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dit_fast import terminal
from dit_fast.benchmarks.gate import ROOT
from dit_fast.benchmarks.results import RESULTS, environment, rounded, write, write_table
from dit_fast.preparation.build import build_shards
from dit_fast.preparation.small_vae import read_images, train_small_vae
from dit_fast.recipes import load
from dit_fast.report.metrics import read_metrics
from dit_fast.train.loop import train
from dit_fast.world import World

SEEDS, STEPS, EVERY, LAST, SIZE = (0, 1, 2), 200, 10, 5, 32  # LAST: logged rows, of EVERY steps each, that are compared
VAE = {"channels": 12, "halvings": 2, "width": 16, "steps": 100, "batch": 16}
FIXED = (
    f"run.steps={STEPS}",
    f"run.log_every={EVERY}",
    "run.checkpoint_every=0",
    "run.tensorboard=false",
    "preview.every=0",
    "engine.global_batch=16",
    "optimizer.warmup_steps=20",
    "methods.repa_e.vae_lr=1e-3",
    "methods.repa_e.discriminator_lr=1e-3",
)
ARMS = {"end to end": (), "frozen": ("methods.repa_e.vae_lr=0",)}
SHOWN = {
    "repa_e/l1": "mean absolute error of the reconstruction",
    "repa_e/alignment": "alignment of the transformer (minus cosine)",
    "repa_e/vae_alignment": "alignment as the autoencoder sees it",
    "flow": "flow-matching loss",
}
PAGE = ROOT / "docs" / "methods" / "repa_e.md"


def main(arguments: list[str] | None = None) -> int:
    return terminal.run(_work, arguments)


def _work(arguments: list[str]) -> int:
    parser = terminal.Parser(prog="python -m dit_fast.benchmarks.repa_e", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder with one folder of images per class, or .npz with images and labels")
    options: argparse.Namespace = parser.parse_args(arguments)
    where, runs = environment(torch.device("cpu")), []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            runs += [_run(Path(folder), options.source, seed, arm) for arm in ARMS]
    result = {
        "schema": 1,
        "run": "repa_e",
        **where,
        "command": f"python -m dit_fast.benchmarks.repa_e {options.source}",
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "size": SIZE,
        "vae": VAE,
        "overrides": ["quickstart-repa_e", *FIXED],
        "arms": {arm: list(changes) for arm, changes in ARMS.items()},
        "remark": "seconds: of each run on a machine that others used too; no measurement of speed",
        "runs": runs,
    }
    write(RESULTS / "cpu" / "repa_e.json", rounded(result))
    write_table(PAGE, "end to end", table(runs))
    return 0


def _run(folder: Path, source: str, seed: int, arm: str) -> dict[str, Any]:
    """One run of an arm; autoencoder and shards are those of the seed, made by its first run."""
    vae, shards, run = folder / "vae", folder / "shards", folder / arm.replace(" ", "_")
    if not vae.exists():
        train_small_vae(read_images(source, SIZE, 10_000), vae, seed=seed, **VAE)
        build_shards(
            source, shards, autoencoder=f"diffusers:{vae}", size=SIZE, store_images=True, encoder="efficientnet-lite0",
            progress=False, device="cpu",
        )  # fmt: skip
    started = time.perf_counter()
    changes = [*FIXED, *ARMS[arm], f"data.path={shards}", f"run.dir={run}", f"run.seed={seed}"]
    train(load("quickstart-repa_e", changes), World(0, 1, torch.device("cpu")))
    metrics = read_metrics(run)
    names = [name for name in metrics.rows[-1] if name in SHOWN or name.startswith("repa_e/")]
    values = {name: metrics.column(name)[1].tolist() for name in names}
    return {"seed": seed, "arm": arm, "seconds": round(time.perf_counter() - started, 1), "values": values}


def table(runs: list[dict[str, Any]]) -> str:
    """The mean of the last rows by seed, each arm, in Markdown."""
    lines = ["| | " + " | ".join(f"{arm}, seed {seed}" for seed in SEEDS for arm in ARMS) + " |"]
    lines.append("|---" * (1 + len(SEEDS) * len(ARMS)) + "|")
    found = {(run["seed"], run["arm"]): run["values"] for run in runs}
    for name, text in SHOWN.items():
        means = [statistics.mean(found[seed, arm][name][-LAST:]) for seed in SEEDS for arm in ARMS]
        lines.append(f"| {text} (`{name}`) | " + " | ".join(f"{mean:.4f}" for mean in means) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
