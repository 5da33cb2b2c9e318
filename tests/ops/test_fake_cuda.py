"""CUDA's branches on a fake GPU: every case runs, results are as their fakes promise, what is launched compiles."""

import pytest
import torch

from tests.ops import fake_cuda
from tests.ops.proofs import skip_if_all_are_proved


def test_every_case_runs_and_returns_what_its_fakes_promise():
    if fake_cuda.kept(*PAIRS[0]):
        pytest.skip("these sources ran through each case when it was last compiled")
    check_cases(fake_cuda.run(*PAIRS[0], compiled=False))


def check_cases(found):
    assert not found["reasons"], "\n".join(found["reasons"])
    for name, launches in found["cases"].items():
        if name.startswith("step"):
            assert launches["adaln.modulate_rows"] > 4, (name, launches)


@pytest.mark.parametrize("room", ["dit_fast", "train"])
def test_any_source_or_another_torch_makes_the_cases_run_again(room, tmp_path, monkeypatch):
    """`dit_fast/train` is a link to the latter."""
    source = tmp_path / room / "a.py"
    source.parent.mkdir()
    source.write_text("1")
    monkeypatch.setattr(fake_cuda, "ROOT", tmp_path)
    assert not fake_cuda.kept(90, "3.6.0")
    fake_cuda.keep(90, "3.6.0")
    assert fake_cuda.kept(90, "3.6.0")
    assert not fake_cuda.kept(80, "3.6.0")
    source.write_text("2")
    assert not fake_cuda.kept(90, "3.6.0")
    source.write_text("1")
    monkeypatch.setattr(torch, "__version__", "another")
    assert not fake_cuda.kept(90, "3.6.0")


@pytest.mark.long
def test_every_recipe_in_every_size_launches_what_compiles():
    found = fake_cuda.run(90, "3.6.0", "size")
    assert found["cases"]
    assert not found["reasons"], "\n".join(found["reasons"])


PAIRS = [(90, "3.6.0"), (80, "3.9.0"), (120, "3.6.0"), (90, "3.9.0"), (80, "3.6.0"), (120, "3.9.0")]  # GPU, Triton
FIRST = 1  # of them is compiled by `make test-kernels`, the others by `make test-long`

# Forms that keep 8 bytes or few more on the stack. On sm_120 machine code is neither locked nor tuned; on sm_80 Triton
# 3.6.0's ptxas takes 72 registers and 8 bytes for RMSNorm's form in bf16, in whatever order it is written.
STACK = {
    (120, "3.6.0"): {"long_skip_backward.row_products: ", "qk_norm.gradient: "},
    (120, "3.9.0"): {"long_skip_backward.row_products: ", "qk_norm.gradient: "},
    (80, "3.6.0"): {"adaln_gradients.differentiate_rows: 8 bytes"},
}


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("gpu", "version"),
    [
        pytest.param(*pair, marks=pytest.mark.kernels if place < FIRST else pytest.mark.long)
        for place, pair in enumerate(PAIRS)
    ],
)
def test_what_is_launched_compiles_without_stack_scratch_or_too_much_shared_memory(gpu, version):
    skip_if_all_are_proved()
    found = fake_cuda.run(gpu, version)
    known = [f": {form}" for form in STACK.get((gpu, version), ())]
    reasons = [
        line for line in found["reasons"] if "of stack memory" not in line or not any(form in line for form in known)
    ]
    check_cases(found | {"reasons": reasons})
    fake_cuda.keep(gpu, version)
