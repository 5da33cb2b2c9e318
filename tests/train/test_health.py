"""Which rank is slow, which has stopped: what is said of planted times and signs of life."""

import pytest
import torch

from dit_fast.train.health import DATA, STEP, Beat, Health, Shares, diagnose, listed, told
from dit_fast.world import World


def beat(doing=STEP, collective="", started=7, step=12):
    return Beat(3, step, doing, collective, started)


SUM = "all_reduce of 1000"


@pytest.mark.parametrize(
    ("beats", "silent", "missing", "text"),
    [
        (
            {0: beat(collective=SUM), 1: beat(DATA), 2: beat(collective=SUM)},
            [1],
            [1],
            "rank 1 gives no sign of life (last: step 12, waits for data); ranks 0, 2 wait in all_reduce of 1000",
        ),
        (
            {0: beat(collective=SUM), 1: beat(DATA), 2: beat(collective=SUM)},
            [],
            [1],
            "rank 1 waits for data; ranks 0, 2 wait in all_reduce of 1000",
        ),
        (
            {0: beat(STEP, SUM, 8), 1: beat(STEP, "broadcast of 1", 7), 2: beat(STEP, SUM, 8)},
            [],
            [1],
            "rank 1 waits in broadcast of 1, an earlier collective than the others; ranks 0, 2 wait in " + SUM,
        ),
        ({0: beat(collective=SUM), 1: beat(collective=SUM)}, [], [], "all ranks wait in all_reduce of 1000"),
        ({0: beat(), 1: beat()}, [], [], "no rank is in a collective"),
    ],
)  # fmt: skip
def test_the_rank_that_the_others_wait_for_is_named(beats, silent, missing, text):
    assert diagnose(beats, silent) == (missing, text)


def test_many_ranks_are_short():
    assert listed([3]) == "rank 3"
    assert listed([0, 4, 5, 6, 7, 9]) == "ranks 0, 4-7, 9"


def test_the_slowest_rank_and_what_it_costs():
    shares = Shares()
    times = torch.tensor([[0.0, 0.2, 0.3], [0.3, 0.2, 0.0]])  # data, computing, collectives
    assert shares.columns(times) == {}  # half a second tells little
    row = shares.columns(times)
    assert row == {
        "slowest_rank": 1, "slowest_data": 0.6, "slowest_compute": 0.4, "slowest_collective": 0.0, "waiting": 0.6,
    }  # fmt: skip
    assert told(row) == "slowest rank 1 (data 60.0%, compute 40.0%, collective 0.0%), others wait 60.0%"
    quick = {**row, "slowest_data": 0.1, "waiting": 0.09}
    assert told(quick) == ""
    for name in ("data", "collective"):  # a slow file server or network: no rank is slower than the others
        assert told({**quick, f"slowest_{name}": 0.6}).startswith("slowest rank 1 (")
    assert told({}) == ""


def test_times_fall_into_data_and_the_rest(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 4.0, 9.0, 10.0])
    monkeypatch.setattr("dit_fast.train.health.time.perf_counter", lambda: next(clock))
    health = Health(World(1, 2, torch.device("cpu")), 60)
    with health.doing(DATA):  # 1 to 3
        pass
    with health.doing("saves"):  # 4 to 9: not training
        pass
    assert health.spent().tolist() == [[0, 0, 0], [2, 3, 0]]
