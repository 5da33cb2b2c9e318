"""Compile every kernel and shipped configuration for GPUs that are not here, and read the machine code.

    python -m tests.ops.aot                     compile, print what differs from tests/ops/aot_lock.json
    python -m tests.ops.aot --write             compile and write the lock
    python -m tests.ops.aot --only long_skip    the kernels of these files alone (also with --write)

Each Triton version runs in a process of its own from .cache/triton-<version> (see install_triton.py); one process may
not hold two. docs/kernel-proofs.md explains the gates.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.ops.install_triton import VERSIONS, folder

ROOT = Path(__file__).resolve().parents[2]
LOCK = Path(__file__).with_name("aot_lock.json")
SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes one block can have
TARGETS = tuple(SHARED_LIMIT)
_DIALECTS = {80: "SM80", 90: "SM90a"}  # what nvdisasm calls the code that Triton makes for them
_INSTRUCTION_BYTES = 16
Types = dict[str, str]  # of the numbers among a kernel's arguments

# Machine instructions that the gates and a reader of the lock's diff care about.
_INSTRUCTIONS = {
    "tensor_core_warp": r"\bHMMA\.",
    "tensor_core_warpgroup": r"\bHGMMA\.",
    "register_operand": r"\bHGMMA\.[\w.]+ R\d+, R\d+,",  # the accumulator, then the left operand
    "load_128": r"\b(?:LDG|LDGSTS)\.[\w.]*\b128\b",
    "load_64": r"\b(?:LDG|LDGSTS)\.[\w.]*\b64\b",
    "load_16": r"\bLDG\.[\w.]*\b[US]16\b",
    "store_128": r"\bSTG\.[\w.]*\b128\b",
    "store_16": r"\bSTG\.[\w.]*\b[US]16\b",
    "bulk_load": r"\bUTMALDG\b",
    "atomic": r"\b(?:ATOM|ATOMG|RED)\.",
    "atomic_float": r"\b(?:ATOM|ATOMG|RED)\.[\w.]*(?:F16|BF16|F32|F64)",
    "local_memory": r"\b(?:LDL|STL)\b",
}


def kernel_files() -> dict[str, Path]:
    """The kernel files with ahead-of-time cases by their names below dit_fast.kernels."""
    files = {path: path.relative_to(ROOT / "kernels").with_suffix("") for path in (ROOT / "kernels").rglob("*.py")}
    return {".".join(place.parts): path for path, place in files.items() if "def aot_cases(" in path.read_text()}


def compile_cases(cases: Sequence[tuple[Any, int]]) -> list[dict]:
    """The lock entry of each case for an architecture."""
    compiled = [_compile(case, arch) for case, arch in cases]
    codes: dict[int, list[bytes]] = {}
    for (_, arch), (_, cubin) in zip(cases, compiled, strict=True):
        codes.setdefault(arch, []).append(_code(cubin))
    counts = {arch: iter(_instructions(arch, each)) for arch, each in codes.items()}
    of = [(arch, entry) for (_, arch), (entry, _) in zip(cases, compiled, strict=True)]
    return [{**entry, "instructions": next(counts[arch])} for arch, entry in of]


def _compile(case: Any, arch: int) -> tuple[dict, bytes]:
    """A lock entry without its instructions, and the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for place, name in enumerate(case.kernel.arg_names):
        kind = case.signature.get(name, "constexpr")
        signature[name] = kind
        if kind == "constexpr" or name in case.unaligned:
            continue
        paths = [(place, j) for j in range(len(kind))] if isinstance(kind, tuple) else [(place,)]
        attributes |= {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constants), attrs=attributes)
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        options = {"enable_fp_fusion": True, **case.options}
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    entry = {
        "kernel": f"{case.kernel.fn.__module__.rsplit('.', 1)[-1]}.{case.kernel.__name__}",
        "configuration": f"{case.configuration} "
        + " ".join(f"{name.removeprefix('num_')}={value}" for name, value in sorted(case.options.items())),
        "triton": triton.__version__,
        "target": f"sm_{arch}",
        "registers": _number(r"Used (\d+) registers", log.getvalue()),
        "spill_bytes": _number(r"(\d+) bytes spill stores", log.getvalue())
        + _number(r"(\d+) bytes spill loads", log.getvalue()),
        "stack_bytes": _number(r"(\d+) bytes stack frame", log.getvalue()),
        "shared_bytes": compiled.metadata.shared,
    }
    return entry, compiled.asm["cubin"]


