"""The machine code of every kernel, on two Triton versions and two architectures, is what the lock says it is."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.ops import aot
from tests.ops.install_triton import VERSIONS, folder
from tests.ops.proofs import FAMILIES, kernel_modules, skip_if_all_are_proved, skip_if_proved, sources

FIELDS = {"kernel", "configuration", "triton", "target", "registers", "spill_bytes", "stack_bytes", "shared_bytes"}


# Each version and each GPU once; the other pairs in `make test-long`, and whenever `aot --write` writes the lock.
PAIRS = {("3.6.0", 90): pytest.mark.kernels, ("3.9.0", 80): pytest.mark.kernels}
PAIRS |= {("3.6.0", 80): pytest.mark.long, ("3.9.0", 90): pytest.mark.long}


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("version", "arch"), [pytest.param(*pair, marks=mark) for pair, mark in PAIRS.items()])
def test_machine_code_passes_the_gates_equals_the_lock_and_is_what_is_launched(version, arch):
    families = skip_if_all_are_proved()
    modules = [name for family in families for name in kernel_modules(family)]
    entries, reasons = aot.compile_all(modules, families, [version], [arch])
    assert not reasons, "\n".join(reasons)
    compiled, of = {entry["kernel"] for entry in entries}, (version, f"sm_{arch}")
    lock = json.loads(aot.LOCK.read_text())
    locked = [e for e in lock if e["kernel"] in compiled and (e["triton"], e["target"]) == of]
    changed = aot.differences(entries, locked)
    advice = "look at each line, then: python -m tests.ops.aot --write"
    assert not changed, "\n".join([*changed, advice])


ORDER = """
import re, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from dit_fast.kernels import repa_cosine as kernel
case = kernel.aot_cases(90)[0]
signature = {name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names}
source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constants))
for arch in (80, 90):
    options = {"enable_fp_fusion": True, **case.options}
    code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
    steps = re.findall(r"st\\.global|bar\\.sync|atom\\.[\\w.]+|ld\\.global[\\w.]*", code)
    at = next(i for i, step in enumerate(steps) if step.startswith("atom"))
    print(steps[at - 2 :][:6], steps.count("bar.sync"))
    before, after = steps[:at], steps[at + 1 :]
    last_store = max(i for i, step in enumerate(before) if step == "st.global")
    assert "bar.sync" in before[last_store:], "no barrier between the partial sum and the ticket"
    assert steps[at] == "atom.global.gpu.acq_rel.add.u32", steps[at]
    loads = [i for i, step in enumerate(after) if step.startswith("ld.global")]
    assert "bar.sync" in after[: loads[0]], "no barrier between the ticket and the partial sums"
    assert {after[i] for i in loads} == {"ld.global.cg.b32"}
