"""The recorded comparison of REPA-E with a frozen autoencoder, and its table."""

import json

from dit_fast.benchmarks.repa_e import ARMS, LAST, PAGE, SEEDS, table
from dit_fast.benchmarks.results import RESULTS

RUNS = json.loads((RESULTS / "cpu" / "repa_e.json").read_text())["runs"]


def test_the_documented_table_is_the_recorded_one():
    assert table(RUNS) in PAGE.read_text()


def test_reconstruction_and_alignment_are_better_with_every_seed():
    means = {
        (run["seed"], run["arm"], name): sum(run["values"][name][-LAST:])
        for run in RUNS
        for name in ("repa_e/l1", "repa_e/alignment")
    }
    assert len(means) == 2 * len(SEEDS) * len(ARMS)
    assert all(means[seed, "end to end", name] < means[seed, "frozen", name] for seed, arm, name in means)