def _number(pattern: str, log: str) -> int:
    (value,) = re.findall(pattern, log)  # one kernel, one line: anything else is a change of ptxas to look at
    return int(value)


def _code(cubin: bytes) -> bytes:
    """The instructions in an ELF file: its sections .text.*"""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<3H", cubin, 0x3A)
    heads = [struct.unpack_from("<2I4Q", cubin, table + size * i) for i in range(count)]  # name, ..., offset, bytes
    strings = heads[names][4]
    return b"".join(
        cubin[start : start + length]
        for name, _, _, _, start, length in heads
        if cubin.startswith(b".text.", strings + name)
    )


def _instructions(arch: int, codes: Sequence[bytes]) -> list[dict[str, int]]:
    """Of each code. One start of nvdisasm reads all of them, for a start takes longer than most compilations."""
    import triton

    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [nvdisasm, "--binary", _DIALECTS[arch], file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = iter([line for line in listing.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)])
    found = []
    for code in codes:
        counts: Counter[str] = Counter()
        for line in itertools.islice(lines, len(code) // _INSTRUCTION_BYTES):
            counts["all"] += 1
            counts.update(name for name, pattern in _INSTRUCTIONS.items() if re.search(pattern, line))
        assert counts["all"] * _INSTRUCTION_BYTES == len(code) > 0, "nvdisasm wrote no line for some instruction"
        found.append(dict(sorted(counts.items())))
    assert next(lines, None) is None, "nvdisasm wrote more lines than there are instructions"
    return found


def gate(entry: dict, case) -> list[str]:
    """Reasons why this machine code may not be shipped."""
    found, arch = Counter(entry["instructions"]), int(entry["target"].removeprefix("sm_"))
    reasons = []
    if entry["spill_bytes"]:
        reasons.append(f"{entry['spill_bytes']} bytes of spills")
    # A spilled kernel can show few registers and no spill, but then it has a stack.
    if entry["stack_bytes"] or found["local_memory"]:
        reasons.append(f"{entry['stack_bytes']} bytes of stack")
    if entry["shared_bytes"] > SHARED_LIMIT[arch]:
        reasons.append(f"{entry['shared_bytes']} bytes of shared memory, the limit is {SHARED_LIMIT[arch]}")
    if case.dots and not found["tensor_core_warp"] + found["tensor_core_warpgroup"]:
        reasons.append("a dot without tensor-core instructions")
    if case.bulk_loads and arch >= 90 and not (found["bulk_load"] and found["tensor_core_warpgroup"]):
        reasons.append("no bulk copies into warp-group tensor-core instructions")
    if found["register_operand"]:  # Triton 3.6 writes these registers anew while products still read them
        reasons.append(f"{found['register_operand']} warp-group products whose left operand is in registers")
    if case.wide_loads and not found["load_128"]:
        reasons.append("no 128-bit loads")
    if case.wide_loads and found["load_16"]:
        reasons.append(f"{found['load_16']} loads of 16 bits")
    if case.wide_stores and (not found["store_128"] or found["store_16"]):
        reasons.append(f"{found['store_128']} stores of 128 bits, {found['store_16']} of 16 bits")
    if found["atomic_float"] or (found["atomic"] and not case.ticket):
        reasons.append("atomic operations, whose order is not defined")
    return [f"{entry['kernel']} [{entry['configuration']}] {entry['target']} {entry['triton']}: {r}" for r in reasons]


def _worker(modules: list[str], scripts: list[str], targets: Sequence[int]) -> None:
    """All entries of the Triton in this process's path, and what is wrong, as JSON on stdout."""
    from tests.ops.launches import uncovered

    imported = [importlib.import_module(f"dit_fast.kernels.{name}") for name in modules]
    cases = [(case, arch) for module in imported for arch in targets for case in module.aot_cases(arch)]
    entries = compile_cases(cases)
    reasons = [line for entry, (case, _) in zip(entries, cases, strict=True) for line in gate(entry, case)]
    reasons += uncovered(scripts)
    json.dump({"entries": entries, "reasons": reasons}, sys.stdout)


def compile_all(
    modules: Sequence[str],
    scripts: Sequence[str],
    versions: Sequence[str] = tuple(VERSIONS),
    targets: Sequence[int] = TARGETS,
) -> tuple[list[dict], list[str]]:
    """Lock entries, sorted, and the reasons of every gate that did not pass; the versions run side by side.

    modules: names of kernel files; scripts: names of files in launched/.
    """
    with tempfile.TemporaryDirectory() as cache:
        workers = []
        for version in versions:
            environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
            environment |= {
                "PYTHONPATH": str(folder(version)),
                "TRITON_CACHE_DIR": f"{cache}/{version}",
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, "-m", "tests.ops.aot", "--worker", "--only", *modules, "--launched", *scripts]
            command += ["--target", *map(str, targets)]
            workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT))
        outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise RuntimeError("a kernel did not compile; the compiler's message is above")
    parsed = [json.loads(output) for output in outputs]
    entries = [entry for each in parsed for entry in each["entries"]]
    return sorted(entries, key=_key), [reason for each in parsed for reason in each["reasons"]]


