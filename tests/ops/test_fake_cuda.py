"""CUDA's branches on a fake GPU: every case runs, results are as their fakes promise, what is launched compiles."""

import os

import pytest

from tests.ops import fake_cuda
from tests.ops.proofs import changed


def test_every_case_runs_and_returns_what_its_fakes_promise():
    found = fake_cuda.run(90, "3.6.0", compiled=False)
    assert not found["reasons"], "\n".join(found["reasons"])
    for name, launches in found["cases"].items():
        if name.startswith("step"):
            assert launches["adaln.modulate_rows"] > 4, (name, launches)


@pytest.mark.long
def test_every_recipe_in_every_size_launches_what_compiles():
    found = fake_cuda.run(90, "3.6.0", "size")
    assert found["cases"]
    assert not found["reasons"], "\n".join(found["reasons"])


PAIRS = [(90, "3.6.0"), (80, "3.9.0"), (120, "3.6.0"), (90, "3.9.0"), (80, "3.6.0"), (120, "3.9.0")]  # GPU, Triton
FIRST = 3  # of them are compiled by `make test-kernels`, the others by `make test-long`

# Forms that keep a few bytes on the stack on sm_120, whose machine code is neither locked nor tuned.
STACK_ON_120 = {"long_skip_backward.row_products", "qk_norm.gradient"}


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("gpu", "version"),
    [
        pytest.param(*pair, marks=pytest.mark.kernels if place < FIRST else pytest.mark.long)
        for place, pair in enumerate(PAIRS)
    ],
)
def test_what_is_launched_compiles_without_stack_scratch_or_too_much_shared_memory(gpu, version):
    if os.environ.get("PROVE") != "all" and not changed():
        pytest.skip("kernels unchanged since their recorded proofs; `make test-kernels` runs it")
    reasons = fake_cuda.run(gpu, version)["reasons"]
    if gpu == 120:
        known = [reason for reason in reasons if any(f": {name}: " in reason for name in STACK_ON_120)]
        reasons = [reason for reason in reasons if reason not in known or "stack memory on sm_120" not in reason]
    assert not reasons, "\n".join(reasons)
