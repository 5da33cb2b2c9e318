"""A side of the step in a process of its own."""

import pytest
import torch

from dit_fast.benchmarks.step_process import CPU, SideProcess
from dit_fast.benchmarks.step_sides import OURS, Side, StepCase
from dit_fast.errors import ConfigError

CASE = StepCase("SiT-Nano/2", 2, "fp32", input_size=8)


def test_a_side_runs_there_and_says_what_it_measured():
    side = SideProcess(CASE, ("optimizer.weight_decay=0.1",), True, OURS)
    try:
        side.first()
        assert side.run(0) is None
        assert side.has_parts
        assert list(side.parts(1, CPU)) == ["forward", "backward", "update"]
        assert side.peak(torch.device("cpu")) > 0
    finally:
        side.close()
    assert not side._process.is_alive()


def test_what_cannot_run_there_is_raised_here():
    with pytest.raises(ConfigError, match=r"unknown configuration key 'engine\.compil'"):
        SideProcess(CASE, ("engine.compil=true",), True, OURS)


@pytest.mark.parametrize("given", [torch.tensor(float("nan")), (torch.ones(2), torch.tensor([1.0, float("inf")]))])
def test_a_step_that_is_not_finite_is_not_measured(given):
    """Its update would be left out, and with it a part of the time."""
    with pytest.raises(ArithmeticError, match="NaN or infinity"):
        Side(lambda step: given).first()
