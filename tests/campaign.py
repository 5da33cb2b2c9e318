"""The fault campaign: `python -m tests.campaign [PART ...] [--record]`.

Beside tests/chaos.py, which tries a minute of everything on one process, it counts: kills over worlds and ZeRO stages,
damaged files by the hundred, and a run long enough to show a leak.

A part is a function below. --record puts what it found into benchmarks/results/cpu/chaos.json, beside the parts that
were recorded before.
"""

import argparse
import functools
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")  # cases are forked, and a pool of threads does not survive that

import numpy as np
import torch
from deepspeed.runtime.zero.muon import original_muon as original_muon  # and torch's compiler with it: six CPU seconds
from tqdm import tqdm

from dit_fast.benchmarks.results import RESULTS, environment, occasion
from dit_fast.checkpoint.run import load_run
from dit_fast.errors import UserError
from dit_fast.train import loop as loop  # imported once, so that forked ranks start in no time
from dit_fast.train import zero as zero
from dit_fast.train.feed import Feed
from tests.chaos import damage_file
from tests.helpers.damage import attack
from tests.helpers.forks import ended, forgiven, fork, launch
from tests.helpers.toy_runs import arguments, make_shards, rows, rows_so_far, tensors, wait_for

RECORD = RESULTS / "cpu" / "chaos.json"
STEPS, EVERY, BATCH = 12, 2, 8
WORLDS = ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (4, 1), (4, 2), (4, 3))  # ranks, ZeRO stage
SLOW = (
    0.03  # seconds at most that each flush to disk takes longer: kills shall meet saves that go on behind the training
)


class Kept:
    """What each rank was given: lines of (position, crc32 of the sample) in a file of its own for every launch."""

    def __init__(self, folder: Path):
        self.folder, self.launches = folder, 0

    def prepare(self, slow: float):
        """For `launch`: notes the samples of each step as it is taken, and makes the disk slower."""
        number, self.launches = self.launches, self.launches + 1
        take, flush = Feed.take, os.fsync

        def prepare(rank: int) -> None:
            file = (self.folder / f"samples-{number:03d}-{rank}.txt").open("a", buffering=1)

            def noted(feed):
                batches = take(feed)
                for batch in batches:
                    for position, moments in zip(batch["position"].tolist(), batch["moments"], strict=True):
                        file.write(f"{position} {zlib.crc32(moments.contiguous().numpy().tobytes())}\n")
                return batches

            def fsync(descriptor):
                time.sleep(random.random() * slow)
                flush(descriptor)

            Feed.take, os.fsync = noted, fsync

        return prepare

    def met(self, size: int) -> bool:
        """Whether all ranks of the last launch have begun to train."""
        files = self.folder.glob(f"samples-{self.launches - 1:03d}-*.txt")
        return sum(path.stat().st_size > 0 for path in files) == size

    def order(self, steps: int) -> dict[int, int]:
        """position -> sample over all launches. Raises AssertionError where a launch went back too far or left a gap,
        met a position twice, or gave it another sample than an earlier launch did.
        """
        found: dict[int, int] = {}
        for number in range(self.launches):
            own: dict[int, int] = {}
            for path in sorted(self.folder.glob(f"samples-{number:03d}-*.txt")):
                text = path.read_text()
                for line in text[: text.rfind("\n") + 1].splitlines():
                    position, sample = map(int, line.split())
                    assert position not in own, f"launch {number} met position {position} twice"
                    own[position] = sample
            other = [p for p, sample in own.items() if found.get(p, sample) != sample]
            assert not other, f"launch {number} gave positions {other[:5]} other samples"
            assert not own or min(own) <= len(found), f"launch {number} began at {min(own)}: samples are lost"
            whole = len(own) // BATCH * BATCH  # of a killed launch some ranks may be a step ahead
            first = min(own, default=0)
            found |= {p: own[p] for p in range(first, first + whole) if p in own}
        missing = set(range(steps * BATCH)) - found.keys()
        assert not missing, f"positions {sorted(missing)[:5]} were never trained on"
        return found


def line(shards: Path, run: Path, stage: int, *more: str) -> list[str]:
    options = [
        f"run.steps={STEPS}",
        f"run.checkpoint_every={EVERY}",
        f"engine.zero_stage={stage}",
        "data.num_workers=0",
    ]
    return arguments(shards, run, *options, *more)


