"""Break the kernels on purpose and see which gate notices: the measure of the gates in docs/kernel-proofs.md.

    python -m tests.ops.mutants                      every mutant; writes tests/ops/mutants.json
    python -m tests.ops.mutants --only adaln "gelu: tail"     those of a family, or one by its name, added to the record
    python -m tests.ops.mutants --missing            those that the record does not have, or has of an earlier source
    python -m tests.ops.mutants --table              the table of the record

A mutant is one change of one text. It is made in a copy of the checkout, where the gates that could see it run from the
cheapest to the dearest, each on its narrowest tests, until one fails: that gate has killed it. So a gate's count says
what it found first. A mutant of the lists in seeds/ whose text is no longer there is an error: write it anew.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.ops.install_triton import EXECUTED, VERSIONS, folder
from tests.ops.test_semantics import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
RECORD = HERE / "mutants.json"
NEWEST = list(VERSIONS)[-1]


class Mutant(NamedTuple):
    """One change of one text. `gates` in the order in which they are tried, each with what selects its tests."""

    name: str
    family: str
    file: str
    text: str
    mutated: str
    gates: tuple[str, ...]
    equivalent: str = ""  # why nothing can see it, where that is so

    def source(self, root: Path = ROOT) -> str:
        """The file with the change. Raises ValueError if the text is not there exactly once."""
        source = (root / self.file).read_text()
        if source.count(self.text) != 1:
            raise ValueError(f"{self.name}: {self.file} has {source.count(self.text)} times, not once: {self.text!r}")
        return source.replace(self.text, self.mutated)

    def digest(self, root: Path = ROOT) -> str:
        """Of the file with the change: what a record of it is of."""
        return hashlib.sha256(self.source(root).encode()).hexdigest()[:12]


def mutants() -> list[Mutant]:
    """Those of seeds/*.json: per file of that folder one family, with its gates by default."""
    found = []
    for path in sorted(HERE.glob("seeds/*.json")):
        family = json.loads(path.read_text())
        for each in family["mutants"]:
            gates = tuple(each.pop("gates", ())) or tuple(family["gates"])
            found.append(Mutant(family=path.stem, gates=gates, **each))
    return found


LIMIT = 300  # seconds of a processor for a selection: what a mutant overwrites may let a loop never end
# Tests in a process that is forked from one in which the large imports are done, and so starts at once.
SERVER = """
import gc, json, os, resource, sys
import hypothesis, numpy, pytest, torch, triton.language
import torch._inductor  # torch.use_deterministic_algorithms imports it
{imports}
gc.freeze()
for line in sys.stdin:
    root, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(root)
        sys.path.insert(0, root)
        said = os.open(".said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(said, stream)
        resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
        os._exit({run}(arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


# Builds the C++ library of a checkout, with what other mutants leave as it is kept from before.
BUILD = """
import hashlib, pathlib, re, shutil, sys
sys.path[0] = "dit_fast/_C"
import build
build.FLAGS[1] = "-O1"
run = build._run

def texts(path, seen):
    if path.exists() and path not in seen:
        seen[path] = path.read_text()
        for name in re.findall('"([a-z_]+[.](?:h|inc))"', seen[path]):
            texts(path.parent / name, seen)
    return seen

def kept(command):
    if "-c" not in command:
        return run(command)
    source, target = (pathlib.Path(command[command.index(option) + 1]) for option in ("-c", "-o"))
    found = texts(source, {})
    if any("DIT_FAST_SOURCE_HASH" in text for text in found.values()):
        return run(command)
    place = pathlib.Path(".objects", hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest())
    if not place.exists():
        run(command)
        place.parent.mkdir(exist_ok=True)
        shutil.copy(target, place)
    shutil.copy(place, target)

build._run = kept
build.build()
"""


MANY = """
import sys
from tests.ops import aot
sys.exit(bool(aot.compile_all(sys.argv[2:], sys.argv[1:2], ["3.9.0"])[1]))
"""
SOME = """
import importlib, sys
from tests.ops import aot
module = importlib.import_module(f"dit_fast.kernels.{sys.argv[1]}")
cases = [(case, arch) for arch in aot.TARGETS for case in module.aot_cases(arch) if sys.argv[2] in case.configuration]
entries = aot.compile_cases(cases)
sys.exit(any(aot.gate(entry, case) for entry, (case, _) in zip(entries, cases)) or not cases)
"""


@cache
def _server(version: str, imports: str, run: str, interpret: bool) -> subprocess.Popen:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    inherited |= {"PROVE": "all", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder(version))} | (
        {"TRITON_INTERPRET": "1"} if interpret else {}
    )
    code = SERVER.format(imports=imports, run=run, seconds=LIMIT)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=inherited
    )


def _failing(server: subprocess.Popen, root: Path, selection: Sequence[str]) -> str:
    """The first test of a selection that fails in a checkout; "" if all pass. Raises RuntimeError if there is none."""
    failed = root / ".failed/v/cache/lastfailed"
    failed.unlink(missing_ok=True)
    arguments = ["-vv", "-x", "-o", "cache_dir=.failed", "-p", "no:xdist", *selection]
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps([str(root), arguments]) + "\n")
    server.stdin.flush()
    code = int(server.stdout.readline())
    if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest {' '.join(selection)}: selects no test")
    if code and not failed.exists():  # it crashed, or took too long
        return re.findall(r"^(tests/\S+::\w+(?:\[.*?\])?)(?= |$)", (root / ".said").read_text(), re.M)[-1]
    return next(iter(json.loads(failed.read_text()))) if code else ""


def _plain(root: Path, *selection: str) -> str:
    return _failing(_server(NEWEST, "", "pytest.main", False), root, selection)


def _file(family: str) -> str:
    return f"tests/ops/interpreted/test_{family}_kernels.py"


def rules(root: Path, _: str, selection: str) -> str:
    return _plain(root, "tests/ops/test_kernel_rules.py", "-k", "test_rule")


def interpreter(root: Path, family: str, selection: str) -> str:
    """selection: of pytest's -k, of the family's tests, or FILE: selection of another family's."""
    return _failing(_server(NEWEST, "", "pytest.main", True), root, _chosen(family, selection))


def semantics(root: Path, family: str, selection: str) -> str:
    chosen = _chosen(family, selection)
    if "-k" in chosen:
        chosen[-1] = f"({chosen[-1]}) and not opcheck"
    server = _server(EXECUTED, "import ttsem.sanitize", "ttsem.sanitize.run_pytest", False)
    return _failing(server, root, [*OPTIONS, *chosen])


def _chosen(family: str, selection: str) -> list[str]:
    if selection.startswith("tests/"):  # what failed
        return [selection]
    if ": " in selection:
        family, selection = selection.split(": ")
    return [_file(family), *(["-k", selection] if selection else [])]


def machine_code(root: Path, family: str, selection: str) -> str:
    """selection: a script of launched/ and kernel files; or FILE: part of the names of configurations, launches unseen.

    Reasons of the gates alone: that the code is not the lock's says nothing against it.
    """
    file, colon, part = selection.partition(": ")
    code, given = (MANY, file.split()) if not colon else (SOME, [file, part])
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"PYTHONPATH": str(folder(NEWEST)), "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", code, *given]
        return selection if subprocess.run(command, cwd=root, env=environment, capture_output=True).returncode else ""


def ticket_order(root: Path, family: str, selection: str) -> str:
    return _plain(root, "tests/ops/test_aot.py", "-k", f"ticket_stands and {NEWEST}")


def fake_cuda(root: Path, family: str, selection: str) -> str:
    """selection: the beginning of names of cases."""
    command = [sys.executable, "-m", "tests.ops.fake_cuda", "--gpu", "90", "--version", NEWEST, "--only", selection]
    return selection if subprocess.run(command, cwd=root, capture_output=True).returncode else ""


def compiled_cpp(root: Path, family: str, selection: str) -> str:
    """selection: a file of tests/ops and what of it. Builds the library first; a build that fails has noticed too."""
    library = root / "dit_fast/_C/libdit_fast_cpu.so"
    library.unlink(missing_ok=True)
    if subprocess.run([sys.executable, "-c", BUILD], cwd=root, capture_output=True).returncode or not library.exists():
        return selection
    return cpu(root, family, selection)


def cpu(root: Path, family: str, selection: str) -> str:
    """selection: a file of tests/ and, after a colon, what of it."""
    if selection.startswith("tests/"):  # what failed
        return _plain(root, selection)
    file, _, chosen = selection.partition(": ")
    return _plain(root, f"tests/{file}", *(["-k", chosen] if chosen else []))


# Each takes a checkout, a family and a selection, and returns what fails, a selection too; "" if nothing does.
GATES: dict[str, Callable[[Path, str, str], str]] = {
    "rules": rules,
    "interpreter": interpreter,
    "semantics": semantics,
    "machine code": machine_code,
    "ticket order": ticket_order,
    "fake CUDA": fake_cuda,
    "C++": compiled_cpp,
    "CPU tests": cpu,
}


def copy(target: Path) -> None:
    """The checkout's files that git knows or would add, with its libraries and Triton versions."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists() or (ROOT / name).is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    for library in (ROOT / "dit_fast/_C").glob("*.so"):
        shutil.copy2(library, target / "dit_fast/_C")
    for place in (".cache", ".venv"):
        if (ROOT / place).exists():
            (target / place).symlink_to(ROOT / place)


def killer(mutant: Mutant, root: Path) -> str | None:
    """The gate that fails first on the mutant, made in a copy of the checkout and taken back; None if it survives.

    Raises RuntimeError if that gate fails without the mutant too.
    """
    path = root / mutant.file
    before = path.read_text()
    path.write_text(mutant.source(root))
    try:
        for gate in mutant.gates:
            name, _, selection = gate.partition(": ")
            if failed := GATES[name](root, mutant.family, selection):
                path.write_text(before)
                if not _stands(name, root, mutant.family, failed):
                    raise RuntimeError(f"{name}: {failed} fails without a mutant too")
                return name
        return None
    finally:
        path.write_text(before)


@cache
def _stands(gate: str, root: Path, family: str, selection: str) -> bool:
    """Whether a gate passes as things are."""
    return not GATES[gate](root, family, selection)


def run(chosen: Sequence[Mutant]) -> Iterator[tuple[Mutant, str, str | None]]:
    """Each mutant, its digest and the gate that killed it; one whose gate is broken is named on stderr instead."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "copy"
        root.mkdir()
        copy(root)
        for mutant in chosen:
            try:
                yield mutant, mutant.digest(root), None if mutant.equivalent else killer(mutant, root)
            except (RuntimeError, ValueError) as error:
                print(f"{mutant.family}: {mutant.name}: {error}", file=sys.stderr, flush=True)


def record(mutant: Mutant, digest: str, killed_by: str | None) -> None:
    """Adds it to the file, where another process may write too, and leaves out mutants that are no more."""
    entries = {(entry["family"], entry["name"]): entry for entry in json.loads(RECORD.read_text())}
    entry = {"family": mutant.family, "name": mutant.name, "file": mutant.file, "source": digest}
    entry["killed_by"] = killed_by
    entries[mutant.family, mutant.name] = entry | ({"equivalent": mutant.equivalent} if mutant.equivalent else {})
    known = ((each.family, each.name) for each in mutants())
    lines = ",\n".join(json.dumps(entries[key]) for key in known if key in entries)
    partial = RECORD.with_suffix(f".{os.getpid()}")
    partial.write_text(f"[\n{lines}\n]\n")
    partial.rename(RECORD)


def table(entries: Sequence[dict]) -> str:
    """Markdown: a row per family with what each gate killed first."""
    gates = [name for name in GATES if any(entry["killed_by"] == name for entry in entries)]
    lines = [
        f"| family | mutants | equivalent | killed | {' | '.join(gates)} |",
        "|---|" + "---:|" * (3 + len(gates)),
    ]
    for family in [*sorted({entry["family"] for entry in entries}), "all"]:
        own = [entry for entry in entries if family in (entry["family"], "all")]
        same = sum("equivalent" in entry for entry in own)
        first = Counter(entry["killed_by"] for entry in own if entry["killed_by"])
        killed, real = first.total(), len(own) - same
        cells = [str(first[gate] or "") for gate in gates]
        lines.append(
            f"| {family} | {len(own)} | {same} | {killed}, {100 * killed / real:.0f} % | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def survivors(entries: Sequence[dict]) -> list[str]:
    return [
        f"{entry['family']}: {entry['name']}"
        for entry in entries
        if not entry["killed_by"] and "equivalent" not in entry
    ]


def missing(entries: Sequence[dict]) -> list[Mutant]:
    """Mutants that the record does not have, or has of an earlier source."""
    recorded = {(entry["family"], entry["name"], entry.get("source")) for entry in entries}
    return [mutant for mutant in mutants() if (mutant.family, mutant.name, mutant.digest()) not in recorded]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", metavar="NAME", help="families, or mutants by name")
    parser.add_argument("--missing", action="store_true", help="of these, those not recorded of the present source")
    parser.add_argument("--table", action="store_true", help="print the table of the record")
    arguments = parser.parse_args()
    chosen = [m for m in mutants() if not arguments.only or {m.family, m.name} & set(arguments.only)]
    if arguments.missing:
        left = missing(json.loads(RECORD.read_text()))
        chosen = [mutant for mutant in chosen if mutant in left]
    for mutant, digest, killed_by in run([] if arguments.table else chosen):
        print(f"{mutant.family}: {mutant.name}: {killed_by or mutant.equivalent or 'SURVIVES'}", flush=True)
        record(mutant, digest, killed_by)
    entries = json.loads(RECORD.read_text())
    print(table(entries))
    unseen = [f"survives: {name}" for name in survivors(entries)]
    unseen += [f"not recorded: {each.family}: {each.name}" for each in missing(entries)]
    print("\n".join(unseen))
    return bool(unseen)


if __name__ == "__main__":
    sys.exit(main())
