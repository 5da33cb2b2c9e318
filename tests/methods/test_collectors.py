"""Collectors hand row statistics on to those taps that take them."""

import torch

from dit_fast.methods.base import Collectors
from dit_fast.ops import row_statistics


class Plain:
    def tap(self, x):
        return x.view_as(x)


class Informed:
    def __init__(self):
        self.seen = []

    def tap(self, x, stats=None):
        self.seen.append(stats)
        return x.view_as(x)


def test_statistics_reach_the_taps_that_take_them():
    x, informed = torch.zeros(1, 2, 3), Informed()
    stats = row_statistics(x)
    both = frozenset({0, 1})
    collectors = Collectors({"informed": informed, "plain": Plain()}, {"plain": both, "informed": both})
    for result in (collectors(0, x, stats), collectors(1, x), collectors(2, x, stats)):
        assert torch.equal(result, x)
    assert len(informed.seen) == 2
    assert informed.seen[0] is stats
    assert informed.seen[1] is None
