"""What a training loss may do under ZeRO and DDP: every case in each equals a plain loop, or is refused.

The cases and the loop are in `zero_patterns.py`; one start of one rank and one of two run all cells. Here a part of
the grid, the whole is `long`. `python -m tests.train.test_zero_contract` runs the whole and records it, and prints the
table of docs/training.md; with names of cases or columns ("mean flow", "DDP") it records these anew and leaves the
others.
"""

import json
import random
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dit_fast.benchmarks.results import environment
from tests.helpers.engines import run_engines
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.toy_runs import ROOT
from tests.train.zero_patterns import CASES, PATTERNS, REALS

pytestmark = pytest.mark.launch
STAGES = (0, 1, 2, 3)
COLUMNS = {"one process": [None], "DDP": ["ddp"], "stage 0": [0], "stages 1, 2": [1, 2], "stage 3": [3]}
RECORD, PAGE = ROOT / "benchmarks/results/cpu/zero_contract.json", ROOT / "docs/training.md"

# Of weights, averages and what methods hold, and of moments. In bf16 weights that differ by a bit of float32 round to
# other numbers after the first update, and DeepSpeed's linear function of stage 3 rounds elsewhere.
TOLERANCE = {"fp32": (1e-6, 2e-5), "bf16": (2e-3, 5e-2)}


def cell(case, stage, precision="fp32", micro_batches=4, **options):
    """stage None: one process without DeepSpeed; "ddp": DistributedDataParallel."""
    stages = {} if stage is None else {"engine": "ddp"} if stage == "ddp" else {"stage": stage}
    name = f"{case}, stage {stage}, {precision}, {micro_batches}{', overlap' if options else ''}"
    return {"name": name, "case": case, "precision": precision, "micro_batches": micro_batches, **stages, **options}


def grid(*stages):
    return [cell(case, s, precision, n) for s in stages for case in CASES for precision in TOLERANCE for n in (1, 4)]


def whole(ranks):
    if ranks == 1:
        return distinct([*grid(None, *STAGES), *part(1), *grid("ddp")])
    return distinct([*grid(*STAGES), *part(2), *grid("ddp"), cell("unused in some micro-batches", 3, overlap=True)])


def part(ranks):
    """Each guard of the engines has a cell here that fails without it; and a few more, drawn.

    One rank: those without DeepSpeed come before and after stage 3, which once replaced torch's linear function.
    """
    drawn = random.Random(ranks).sample(grid(*STAGES), 4)
    if ranks == 1:
        plain = [cell(case, None) for case in ("nothing else", "unused in some steps", "own backward", "groups")]
        return distinct([*plain, *drawn, cell("nothing else", 3), cell("forward mode", None), cell("mean flow", None)])
    often = ("nothing else", "unused in some micro-batches", "depth by micro-batch")  # stage 3 costs the most
    cells = [cell(case, 3, micro_batches=4 if case in often else 1) for case in PATTERNS]
    cells += [cell(case, 3 - i % 3, micro_batches=1 if i % 3 == 0 else 4) for i, case in enumerate(REALS)]
    cells += [cell(case, stage) for stage in (0, 1, 2) for case in ("gradient clipped", "groups")]
    cells += [cell(case, 0) for case in ("unused in some steps", "unused on some ranks")]
    cells += [cell(case, 1) for case in ("unused on some ranks", "forward mode", "second derivative")]
    cells += [cell("unused in some micro-batches", stage, overlap=True) for stage in (1, 2)]
    cells += [cell(case, "ddp") for case in (*often[:2], "unused on some ranks", "own backward", "DiverseDiT, global")]
    return distinct([*cells, *drawn])


def distinct(cells):
    return list({each["name"]: each for each in cells}.values())


def without_absent(cells):
    """What the packages here can run."""
    return [each for each in cells if each["case"] != "REPA-E" or find_spec("diffusers")]


def refusal(ranks, case, stage):
    """Of the error that ends a cell, or None where it must run."""
    if case == "own backward":
        return "ran a backward of its own"
    if stage == 3 and CASES[case].functional:
        return "engine.zero_stage=3 cannot run '"
    if ranks == 2 and case == "unused on some ranks":
        return "is used on some ranks only"
    if ranks == 2 and case == "batch norm":
        return "'norm.running_mean' is not the same on all ranks"
    return None