def kills(options: argparse.Namespace, folder: Path) -> dict:
    """SIGKILL to all ranks, or to one, at random moments of runs of 1, 2 and 4 processes under ZeRO 1, 2 and 3, with
    saves on a slow disk. Then to the end: equal rows and bits. A third goes on in another world (without DiverseDiT,
    whose loss depends on who meets whom in a micro-batch): the same samples in order, and losses to 1e-5. A rank whose
    neighbour died must leave by itself.
    """
    shards, rng = make_shards(folder, 64), random.Random(options.seed)
    found: Counter[str] = Counter()

    @functools.cache
    def calm(size: int, stage: int, *more: str):
        place = folder / "-".join(["calm", str(size), str(stage), *more])
        place.mkdir()
        kept = Kept(place)
        _finish(place, line(shards, place / "run", stage, *more), size, kept.prepare(0))
        return rows(place / "run"), tensors(place / "run", STEPS), kept.order(STEPS)

    with tqdm(total=options.count, unit="kill") as bar:
        while found["kills"] < options.count:
            size, stage = WORLDS[found["cases"] % len(WORLDS)]
            place = folder / f"case-{found['cases']}"
            place.mkdir()
            try:
                _case(rng, shards, place, (size, stage), calm, found)
            except Exception as error:
                raise AssertionError(f"case {found['cases']} of seed {options.seed}, {place}: {error}") from error
            found["cases"] += 1
            bar.update(found["kills"] - bar.n)
            shutil.rmtree(place)
    return {"kills": found.pop("kills"), "worlds": [list(world) for world in WORLDS], **found}


def _case(rng, shards, place, world, calm, found) -> None:
    run, kept = place / "run", Kept(place)
    last = rng.choice(WORLDS) if rng.random() < 1 / 3 else world
    more = ["methods=none"] if last != world else []
    for _ in range(rng.randint(2, 4)):
        if not _kill(rng, place, line(shards, run, world[1], *more), world[0], kept, found):
            break
    _finish(place, line(shards, run, last[1], *more), last[0], kept.prepare(SLOW))
    ours, (calm_rows, calm_tensors, order) = rows(run), calm(*(world if last == world else WORLDS[0]), *more)
    assert kept.order(STEPS) == order, "other samples"
    if last == world:
        assert ours == calm_rows, "other rows in metrics.jsonl"
        values = tensors(run, STEPS)
        assert values.keys() == calm_tensors.keys()
        different = [name for name, value in calm_tensors.items() if not torch.equal(values[name], value)]
        assert not different, f"other bits: {different[:3]} and {len(different)} in all"
    else:
        assert [row["step"] for row in ours] == [row["step"] for row in calm_rows]
        losses = [[row["loss"] for row in each] for each in (ours, calm_rows)]
        np.testing.assert_allclose(*losses, rtol=1e-5)
        found["worlds_changed"] += 1


def _kill(rng, place, command, size, kept, found) -> bool:
    """Starts the run and ends it by SIGKILL at a random moment; False where it was done before."""
    run, log = place / "run", place / "log.txt"
    children = launch(log, command, size, kept.prepare(SLOW))
    step = len(rows_so_far(run)) + rng.randint(0, 4)
    wait_for(lambda: len(rows_so_far(run)) >= step or _some_ended(children))
    time.sleep(rng.uniform(0, 0.3))
    if _some_ended(children):
        assert forgiven(ended(children)) == [0] * size, log.read_text()[-3000:]
        return False
    # before the ranks have met, only a launcher can tell the others that one is dead
    alone = size > 1 and rng.random() < 0.3 and kept.met(size)
    for child in [rng.choice(children)] if alone else children:
        os.kill(child, signal.SIGKILL)
    codes = ended(children, 120)
    assert all(isinstance(code, int) for code in codes), f"after one rank died: {codes}"
    killed = -signal.SIGKILL in codes
    found["kills"] += killed
    found["kills_of_one_rank"] += alone and killed
    found["saves_cut_short"] += any((run / "checkpoints").glob("*partial*"))
    return True


def _finish(place, command, size, prepare) -> None:
    log = place / "log.txt"
    codes = forgiven(ended(launch(log, command, size, prepare)))
    assert codes == [0] * size, f"exit codes {codes}: {log.read_text()[-3000:]}"


def _some_ended(children) -> bool:
    return any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children)


def fuzz(options: argparse.Namespace, folder: Path) -> dict:
    """Half of the damages to shards, read by every reader: the right samples, or DataError. Half to checkpoints: the
    right weights, from an older one at the worst, or UserError in one line.
    """
    shards, rng, found = make_shards(folder), random.Random(options.seed), Counter()
    half = options.count // 2
    for _ in tqdm(range(half), unit="data set"):
        problems = attack(shards, folder, [rng.randrange(2**32)])
        assert not problems, "\n".join(problems)
        found["shards"] += 1
    calm = folder / "calm"
    codes = ended(launch(folder / "log.txt", line(shards, calm, 1), 1))
    assert codes == [0], (folder / "log.txt").read_text()[-3000:]
    truth = {step: tensors(calm, step) for step in range(EVERY, STEPS + 1, EVERY)}
    for number in tqdm(range(options.count - half), unit="checkpoint"):
        run = shutil.copytree(calm, folder / f"run-{number}")
        checkpoints = sorted(path for path in (run / "checkpoints").iterdir() if path.is_dir())
        for checkpoint in checkpoints[-rng.randint(1, len(checkpoints)) :]:
            damage_file(rng, rng.choice(sorted(path for path in checkpoint.iterdir() if path.is_file())))
        (code,) = ended([fork(folder / "log.txt", lambda run=run: _read(run, truth))], 60)
        assert code in (0, 2), f"{run}, seed {options.seed}: {code}: {(folder / 'log.txt').read_text()[-3000:]}"
        found["checkpoints_read" if code == 0 else "checkpoints_refused"] += 1
        shutil.rmtree(run)
    return {"fuzzed": options.count, **found}