def _key(entry: dict) -> tuple[str, ...]:
    return tuple(entry[name] for name in ("kernel", "configuration", "triton", "target"))


def differences(entries: list[dict], locked: list[dict]) -> list[str]:
    """One line per entry or field that the lock and the compiled code do not share."""
    ours, theirs = {_key(entry): entry for entry in entries}, {_key(entry): entry for entry in locked}
    lines = [f"{' '.join(key)}: not in the lock" for key in sorted(ours.keys() - theirs.keys())]
    lines += [f"{' '.join(key)}: in the lock, but no longer compiled" for key in sorted(theirs.keys() - ours.keys())]
    for key in sorted(ours.keys() & theirs.keys()):
        changed = [name for name in ours[key] if ours[key][name] != theirs[key].get(name)]
        lines += [f"{' '.join(key)}: {name} {theirs[key].get(name)} -> {ours[key][name]}" for name in changed]
    return lines


def misdeclared(types: Types, cases: Sequence[Types]) -> str:
    """The numbers whose launched type none of these cases has, "" if one has all; a 1 that was compiled in has none."""
    found = []
    for case in cases:
        other = {
            name: f"{name} is {kind}, declared {case.get(name)}"
            for name, kind in types.items()
            if kind not in ("constexpr", case.get(name))
        }
        found.append(", ".join(other.values()))
    return min(found, key=len)


def render(entries: list[dict]) -> str:
    """One entry per line, so that a diff shows what a change of a kernel did to its machine code."""
    return "[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the lock")
    parser.add_argument(
        "--only", nargs="*", metavar="MODULE", choices=sorted(kernel_files()), help="names of kernel files"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--launched", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--target", nargs="*", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _worker(arguments.only, arguments.launched, arguments.target)
        return 0
    scripts = [] if arguments.only else sorted(path.stem for path in LOCK.parent.glob("launched/*.py"))
    entries, reasons = compile_all(arguments.only or sorted(kernel_files()), scripts)
    locked, other = json.loads(LOCK.read_text()), []
    if arguments.only:
        compiled = {entry["kernel"] for entry in entries}  # a file's cases may be of kernels in files beside it
        other = [entry for entry in locked if entry["kernel"] not in compiled]
        locked = [entry for entry in locked if entry["kernel"] in compiled]
    if arguments.write and not reasons:
        LOCK.write_text(render(sorted([*other, *entries], key=_key)))
    lines = reasons + ([] if arguments.write else differences(entries, locked))
    print("\n".join(lines) or f"{len(entries)} compilations pass every gate")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
