"""Accidents at random to small training runs: `make chaos`, or python -m tests.chaos [--seconds N] [PART ...].

Each part tries accidents until its share of the seconds is used up; what follows must be the run that nothing happened
to, bit for bit, or one line that says why not. A failure prints how to repeat it and keeps its folder. The last line is
JSON. A part is a function below; its docstring says what it does and what it asks for.
"""

import argparse
import errno
import functools
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # cases are forked, and a pool of threads does not survive that

import torch

from dit_fast.train import loop as loop  # imported once, so that a forked run starts in no time
from dit_fast.train.__main__ import main as train
from tests.helpers.damage import attack
from tests.helpers.forks import ended, fork
from tests.helpers.fuzz import attempt
from tests.helpers.toy_runs import arguments, make_shards, rows, tensors

STEPS = 8
OPTIONS = [f"run.steps={STEPS}", "run.checkpoint_every=2", "engine.micro_batch=8", "data.num_workers=0"]
FINE, REFUSED = 0, 2


def start(shards: Path, run: Path, prepare: Callable[[], object] = lambda: None) -> int:
    """A training run in a forked process, its output added to log.txt beside the run; returns the process id."""

    def act() -> int:
        prepare()
        return train(arguments(shards, run, *OPTIONS))

    return fork(run.parent / "log.txt", act)


def wait(child: int) -> int:
    """Its exit status, negative for a signal. Raises AssertionError if it does not end."""
    (status,) = ended([child], 120)
    assert isinstance(status, int), status
    return status


class Trial:
    """A data set and what a run on it gives when nothing happens; its duration and number of file operations."""

    def __init__(self, folder: Path):
        self.shards, self.calm, count = make_shards(folder, 32), folder / "calm", folder / "count"
        began = time.monotonic()
        note = functools.partial(before_file_operations, self.calm, lambda number: count.write_text(str(number)))
        assert wait(start(self.shards, self.calm, note)) == FINE, (folder / "log.txt").read_text()
        self.seconds, self.operations = time.monotonic() - began, int(count.read_text())
        self.rows, self.tensors = rows(self.calm), tensors(self.calm, STEPS)

    def finish(self, run: Path, shards: Path | None = None, refused: bool = False) -> None:
        """The same command again reaches the end with equal bits, or, if `refused` is allowed, says why not."""
        status = wait(start(shards or self.shards, run))
        text = (run.parent / "log.txt").read_text()
        if refused and status == REFUSED:  # also: a replaced sample, which is one too many of so few, and is listed
            assert "dit-fast: error: " in text
            return
        assert not (run / "quarantine.jsonl").exists(), "samples replaced, and the run goes on"
        assert status == FINE, f"exit status {status}"
        assert rows(run) == self.rows, "other rows in metrics.jsonl"
        ours = tensors(run, STEPS)
        assert ours.keys() == self.tensors.keys()
        different = [name for name, value in self.tensors.items() if not torch.equal(ours[name], value)]
        assert not different, f"other bits: {different[:3]} and {len(different)} in all"


def kills(trial: Trial, rng: random.Random, folder: Path) -> None:
    """SIGKILL at up to three random moments, then to the end: equal rows, weights, averages and moments."""
    for _ in range(rng.randint(1, 3)):
        child = start(trial.shards, folder / "run")
        time.sleep(rng.uniform(0, 1.2 * trial.seconds))
        os.kill(child, signal.SIGKILL)
        if wait(child) == FINE:
            break
    trial.finish(folder / "run")


def before_file_operations(folder: Path, act: Callable[[int], object]) -> None:
    """From now on calls act(number) before this process opens a file to write, flushes, renames or removes one, or
    makes or removes a folder, below `folder`."""
    events = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "shutil.rmtree": 0, "os.truncate": 0}
    numbers, flush = itertools.count(), os.fsync

    def hook(event: str, details: tuple) -> None:
        if event == "open":
            path, writes = details[0], details[2] & (os.O_WRONLY | os.O_RDWR)
        elif event in events:
            path, writes = details[events[event]], True
        else:
            return
        if writes and isinstance(path, str | os.PathLike) and str(path).startswith(str(folder)):
            act(next(numbers))

    def fsync(file: int) -> None:
        act(next(numbers))
        flush(file)

    sys.addaudithook(hook)
    os.fsync = fsync


def exits(trial: Trial, rng: random.Random, folder: Path) -> None:
    """The process is gone before a random file operation, once or twice, then to the end: equal bits."""
    for _ in range(rng.randint(1, 2)):
        victim = rng.randint(0, trial.operations)
        gone = lambda number, victim=victim: os._exit(99) if number == victim else None  # noqa: E731
        prepare = functools.partial(before_file_operations, folder / "run", gone)
        if wait(start(trial.shards, folder / "run", prepare)) == FINE:
            break
    trial.finish(folder / "run")