"""


@pytest.mark.kernels
@pytest.mark.parametrize("version", VERSIONS)
def test_the_ticket_stands_between_partial_sums_and_their_readers(version, tmp_path):
    """What no interpreter shows: the order of memory operations in the code that is compiled for a GPU."""
    skip_if_proved("repa_cosine")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"PYTHONPATH": str(folder(version)), "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", ORDER], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


def test_every_kernel_file_and_launch_script_belongs_to_one_family():
    """And a kernel file to one that no change of it leaves proved."""
    modules = [(name, family) for family in FAMILIES for name in kernel_modules(family)]
    assert sorted(name for name, _ in modules) == sorted(aot.kernel_files())
    assert all(aot.kernel_files()[name] in sources(family) for name, family in modules)
    assert sorted(path.stem for path in aot.LOCK.parent.glob("launched/*.py")) == FAMILIES


def test_lock_is_complete_and_sorted():
    entries = json.loads(aot.LOCK.read_text())
    assert entries == sorted(entries, key=aot._key)
    assert all(entry.keys() == FIELDS | {"instructions"} for entry in entries)
    assert {(e["triton"], e["target"]) for e in entries} == {(v, f"sm_{a}") for v in VERSIONS for a in aot.TARGETS}
    sources = {path.stem: path.read_text() for path in (aot.ROOT / "kernels").rglob("*.py")}
    gone = [
        k
        for k in {entry["kernel"] for entry in entries}
        if "def {1}(".format(*k.split(".")) not in sources[k.split(".")[0]]
    ]
    assert not gone
    assert aot.LOCK.read_text() == aot.render(entries)


CLEAN = {
    "kernel": "k",
    "configuration": "c",
    "triton": "3.9.0",
    "target": "sm_80",
    "spill_bytes": 0,
    "stack_bytes": 0,
    "shared_bytes": 166_912,
    "instructions": {"tensor_core_warp": 4, "load_128": 2, "store_128": 1},
}
HOPPER = CLEAN["instructions"] | {"tensor_core_warpgroup": 8, "bulk_load": 16}
STRICT = SimpleNamespace(dots=True, bulk_loads=True, wide_loads=True, wide_stores=True, ticket=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"target": "sm_90", "shared_bytes": 232_448, "instructions": HOPPER}, None),
        ({"target": "sm_90"}, "bulk copies"),
        ({"target": "sm_90", "instructions": HOPPER | {"bulk_load": 0}}, "bulk copies"),
        ({"target": "sm_90", "shared_bytes": 0, "instructions": HOPPER | {"register_operand": 4}}, "left operand"),
        ({"shared_bytes": 166_913}, "shared memory"),
        ({"spill_bytes": 8}, "spills"),
        ({"stack_bytes": 16}, "stack"),
        ({"instructions": CLEAN["instructions"] | {"local_memory": 1}}, "stack"),
        ({"instructions": CLEAN["instructions"] | {"atomic": 1}}, "atomic"),
        ({"instructions": CLEAN["instructions"] | {"load_16": 1}}, "16 bits"),
        ({"instructions": CLEAN["instructions"] | {"tensor_core_warp": 0}}, "tensor-core"),
        ({"instructions": CLEAN["instructions"] | {"load_128": 0}}, "128-bit loads"),
        ({"instructions": CLEAN["instructions"] | {"store_128": 0}}, "stores"),
    ],
)
def test_gate(change, reason):
    found = aot.gate(CLEAN | change, STRICT)
    assert [reason in line for line in found] == ([True] if reason else [])


def test_only_a_ticket_may_be_atomic():
    counter = CLEAN | {"instructions": CLEAN["instructions"] | {"atomic": 1}}
    total = CLEAN | {"instructions": counter["instructions"] | {"atomic_float": 1}}
    ticket = SimpleNamespace(**{**vars(STRICT), "ticket": True})
    assert aot.gate(counter, ticket) == []
    assert len(aot.gate(total, ticket)) == 1


def test_differences_name_entry_and_field():
    other = CLEAN | {"configuration": "d"}
    assert aot.differences([CLEAN], [CLEAN]) == []
    assert "not in the lock" in aot.differences([CLEAN, other], [CLEAN])[0]
    assert "no longer compiled" in aot.differences([CLEAN], [CLEAN, other])[0]
    assert "shared_bytes 166912 -> 3" in aot.differences([CLEAN | {"shared_bytes": 3}], [CLEAN])[0]


def test_a_number_is_launched_with_the_type_that_its_case_declares():
    cases = [{"rows": "i64", "step": "i32"}, {"rows": "i32", "step": "i64"}]
    assert aot.misdeclared({"rows": "i32", "step": "constexpr"}, cases) == ""  # a 1 is compiled in
    assert aot.misdeclared({"rows": "i32", "step": "i32"}, cases[:1]) == "rows is i32, declared i64"
    assert aot.misdeclared({"rows": "i32", "step": "i32"}, cases) != ""


@pytest.mark.parametrize("version", VERSIONS)
def test_the_folder_decides_which_triton_is_proved(version):
    code = "import triton; print(triton.__version__)"
    environment = os.environ | {"PYTHONPATH": str(folder(version))}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == version
