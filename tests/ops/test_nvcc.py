"""The CUDA sources as nvcc compiles them: nothing spills, and every stream is read and written 16 bytes at a time."""

import json

import pytest

from dit_fast._C.build import ARCHITECTURES, cuda_compiler
from tests.ops import nvcc

RECORDED = json.loads(nvcc.LOCK.read_text())


def test_no_kernel_spills_and_streams_move_in_wide_words():
    assert {entry["target"] for entry in RECORDED} == {f"sm_{each}" for each in ARCHITECTURES}
    assert all(entry["spill_bytes"] == entry["stack_bytes"] == 0 for entry in RECORDED)
    updates = [entry for entry in RECORDED if entry["kernel"] == "adamw_cuda.adamw_update"]
    for entry in updates:
        wide = {name: count for name, count in entry["global_memory"].items() if ".v4." in name or ".v2." in name}
        assert sum(count for name, count in wide.items() if name.startswith("ld") and ".v4." in name) >= 5
        assert sum(count for name, count in wide.items() if name.startswith("st")) >= 5
    assert len(updates) == len(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_finds_what_is_recorded(architecture):
    if cuda_compiler() is None:
        pytest.skip("no nvcc here: what it makes of csrc/*.cu is not checked")
    recorded = [entry for entry in RECORDED if entry["target"] == f"sm_{architecture}"]
    if nvcc.release() != recorded[0]["nvcc"]:
        pytest.skip(f"nvcc {nvcc.release()} here, {recorded[0]['nvcc']} recorded in tests/ops/nvcc_lock.json")
    assert nvcc.measure(architecture) == recorded
