"""What the diversity loss does to blocks, at small scale: ten configurations times three seeds, analysed and measured.

    python examples/study.py [--data fashion-mnist|FOLDER] [--out FOLDER] [--steps N] [--seeds 0,1] [--only NAMES]

The runs are those of benchmarks/study.toml. Every stage prints the command it runs; started again, it keeps what is
finished and goes on where it stopped. docs/study.md says what it shows.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import quickstart_data
from quickstart import CACHE, call, claim, cores, program, shown

from dit_fast.errors import UserError
from dit_fast.evaluation.records import read_evaluations
from dit_fast.sweep.jobs import read_record

LIST = Path(__file__).parents[1] / "benchmarks" / "study.toml"
DRAWN = ["--sampler", "heun", "--num-steps", "10", "--cfg-scale", "1"]  # no guidance: the model as it is
STAGES = 6


def main() -> int:
    """Runs all stages; a failing one ends the script with its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="fashion-mnist (default), twemoji, a folder of class folders, or an .npz")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for everything it writes")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the list's)")
    parser.add_argument("--seeds", help="e.g. 0,1,2 (default: the list's)")
    parser.add_argument("--only", help="names of the list, with commas between (default: all)")
    parser.add_argument("--jobs", type=int, help="trainings at a time (default: one a core)")
    parser.add_argument("--record", action="store_true", help="also write the table of docs/study.md, and its figure")
    parser.add_argument("--images", type=int, default=2000, help="of the Frechet distance, drawn and real")
    parser.add_argument("--blocks", type=int, default=512, help="images that blocks are compared on")
    options = parser.parse_args()
    try:
        _run(options)
    except UserError as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"study: this stage failed (exit status {error.returncode}): {shown(error.cmd)}", file=sys.stderr)
        return error.returncode
    except KeyboardInterrupt:
        print("\nstudy: stopped; the same command continues here", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    out, fast = options.out, program("dit-fast")
    _stage(1, "data")
    source = quickstart_data.prepare(options.data or "fashion-mnist", CACHE)
    claim(out, source.name)
    _stage(2, "latent shards, with the features that REPA aligns with")
    build = [fast, "shards", "build", str(source.path), str(out / "shards"), "--autoencoder", "pca", "--size", "32"]
    build += ["--batch-size", "256", "--processes", str(min(cores(), 8)), "--encoder", "efficientnet-lite0"]
    call(build, threads=1)
    _stage(3, "training")
    sweep = [fast, "sweep", str(LIST), f"data.path={out / 'shards'}"]
    sweep += (
        [f"run.steps={options.steps}", f"run.checkpoint_every={max(options.steps // 4, 1)}"] if options.steps else []
    )
    sweep += ["--seeds", options.seeds] if options.seeds else []
    sweep += ["--only", options.only] if options.only else []
    call([*sweep, "--jobs", str(options.jobs or cores()), "--out", str(out / "runs")], threads=0)
    steps = {out / "runs" / entry["folder"]: entry["steps"] for entry in read_record(out / "runs")}
    runs = list(steps)
    minibatch = str(min(256, options.blocks))
    for number, run in enumerate(runs, 1):
        _stage(4, f"blocks, run {number} of {len(runs)}")
        call([fast, "analyse", str(run), "--count", str(options.blocks), "--minibatch", minibatch], threads=0)
    for number, run in enumerate(runs, 1):
        _stage(5, f"Frechet distance, run {number} of {len(runs)}")
        if all(known.step != steps[run] for known in read_evaluations(run)):
            count = str(options.images)
            call(
                [fast, "evaluate", str(run), "--metrics", "fd", "--count", count, "--reference-count", count, *DRAWN],
                threads=0,
            )
    _stage(6, "table")
    record = ["--record"] if options.record else []
    call([sys.executable, "-m", "dit_fast.benchmarks.study", str(out / "runs"), *record], threads=0)
    if len({run.parent for run in runs}) > 1:
        call([fast, "compare", str(out / "runs")], threads=0)


def _stage(number: int, title: str) -> None:
    print(f"\n[{number}/{STAGES}] {title}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
