"""From labelled images to a report in minutes, through the public commands, with DeepSpeed ZeRO on whatever is there.

    python examples/quickstart.py [--data fashion-mnist|twemoji|FOLDER|ADDRESS] [--baseline] [--repa]

Every stage prints the command it runs, so each can be repeated or changed by hand. Started again, it keeps what is
finished and resumes a training run where it stopped.
"""

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import quickstart_data

from dit_fast.errors import DataError, UserError
from dit_fast.recipes import load

CACHE = Path(".cache/quickstart")
GUIDANCE = ["--cfg-scale", "2.5", "--sampler", "heun", "--num-steps", "20"]


@dataclass(frozen=True)
class Machine:
    """Processes that train, threads for each, and what they run on."""

    processes: int
    threads: int
    gpu: bool


def main() -> int:
    """Runs all stages; a failing one ends the script with its exit status."""
    options = _parser().parse_args()
    try:
        _run(options)
    except UserError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"quickstart: this stage failed (exit status {error.returncode}): {shown(error.cmd)}", file=sys.stderr)
        return error.returncode
    except KeyboardInterrupt:
        print("\nquickstart: stopped; the same command continues here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a small DiverseDiT on real images and report what it learned.")
    parser.add_argument(
        "--data", help="fashion-mnist, twemoji, a folder of class folders, an .npz, or an http(s) address"
    )
    parser.add_argument("--sha256", help="checksum of the file at the address")
    parser.add_argument("--baseline", action="store_true", help="also train the plain SiT with the same steps and seed")
    parser.add_argument("--repa", action="store_true", help="also align a block with EfficientNet-Lite0 features")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for everything it writes")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    return parser


def _run(options: argparse.Namespace) -> None:
    out, machine = options.out, this_machine(load("quickstart").engine.global_batch)
    started = time.monotonic()
    where = f"{machine.processes} GPU" if machine.gpu else f"CPU, {machine.processes} x {machine.threads} threads"
    print(f"quick start on {where}; everything is written to {out}/", flush=True)
    _stage(1, "data")
    source = quickstart_data.prepare(options.data, CACHE, options.sha256)
    print(source.remark or f"{source.name}: {source.path}", flush=True)
    claim(out, source.name)
    _stage(2, "latent shards")
    shards = out / ("shards-features" if options.repa else "shards")
    features = ["--encoder", "efficientnet-lite0"] if options.repa else []
    workers = str(min(cores(), 8))
    call(
        [program("dit-fast"), "shards", "build", str(source.path), str(shards), "--autoencoder", "pca", "--size", "32",
         "--batch-size", "256", "--processes", workers, *features], threads=1,
    )  # fmt: skip
    runs = {"diversedit-repa": "quickstart-diversedit-repa"} if options.repa else {"diversedit": "quickstart"}
    if options.baseline:
        runs["baseline"] = "quickstart-sit"
    for name, recipe in runs.items():
        _stage(3, f"training: {name}")
        call(train_command(machine, recipe, shards, out / name, options.steps), machine.threads)
    for name in runs:
        _stage(4, f"samples: {name}")
        call([program("dit-fast"), "sample", str(out / name), "--per-class", "8", *GUIDANCE], threads=0)
    _stage(5, "report")
    main_run, *others = runs
    baseline = ["--baseline", str(out / others[0])] if others else []
    notes = ["--note", source.remark] if source.remark else []
    call([program("dit-fast"), "report", str(out / main_run), *baseline, *notes, "--out", str(out)], threads=0)
    minutes = (time.monotonic() - started) / 60
    print(f"\ndone in {minutes:.1f} minutes; open {out / 'report.html'} in a browser", flush=True)


def this_machine(global_batch: int) -> Machine:
    """All visible GPUs that divide the batch, else two processes that share the CPU's cores (one on a single core)."""
    import torch

    available = cores()
    gpus = torch.cuda.device_count()
    if gpus:
        return Machine(max(n for n in range(1, gpus + 1) if global_batch % n == 0), max(available // gpus, 1), True)
    processes = min(available, 2)
    return Machine(processes, available // processes, False)


def cores() -> int:
    """Cores this process may use; containers often give fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train_command(machine: Machine, recipe: str, shards: Path, run: Path, steps: int | None) -> list[str]:
    """The `deepspeed` command of one training run; started again it resumes."""
    changes = [f"data.path={shards}", f"run.dir={run}", *([f"run.steps={steps}"] if steps else [])]
    launcher = [program("deepspeed"), "--num_gpus", str(machine.processes), "--master_port", str(_free_port())]
    launcher += ["--module", "dit_fast.train"]
    return [*launcher, recipe, *changes]


def _free_port() -> int:
    """A free port, so that two runs on one machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def claim(out: Path, data: str) -> None:
    """One folder holds one data set. Raises DataError when it was begun with another."""
    record = out / "quickstart.json"
    if record.exists():
        before = json.loads(record.read_text())["data"]
        if before != data:
            raise DataError(
                f"{out}: was begun with {before}, not {data}; use another folder (OUT={out}-{data}) or delete it"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "quickstart.json.partial"
    partial.write_text(json.dumps({"data": data}))
    partial.replace(record)


def _stage(number: int, title: str) -> None:
    print(f"\n[{number}/5] {title}", flush=True)


def call(command: list[str], threads: int) -> None:
    """Runs a command in the foreground; `threads` = 0 leaves the number of threads to torch.

    Idle threads sleep instead of spinning: on cores that others use too, spinning made sampling several times slower.
    """
    print(f"$ {shown(command)}", flush=True)
    settings = {"OMP_WAIT_POLICY": "PASSIVE", **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    subprocess.run(command, check=True, env={**os.environ, **settings})


def shown(command: list[str]) -> str:
    return shlex.join([Path(command[0]).name, *command[1:]])


def program(name: str) -> str:
    """A command of the environment that runs this script, whether or not it was activated."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise UserError(f"{path} is missing; install the package with its extras: pip install -e '.[train]'")
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
