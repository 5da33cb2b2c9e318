"""One thread per test process: results and timings then depend neither on the machine nor on xdist's worker count."""

import functools
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts with &


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files that start processes of their own run one test at a time, on one worker, while the others do the rest."""
    from xdist.scheduler import LoadScopeScheduling

    class Launches(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "launch" if _launches(config.rootpath / nodeid.split("::")[0]) else nodeid

    return Launches(config, log) if config.getvalue("dist") == "load" else None


@functools.cache
def _launches(path: Path) -> bool:
    return "pytest.mark.launch" in path.read_text()
