"""Toy data sets and small runs for the trainer's tests, in this process or as two launched ranks."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import numpy as np

from dit_fast.preparation.build import build_shards
from tests.helpers.started import Started

ROOT = Path(__file__).parents[2]
CLASSES = ("ant", "bee", "cat")


def make_shards(folder, count=48, seed=0):
    """A finished data set of 4 x 4 x 12 latents (PCA of 16-pixel pictures) in three classes; returns its path."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:16, 0:16] / 16
    labels = rng.integers(0, len(CLASSES), count)
    phase, tint = labels[:, None, None] * 2.0, rng.uniform(0.2, 1, (count, 1, 1, 3))
    wave = (np.sin(6 * x + phase) * np.cos(5 * y))[..., None]
    images = (127.5 + 120 * wave * tint + rng.normal(0, 3, (count, 16, 16, 3))).clip(0, 255).astype(np.uint8)
    source = folder / "pictures.npz"
    np.savez(source, images=images, labels=labels, class_names=np.array(CLASSES))
    build_shards(source, folder / "shards", autoencoder="pca", size=16, samples_per_shard=16, progress=False)
    return folder / "shards"


def arguments(shards, run, *overrides):
    """The command line of a run of 12 small steps with checkpoints every 4; later overrides win."""
    fixed = {
        "data.path": shards,
        "run.dir": run,
        "run.steps": 12,
        "run.log_every": 1,
        "run.checkpoint_every": 4,
        "run.keep_checkpoints": 0,
        "run.tensorboard": "false",
        "engine.global_batch": 8,
        "engine.micro_batch": 2,
        "preview.every": 0,
        "optimizer.lr": 1e-3,
        "optimizer.beta2": 0.99,
        "optimizer.warmup_steps": 3,
        "optimizer.ema_decay": 0.9,
    }
    return ["quickstart", *(f"{key}={value}" for key, value in fixed.items()), *overrides]


def environment(**changes):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **changes}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Ranks:
    """`python -m dit_fast.train ARGUMENTS`, or another program, as two processes with a launcher's variables set.

    A context: whatever still lives at its end is killed.
    """

    def __init__(self, command, log, size=2, program=("-m", "dit_fast.train")):
        self.log = log
        place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        numbers = map(str, range(size))
        self.processes = [
            Started([*program, *command], environment(RANK=rank, LOCAL_RANK=rank, **place), log) for rank in numbers
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    def kill(self):
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()

    def wait(self, timeout=240):
        """Exit codes of all ranks; an abort in the teardown after all work is done (rarely, gloo) counts as 0."""
        codes = [process.wait(timeout) for process in self.processes]
        return [0 if code == -signal.SIGABRT else code for code in codes]

    def text(self):
        return self.log.read_text()


def processes(run):
    """{pid: command line} of all processes that name this run folder: launchers, ranks and their loader workers."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if f"run.dir={run}" in words:
                found[int(entry.name)] = words
    return found


def wait_for(condition, timeout=180):
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.02)


def rows_so_far(run):
    """The lines of metrics.jsonl; the last one may be half written."""
    path = Path(run) / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def rows(run):
    """The rows of metrics.jsonl without what depends on the clock."""
    shares = (f"slowest_{name}" for name in ("rank", "data", "compute", "collective"))
    clocked = ("seconds", "samples_per_s", "mfu", "waiting", *shares)
    return [{k: v for k, v in json.loads(line).items() if k not in clocked} for line in rows_so_far(run)]


def losses(run):
    return [row["loss"] for row in rows(run)]


def tensors(run, step):
    """Every tensor of a checkpoint by kind and name, whatever the number of files."""
    from dit_fast.checkpoint.step import KINDS, key_of, open_checkpoint

    checkpoint = open_checkpoint(Path(run) / "checkpoints" / f"step_{step:08d}")
    return {
        f"{group}/{key_of(kind, name)}": tensor
        for kind, group in KINDS.items()
        for name, tensor in checkpoint.state_dict(kind).items()
    }
