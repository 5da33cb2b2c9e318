"""One thread per test process: results and timings then depend neither on the machine nor on xdist's worker count."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Tests that start processes of their own run one at a time: on one worker of `--dist loadgroup`."""
    for item in items:
        if item.get_closest_marker("launch"):
            item.add_marker(pytest.mark.xdist_group("launch"))
