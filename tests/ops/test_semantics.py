"""Run tests/ops/interpreted on the IR that Triton compiles: the casts that ship, bounds, races (semantics.py)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.install_triton import EXECUTED, folder
from tests.ops.proofs import FAMILIES, skip_if_proved
from tests.ops.test_interpreter import GPU_MACHINES, NOT_EXECUTED, run_interpreted

HERE = Path(__file__).parent
START = "import sys; from ttsem.sanitize import run_pytest; sys.exit(run_pytest(sys.argv[1:]))"
OPTIONS = ["-p", "tests.ops.semantics", "-p", "no:xdist", "-k", f"not ({NOT_EXECUTED})"]
pytestmark = pytest.mark.kernels


def run_executed(*selection: str | Path) -> subprocess.CompletedProcess:
    try:
        place = folder(EXECUTED)
    except subprocess.CalledProcessError:
        if os.environ.get("CI"):
            raise
        pytest.skip(
            f"gate semantics: Triton {EXECUTED} or ttsem cannot be installed for Python {sys.version.split()[0]}"
        )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-c", START, "-p", "no:cacheprovider", *OPTIONS, *map(str, selection)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_compiled_computes_what_it_should(family):
    skip_if_proved(family)
    file = HERE / f"interpreted/test_{family}_kernels.py"
    try:
        result = run_executed(file)
    except pytest.skip.Exception:
        run_interpreted(GPU_MACHINES, file)  # the numbers at least
        raise
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " skipped" not in result.stdout
    assert "too large to be checked for races" not in result.stdout + result.stderr


FAULTS = """
import torch
import triton
import triton.language as tl
from dit_fast.kernels.tables import address_table
from dit_fast.kernels.rows import store_rounded


@triton.jit
def double(addresses, out, count, BLOCK: tl.constexpr, RACE: tl.constexpr):
    element = (0 if RACE else tl.program_id(0).to(tl.int64) * BLOCK) + tl.arange(0, BLOCK)
    x = tl.load(tl.load(addresses).to(tl.pointer_type(tl.float32)) + element)
    store_rounded(out + element, 2 * x + tl.program_id(0), element < count, False)


def run(count, race):
    x, out = torch.full((count,), 1 + 3 * 2.0**-9), torch.empty(count, dtype=torch.bfloat16)
    double[(2,)](address_table([x])[0], out, count, BLOCK=8, RACE=race, enable_fp_fusion=True)
    return out


def test_rounded():
    assert (run(16, False) == torch.tensor(2 + 6 * 2.0**-9).bfloat16()).sum() == 8


def test_bounds():
    run(13, False)


def test_race():
    run(16, True)
"""


def test_the_gate_sees_rounding_bounds_behind_a_table_and_races(tmp_path):
    (tmp_path / "test_faults.py").write_text(FAULTS)
    result = run_executed(tmp_path / "test_faults.py", "-c", "/dev/null", "--rootdir", tmp_path)
    assert "2 failed, 1 passed" in result.stdout, result.stdout + result.stderr
    # Which tensor is the nearest to the fault, and so the words, depends on where they lie.
    assert re.search(r"KernelFault: kernel `double`.* reads \d+ element", result.stdout)
    assert "program instances (0, 0, 0) and (1, 0, 0) both touch element 0 of `out`" in result.stdout
