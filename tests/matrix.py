"""Every method and every allowed pair, for real: `make matrix`, or python -m tests.matrix [--only A,B ...] [--record].

A cell is a toy run of 20 steps in two processes under ZeRO-1: once undisturbed; again with both processes killed at a
random step, and once more by the same command to the end, which must give equal bits (weights, averages, moments, what
methods keep, logged rows); then samples. A pair that is refused is written down with its reason. The last line is JSON;
--record writes benchmarks/results/cpu/method_matrix.json and the table in docs/methods.md. Beside --only, the cells
recorded before stay; each says of which commit it is.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # cases are forked, and a pool of threads does not survive that

import numpy as np
import torch
from deepspeed.runtime.zero.muon import original_muon as original_muon  # and torch's compiler with it: six CPU seconds
from tqdm import tqdm

from dit_fast.benchmarks.results import RESULTS, environment, write_table
from dit_fast.cli import main as command
from dit_fast.sampling.samples import Samples
from dit_fast.train import zero as zero  # imported once, so that forked ranks start in no time
from tests.helpers.forks import ended, forgiven, fork, launch
from tests.helpers.parts import BACKBONE, PREDICTIONS, add_tokens, cells, settings
from tests.helpers.toy_runs import arguments, make_shards, rows, rows_so_far, tensors, wait_for

STEPS, EVERY, RANKS = 20, 5, 2
PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
RECORD = RESULTS / "cpu" / "method_matrix.json"
BESIDE_BACKBONES = ("diversedit", "repa")


def pairs_that_matter():
    """All cells but pairs with a prediction of flow matching, which differ from `flow` in one line of arithmetic.

    Then each further backbone, alone and beside two methods.
    """
    pairs = [cell for cell in cells() if len(cell) == 1 or not set(cell) & set(PREDICTIONS)]
    return [
        *pairs,
        *((name,) for name in BACKBONE),
        *((other, name) for name in BACKBONE for other in BESIDE_BACKBONES),
    ]


def stages(run):
    """The run folders that one command made."""
    return [run] if (run / "checkpoints").is_dir() else sorted(run.glob("stage*"))


def try_cell(cell, shards, folder, rng):
    """What became of one cell: a row of the result. Raises AssertionError where something is not as it must be."""
    log, calm, killed = folder / "log.txt", folder / "calm", folder / "killed"
    options = [f"run.checkpoint_every={EVERY}", "engine.micro_batch=2", "engine.zero_stage=1"]
    line = lambda run: arguments(shards, run, *settings(cell, STEPS), *options)  # noqa: E731
    codes = forgiven(ended(launch(log, line(calm), RANKS)))
    if codes == [2, 2]:
        reason = re.search(r"dit-fast: error: (.*)", log.read_text())
        assert reason, log.read_text()[-2000:]
        return {"parts": cell, "outcome": "refused", "reason": reason[1]}
    assert codes == [0, 0], f"exit codes {codes}: {log.read_text()[-2000:]}"
    runs = stages(calm)
    victim = rng.choice(runs).relative_to(calm)
    step = rng.randint(2, STEPS - 2)
    children = launch(log, line(killed), RANKS)
    try:
        wait_for(lambda: len(rows_so_far(killed / victim)) >= step)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
    ended(children)
    codes = forgiven(ended(launch(log, line(killed), RANKS)))
    assert codes == [0, 0], f"after the kill at step {step}: exit codes {codes}: {log.read_text()[-2000:]}"
    for run in runs:
        place = run.relative_to(calm)
        assert rows(run) == rows(killed / place), f"after the kill at step {step} of {place}: other rows"
        ours, theirs = tensors(run, STEPS), tensors(killed / place, STEPS)
        different = [name for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])]
        assert not different, f"other bits: {different[:3]}, {len(different)} in all"
        assert ours.keys() == theirs.keys(), "other tensors"
    images = folder / "images.npz"
    drawing = ["sample", str(stages(killed)[-1]), "--per-class", "1", "--num-steps", "4", "--out", str(images)]
    assert ended([fork(log, lambda: command(drawing))]) == [0], log.read_text()[-2000:]
    drawn, logged = Samples.load(images).images, rows(stages(calm)[-1])
    assert np.isfinite([row["loss"] for row in logged]).all(), "losses that are not finite"
    assert drawn.std() > 0, "every pixel drawn is the same"
    return {
        "parts": cell,
        "outcome": "trained",
        "killed_at": {"run": str(victim), "step": step},
        "loss": [logged[0]["loss"], logged[-1]["loss"]],
        "terms": sorted(name for name in logged[-1] if "/" in name),
        "sampler": Samples.load(images).text.split(",")[0],
    }


def table(result):
    """The lower half of the square of parts, backbones below it: yes, no with the number of its reason, or not run."""
    rows = {tuple(row["parts"]): row for row in result["cells"]}
    wanted = pairs_that_matter()
    names = [cell[0] for cell in wanted if len(cell) == 1 and cell != ("flow",)]
    reasons = list(dict.fromkeys(row["reason"] for row in rows.values() if row["outcome"] == "refused"))
    across = [name for name in names if name not in {*PREDICTIONS, *BACKBONE}]

    def mark(cell):
        if cell not in rows:
            return "not run" if cell in wanted else "-"
        return "yes" if rows[cell]["outcome"] == "trained" else f"no ({reasons.index(rows[cell]['reason']) + 1})"

    lines = [f"| | alone | {' | '.join(f'`{name}`' for name in across)} |", "|---" * (len(across) + 2) + "|"]
    for number, name in enumerate(names):
        beside = [mark((other, name)) if names.index(other) < number else "" for other in across]
        lines.append(f"| `{name}` | {' | '.join([mark((name,)), *beside])} |")
    notes = [f"{number}. `{reason}`" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes]).strip()


def kept(result, tried):
    """The cells of an earlier result that were not tried again, in the order of all; each with its commit and seed."""
    of = {key: result[key] for key in ("commit", "dirty", "written", "seed") if key in result}
    return [{**of, **cell} for cell in result["cells"] if tuple(cell["parts"]) not in tried]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="cells, e.g. diversedit,sra flow; default: all")
    parser.add_argument("--count", type=int, help="this many cells, drawn with the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write the result file and the table")
    options = parser.parse_args(arguments)
    chosen = [tuple(text.split(",")) for text in options.only] if options.only else pairs_that_matter()
    if options.count is not None:
        chosen = random.Random(options.seed).sample(chosen, options.count)
    where = environment(torch.device("cpu"))
    where["versions"]["deepspeed"] = zero.deepspeed.__version__
    earlier = json.loads(RECORD.read_text()) if options.record and options.only else {**where, "cells": []}
    if earlier["versions"] != where["versions"]:
        parser.error("the recorded cells are of other versions of torch or the like; record all, without --only")
    folder, done, failed = Path(tempfile.mkdtemp(prefix="matrix-")), [], []
    shards = add_tokens(make_shards(folder), folder)
    for cell in (bar := tqdm(chosen, unit="cell")):
        name = "+".join(cell)
        bar.set_description(name)
        place = folder / name
        place.mkdir()
        try:
            done.append(try_cell(cell, shards, place, random.Random(f"{options.seed} {name}")))
            shutil.rmtree(place)
        except Exception as error:
            failed.append(name)
            again = f"python -m tests.matrix --only {','.join(cell)} --seed {options.seed}"
            print(f"\nFAILED {name}: {error}\nits files: {place}; again: {again}", flush=True)
    written = datetime.now(UTC).isoformat(timespec="seconds")
    of = {"commit": where.pop("commit"), "dirty": where.pop("dirty"), "written": written, "seed": options.seed}
    done = [{**cell, **of} for cell in done]
    if not failed:
        shutil.rmtree(folder)
    if options.record:
        found = {tuple(cell["parts"]): cell for cell in (*kept(earlier, chosen), *done)}
        result = {
            "schema": 1,
            "run": "method_matrix",
            **where,
            "command": "python -m tests.matrix --record",
            "steps": STEPS,
            "processes": RANKS,
            "zero_stage": 1,
            "failed": failed,
            "cells": [found[cell] for cell in pairs_that_matter() if cell in found],
        }
        RECORD.write_text(json.dumps(result, indent=1) + "\n")
        write_table(PAGE, "matrix", table(result))
    outcomes = [row["outcome"] for row in done]
    summary = {
        "seed": options.seed,
        "failed": failed,
        **{kind: outcomes.count(kind) for kind in ("trained", "refused")},
    }
    print(json.dumps(summary))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
