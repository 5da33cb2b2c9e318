"""Statistics, the order of sides, rotation of inputs, and when a measurement ends."""

import gc
import itertools
import time

import numpy as np
import pytest

from dit_fast.benchmarks.timing import MINIMUM_ROUNDS, HostClock, interleave, sets_to_rotate, summarise
from tests.helpers.cases import loop_over


class FakeClock:
    """Ticks once per mark; parts last as long as the side said."""

    def __init__(self):
        self.ticks = []

    def start(self):
        self.ticks = []

    def mark(self):
        self.ticks.append(0.25)

    def stop(self):
        return self.ticks


@loop_over("count", [1, 2, 5, 50])
def test_median_and_quartiles(count):
    samples = np.random.default_rng(0).exponential(size=count).tolist()
    found = summarise(samples)
    expected = np.percentile(samples, [25, 50, 75])
    assert [found.lower_quartile, found.median, found.upper_quartile] == pytest.approx(expected, rel=1e-12)


def test_no_samples_are_no_summary():
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


def sides(calls, parts=2):
    def side(name):
        def call(number, mark):
            calls.append((name, number))
            for _ in range(parts):
                mark()

        return call

    return {name: side(name) for name in "ABC"}


def test_sides_take_turns_and_inputs_move_on_with_every_call():
    calls = []
    result = interleave(sides(calls), FakeClock(), samples=4, seconds=1e9, warm_up=2)
    assert [name for name, _ in calls] == list("ABC") * 6
    assert [number for _, number in calls] == list(range(18))
    assert result == {name: [[0.25, 0.25]] * 4 for name in "ABC"}


@loop_over(("seconds", "rounds"), [(0, MINIMUM_ROUNDS), (10, MINIMUM_ROUNDS + 10), (1e9, 40)])
def test_time_ends_a_measurement_but_never_before_the_minimum(seconds, rounds):
    now = itertools.count().__next__  # one second per look at the clock, which is taken after the minimum only
    result = interleave(sides([]), FakeClock(), samples=40, seconds=seconds, now=now)
    assert [len(turns) for turns in result.values()] == [rounds] * 3


def test_host_clock_separates_the_parts():
    clock = HostClock()
    clock.start()
    time.sleep(0.02)
    clock.mark()
    clock.mark()
    first, second = clock.stop()
    assert first >= 0.02 > second >= 0


def test_garbage_collection_is_on_again_after_an_error():
    def broken(number, mark):
        raise RuntimeError("side")

    with pytest.raises(RuntimeError, match="side"):
        interleave({"A": broken}, FakeClock(), samples=1, seconds=1)
    assert gc.isenabled()


@loop_over(("each", "cache", "count"), [(100, 10, 2), (100, 100, 4), (30, 100, 14), (0, 8, 32)])
def test_enough_sets_to_leave_the_cache(each, cache, count):
    assert sets_to_rotate(each, cache) == count
    assert count == 2 or count * max(each, 1) >= 4 * cache
