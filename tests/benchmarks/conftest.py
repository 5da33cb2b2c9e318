"""The harness on tiny shapes, behind a gate that a test opens or closes."""

import pytest
import torch

from dit_fast.benchmarks import run
from dit_fast.benchmarks.cases.case import Setting
from dit_fast.benchmarks.gate import Verdict


@pytest.fixture(scope="session")
def small():
    return Setting(torch.device("cpu"), small=True)


@pytest.fixture(scope="module")
def open_gate():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_tests", lambda op, tests: Verdict(tuple(tests), 3, 1, 0.5))
        yield
