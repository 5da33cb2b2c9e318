"""Run tests/ops/interpreted under each Triton version's interpreter, one process per file and version."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from install_triton import VERSIONS, folder

FOLDER = Path(__file__).with_name("interpreted")


def run_interpreted(version: str, *selection: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(folder(version)), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *selection]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[2])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_kernels_compute_what_they_should(file, version):
    run_interpreted(version, str(FOLDER / file))


def test_published_values_through_the_kernels():
    run_interpreted("3.9.0", str(FOLDER.with_name("test_diversity_native.py")), "-k", "triton")