def _read(run: Path, truth) -> int:
    try:
        loaded = load_run(run)
    except UserError as error:
        return 2 if str(error).isprintable() else 70
    weights = {key.partition("/")[2]: value for key, value in truth[loaded.step].items() if key.startswith("ema")}
    return 0 if all(torch.equal(value, weights[name]) for name, value in loaded.model.state_dict().items()
                    if name in weights) else 71  # fmt: skip


def soak(options: argparse.Namespace, folder: Path) -> dict:
    """One run of many tiny steps, with saves: its memory, open files, threads and CPU time per step, as it goes on."""
    shards, run, steps = make_shards(folder, 64), folder / "run", options.steps
    every = max(steps // 20, 1)
    more = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2"]
    more += [f"run.steps={steps}", f"run.checkpoint_every={every}", "run.keep_checkpoints=2", f"run.log_every={every}"]
    (child,) = launch(folder / "log.txt", [*line(shards, run, 1), *more], 1)
    seen: list[dict] = []
    with tqdm(total=steps, unit="step") as bar:
        while not _some_ended([child]):
            logged = rows_so_far(run)
            if len(logged) > len(seen):
                seen.append(_footprint(child) | {"step": every * len(logged)})
                bar.update(seen[-1]["step"] - bar.n)
            time.sleep(0.05)
    assert ended([child]) == [0], (folder / "log.txt").read_text()[-3000:]
    for before, after in itertools.pairwise(seen):
        spent = after["cpu_seconds"] - before["cpu_seconds"]
        after["cpu_ms_per_step"] = round(spent / (after["step"] - before["step"]) * 1e3, 3)
    quarter = len(seen) // 4
    settled, last = seen[quarter], seen[-1]
    early, late = (
        median(each["cpu_ms_per_step"] for each in part) for part in (seen[quarter:-quarter], seen[-quarter:])
    )
    assert late < 1.1 * early, f"steps grow dearer: {early} to {late} ms"
    assert last["mb"] - settled["mb"] < 8, f"memory grows: {settled} to {last}"
    assert last["files"] <= settled["files"], f"open files grow: {settled} to {last}"
    assert last["threads"] <= settled["threads"], f"threads grow: {settled} to {last}"
    return {"steps": steps, "footprint": seen}


def _footprint(pid: int) -> dict:
    status = dict(row.split(":", 1) for row in Path(f"/proc/{pid}/status").read_text().splitlines())
    kilobytes = int(status["VmRSS"].split()[0])
    ticks = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return {
        "cpu_seconds": ticks / os.sysconf("SC_CLK_TCK"),
        "mb": round(kilobytes / 1024, 1),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
    }


PARTS = {part.__name__: part for part in (kills, fuzz, soak)}
COUNTS = {"kills": 200, "fuzz": 1000, "soak": 0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--count", type=int, help="kills, or damages (default: 200, and 1000)")
    parser.add_argument("--steps", type=int, default=20_000, help="of the long run")
    parser.add_argument("--record", action="store_true", help="write the result file")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; parts: {', '.join(PARTS)}")
    print(f"seed {options.seed}", flush=True)
    given = options.count
    for name in options.parts or PARTS:
        options.count = given or COUNTS[name]
        folder, began = Path(tempfile.mkdtemp(prefix=f"campaign-{name}-")), time.monotonic()
        where = environment(torch.device("cpu"))
        found = PARTS[name](options, folder) | where
        found |= {"seed": options.seed, "seconds": round(time.monotonic() - began, 1), **occasion()}
        shutil.rmtree(folder)
        print(json.dumps({name: found}), flush=True)
        if options.record:
            _record(name, found)
    return 0


def _record(name: str, found: dict) -> None:
    """Beside the parts of earlier calls; `kills` of the file is that of its part, for whoever asks for the number."""
    result = json.loads(RECORD.read_text()) if RECORD.exists() else {"schema": 1, "run": "chaos", "parts": {}}
    result["parts"][name] = found
    result["kills"] = result["parts"].get("kills", {}).get("kills", 0)
    RECORD.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
