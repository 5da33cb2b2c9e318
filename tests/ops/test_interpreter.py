"""Run tests/ops/interpreted under each Triton version's interpreter, one process per family and version: in `make
test-long`, for the same tests run on the IR that is compiled (test_semantics.py). Here, those that cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.install_triton import VERSIONS, folder
from tests.ops.proofs import FAMILIES, OP_TESTS, op_tests, skip_if_all_are_proved, skip_if_proved

FOLDER = Path(__file__).with_name("interpreted")
GPU_MACHINES = "3.6.0"
# opcheck makes meta tensors, which ttsem's pretence of CUDA tensors does not know; the CPU's autocast knows none of it.
NOT_EXECUTED = "opcheck or as_trained"


def run_interpreted(version: str, *selection: str | Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(folder(version)), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *selection]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[2])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compute_what_they_should(family, version):
    skip_if_proved(family)
    run_interpreted(version, FOLDER / f"test_{family}_kernels.py")


def test_ops_that_are_called_again():
    run_interpreted("3.9.0", FOLDER / "test_traces.py")


@pytest.mark.kernels
def test_what_only_an_interpreter_can_run():
    skip_if_all_are_proved()
    rounded = "below_the_norm_floor"  # quotients that are two roundings off: approximate_division of the interpreter
    run_interpreted(GPU_MACHINES, FOLDER, "-k", f"{NOT_EXECUTED} or {rounded}")


@pytest.mark.kernels
@pytest.mark.parametrize("family", OP_TESTS)
def test_ops_through_the_kernels(family):
    """The glue around the kernels is the same for every version, so one is enough."""
    skip_if_proved(family)
    run_interpreted("3.9.0", *(path for path in op_tests(family) if path.suffix == ".py"), "-k", "triton")
