"""Costs of work whose cost is known."""

import pytest
import torch

from dit_fast.benchmarks.cost import host_waits, peak_memory, traffic
from dit_fast.ops import diversity_loss

CPU = torch.device("cpu")
MB = 1 << 20


def test_peak_memory_is_what_lives_at_once():
    def work():
        first = torch.ones(MB, dtype=torch.uint8)
        second = first + 1
        del first
        return second.view(-1)[: MB // 2].clone()

    assert peak_memory(work, CPU) == pytest.approx(2 * MB, rel=0.01)


def test_traffic_counts_reads_and_writes_but_no_views():
    x = torch.ones(256, 1024)
    assert traffic(lambda: x.view(1024, 256).T) == 0
    assert traffic(lambda: x + x.T.reshape(256, 1024)) == 5 * MB  # copy: read, write; sum: read two, write
    assert traffic(lambda: torch.ones(1).expand(MB)) == 4


def test_traffic_of_an_operator_of_our_own_is_unknown():
    features = [torch.ones(2, 3, 4) for _ in range(2)]
    assert traffic(lambda: diversity_loss(features)) is None
    assert traffic(lambda: diversity_loss(features, backend="torch")) > 0


def test_every_value_that_python_reads_is_a_wait():
    x = torch.ones(3)
    assert host_waits(lambda: (x.sum().item(), bool(x.any()), x + 1), CPU) == 2
    assert host_waits(lambda: diversity_loss([x.view(1, 1, 3), x.view(1, 1, 3)]), CPU) == 0