def check(ranks, cells, results):
    for each in cells:
        found, expected = results[each["name"]], refusal(ranks, each["case"], each.get("stage"))
        if expected is not None:
            assert expected in found.get("refused", "nothing"), each["name"]
        else:
            assert "differences" in found, (each["name"], found)
            state, moments = TOLERANCE[each["precision"]]
            for kind, difference in found["differences"].items():
                assert difference <= (moments if kind.startswith("exp") else state), (each["name"], found)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contract")
    return {
        ranks: run_engines(folder / f"{ranks}.json", folder, without_absent(part(ranks)), ranks) for ranks in (1, 2)
    }


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_every_stage_equals_a_plain_loop_or_is_refused(results, case, ranks):
    if case == "REPA-E":
        pytest.importorskip("diffusers")
    check(ranks, [each for each in part(ranks) if each["case"] == case], results[ranks])


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_whole_grid(tmp_path, ranks):
    cells = without_absent(whole(ranks))
    check(ranks, cells, run_engines(tmp_path / "out.json", tmp_path, cells, ranks, timeout=2900))


def test_the_documented_table_is_the_recorded_one():
    assert table(json.loads(RECORD.read_text())) in PAGE.read_text()


def table(record):
    """Markdown, of what was recorded."""
    lines = [f"| case | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    cells = [dict(zip(record["columns"], row, strict=True)) for row in record["cells"]]
    for case in CASES:
        words = []
        for stages in COLUMNS.values():
            mine = [each for each in cells if each["case"] == case and each["stage"] in stages]
            assert mine, f"'{case}' is not recorded"
            refused = {each["ranks"] for each in mine if each["refused"]}
            words.append("equal" if not refused else "refused" if 1 in refused else "refused with 2 ranks")
        lines.append(f"| {case} | {' | '.join(words)} |")
    return "\n".join(lines)


def main(*names):
    """Of each cell the largest difference of a state (weights, averages, what methods hold) and of a moment."""
    where, cells, record = environment(torch.device("cpu")), [], json.loads(RECORD.read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for ranks in (1, 2):
            chosen = [each for each in whole(ranks) if not names or named(each, names)]
            found = run_engines(folder / f"{ranks}.json", folder, chosen, ranks, timeout=2900)
            check(ranks, chosen, found)
            for each in chosen:
                facts = {key: each.get(key) for key in ("case", "stage", "precision", "micro_batches", "overlap")}
                facts["stage"] = each.get("engine", facts["stage"])
                cells.append({"ranks": ranks, **facts, **largest(found[each["name"]])})
    if names:
        others = [dict(zip(record["columns"], row, strict=True)) for row in record["cells"]]
        cells = [*(each for each in others if not named(each, names)), *cells]
    where["versions"]["deepspeed"] = version("deepspeed")
    of = {
        precision: {
            kind: max(each[kind] for each in cells if each["precision"] == precision and not each["refused"])
            for kind in ("state", "moments")
        }
        for precision in TOLERANCE
    }
    head = {"contract": "zero", **where, "command": "python -m tests.train.test_zero_contract", "largest": of}
    text = json.dumps({**head, "columns": list(cells[0])}, indent=1).removesuffix("\n}")
    rows = ",\n".join(f"  {json.dumps(list(each.values()))}" for each in cells)
    RECORD.write_text(f'{text},\n "cells": [\n{rows}\n ]\n}}\n')
    print(table(json.loads(RECORD.read_text())), of, sep="\n")


def named(each, names):
    """Whether a cell, as it is listed or recorded, is of a case or a column of these."""
    stage = each.get("engine", each.get("stage"))
    return each["case"] in names or any(stage in COLUMNS[name] for name in COLUMNS if name in names)


def largest(result):
    found = result.get("differences", {})
    state, moments = (
        max((float(f"{x:.1e}") for kind, x in found.items() if kind.startswith("exp") is moment), default=None)
        for moment in (False, True)
    )
    return {"state": state, "moments": moments, "refused": result.get("refused")}


if __name__ == "__main__":
    main(*sys.argv[1:])