def full_disk(trial: Trial, rng: random.Random, folder: Path) -> None:
    """No space from a random file operation on, for a while or for good; or no file above a random size. The run may
    go on without its checkpoints or end with one line; with space again it reaches the end with equal bits."""
    first, length = rng.randint(0, trial.operations), rng.choice([1, 5, trial.operations])
    limit = rng.choice([0, rng.randint(100, 300_000)])

    def full(number: int) -> None:
        if first <= number < first + length:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def prepare() -> None:
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        else:
            before_file_operations(folder / "run", full)

    status = wait(start(trial.shards, folder / "run", prepare))
    assert status in (FINE, 1, REFUSED), f"exit status {status}"
    trial.finish(folder / "run")


def torn(trial: Trial, rng: random.Random, folder: Path) -> None:
    """Files of checkpoints are cut, changed in one bit, emptied or gone: equal bits from an older one, or a refusal."""
    run = shutil.copytree(trial.calm, folder / "run")
    checkpoints = sorted(path for path in (run / "checkpoints").iterdir() if path.is_dir())
    for checkpoint in checkpoints[-rng.randint(1, len(checkpoints)) :]:
        for path in rng.sample(sorted(checkpoint.iterdir()), rng.randint(1, 2)):
            damage_file(rng, path)
    trial.finish(run, refused=True)


def damage_file(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    how = rng.choice(["cut", "bit", "bit", "empty", "gone"])
    if how == "bit" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data[: rng.randrange(len(data) + 1)] if how == "cut" else b"" if how == "empty" else data)
    if how == "gone":
        path.unlink()


def shards(trial: Trial, rng: random.Random, folder: Path) -> None:
    """Five damages to a data set: every reader gives the right samples, or DataError. Then a run on one that has a file
    damaged: equal bits, or a refusal in one line, if after counted replacements."""
    found = attack(trial.shards, folder, [rng.randrange(2**32) for _ in range(5)])
    assert not found, "\n".join(found)
    damaged = shutil.copytree(trial.shards, folder / "shards")
    damage_file(rng, rng.choice(sorted(path for path in damaged.rglob("*") if path.is_file())))
    trial.finish(folder / "run", damaged, refused=True)


def configurations(trial: Trial, rng: random.Random, folder: Path) -> None:
    """Fifty random configurations each: valid and written back the same, or an error of one line."""
    for _ in range(50):
        attempt(rng, folder)


def locks(trial: Trial, rng: random.Random, folder: Path) -> None:
    """Two or three processes start the same run: one trains, the others wait until it is done or name it in one line,
    and the bits are equal."""
    run = folder / "run"
    children = []
    for _ in range(rng.randint(2, 3)):
        children.append(start(trial.shards, run))
        time.sleep(rng.uniform(0, 0.5 * trial.seconds) * rng.choice([0, 1]))
    codes = sorted(wait(child) for child in children)
    assert codes[0] == FINE, f"exit statuses {codes}"
    assert set(codes) <= {FINE, REFUSED}, f"exit statuses {codes}"
    assert (folder / "log.txt").read_text().count("dit-fast: error: ") == codes.count(REFUSED)
    trial.finish(run)


PARTS = {f.__name__: f for f in (kills, exits, full_disk, torn, shards, configurations, locks)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--seconds", type=float, default=60, help="for all parts together; each has one case at least")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--case", type=int, help="this case alone")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; parts: {', '.join(PARTS)}")
    print(f"seed {options.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    end = time.monotonic() + options.seconds
    trial = Trial(folder)
    summary = {}
    names = options.parts or list(PARTS)
    for done, name in enumerate(names):
        began = time.monotonic()
        until = began + (end - began) / (len(names) - done)
        tried = failed = 0
        number = options.case or 0
        while not tried or (time.monotonic() < until and options.case is None):
            place = folder / f"{name}-{number}"
            place.mkdir()
            try:
                PARTS[name](trial, random.Random(f"{options.seed} {name} {number}"), place)
                shutil.rmtree(place)
            except Exception as error:
                failed += 1
                traceback.print_exc()
                print(f"FAILED {name} {number}: {error}; its files: {place}; again: "
                      f"python -m tests.chaos {name} --seed {options.seed} --case {number}", flush=True)  # fmt: skip
            tried, number = tried + 1, number + 1
        summary[name] = {"tried": tried, "failed": failed, "seconds": round(time.monotonic() - began, 1)}
    failures = sum(part["failed"] for part in summary.values())
    if not failures:
        shutil.rmtree(folder)
    print(json.dumps({"seed": options.seed, "failed": failures, "parts": summary}))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
