"""Break the kernels on purpose and see which gate notices: the measure of the gates in docs/kernel-proofs.md.

    python -m tests.ops.mutants                      every mutant; writes tests/ops/mutants.json
    python -m tests.ops.mutants --only adaln "gelu: tail"     those of a family, or one by its name, added to the record
    python -m tests.ops.mutants --table              the table of the record

A mutant is one change of one text. It is made in a copy of the checkout, where the gates that could see it run from the
cheapest to the dearest, each on its narrowest tests, until one fails: that gate has killed it. So a gate's count says
what it found first. A mutant of the lists in seeds/ whose text is no longer there is an error: write it anew.
"""

import argparse
import json
import os
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


def mutants() -> list[Mutant]:
    """Those of seeds/*.json: per file of that folder one family, with its gates by default."""
    found = []
    for path in sorted(HERE.glob("seeds/*.json")):
        family = json.loads(path.read_text())
        for each in family["mutants"]:
            gates = tuple(each.pop("gates", ())) or tuple(family["gates"])
            found.append(Mutant(family=path.stem, gates=gates, **each))
    return found


# Tests in a process that is forked from one in which the large imports are done, and so starts at once.
SERVER = """
import json, os, sys
import numpy, pytest, torch, triton.language
{imports}
for line in sys.stdin:
    root, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(root)
        sys.path.insert(0, root)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os._exit({run}(arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _server(version: str, imports: str, run: str, interpret: bool) -> subprocess.Popen:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    inherited |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder(version))} | (
        {"TRITON_INTERPRET": "1"} if interpret else {}
    )
    code = SERVER.format(imports=imports, run=run)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=inherited
    )


def _passes(server: subprocess.Popen, root: Path, selection: Sequence[str]) -> bool:
    """Whether a selection of tests passes in a checkout. Raises RuntimeError if it selects none."""
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *selection]
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps([str(root), arguments]) + "\n")
    server.stdin.flush()
    code = int(server.stdout.readline())
    if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest {' '.join(selection)}: selects no test")
    return code == 0


def _plain(root: Path, *selection: str) -> bool:
    return _passes(_server(NEWEST, "", "pytest.main", False), root, selection)


def _file(family: str) -> str:
    return f"tests/ops/interpreted/test_{family}_kernels.py"


def rules(root: Path, _: str, selection: str) -> bool:
    return _plain(root, "tests/ops/test_kernel_rules.py", "-k", "test_rule")


def interpreter(root: Path, family: str, selection: str) -> bool:
    """selection: of pytest's -k, of the family's tests, or FILE: selection of another family's."""
    return _passes(_server(NEWEST, "", "pytest.main", True), root, _chosen(family, selection))


def semantics(root: Path, family: str, selection: str) -> bool:
    chosen = _chosen(family, selection)
    if "-k" in chosen:
        chosen[-1] = f"({chosen[-1]}) and not opcheck"
    server = _server(EXECUTED, "import ttsem.sanitize", "ttsem.sanitize.run_pytest", False)
    return _passes(server, root, [*OPTIONS, *chosen])


def _chosen(family: str, selection: str) -> list[str]:
    if ": " in selection:
        family, selection = selection.split(": ")
    return [_file(family), *(["-k", selection] if selection else [])]


def machine_code(root: Path, family: str, selection: str) -> bool:
    """selection: kernel files. Reasons of the gates alone: that the code is not the lock's says nothing against it."""
    code = (
        "import sys; from tests.ops import aot; "
        "sys.exit(bool(aot.compile_all(sys.argv[2:], sys.argv[1:2], ['3.9.0'])[1]))"
    )
    script = selection.split()[0]
    command = [sys.executable, "-c", code, script, *selection.split()[1:]]
    return subprocess.run(command, cwd=root, capture_output=True).returncode == 0


def ticket_order(root: Path, family: str, selection: str) -> bool:
    return _plain(root, "tests/ops/test_aot.py", "-k", f"ticket_stands and {NEWEST}")


def fake_cuda(root: Path, family: str, selection: str) -> bool:
    """selection: the beginning of names of cases."""
    command = [sys.executable, "-m", "tests.ops.fake_cuda", "--gpu", "90", "--version", NEWEST, "--only", selection]
    return subprocess.run(command, cwd=root, capture_output=True).returncode == 0


def compiled_cpp(root: Path, family: str, selection: str) -> bool:
    """selection: a file of tests/ops and what of it. Builds the library first; a build that fails has noticed too."""
    library = root / "dit_fast/_C/libdit_fast_cpu.so"
    library.unlink(missing_ok=True)
    build = [sys.executable, "dit_fast/_C/build.py"]
    if subprocess.run(build, cwd=root, capture_output=True).returncode or not library.exists():
        return False
    return cpu(root, family, selection)


def cpu(root: Path, family: str, selection: str) -> bool:
    """selection: a file of tests/ and, after a colon, what of it."""
    file, _, chosen = selection.partition(": ")
    return _plain(root, f"tests/{file}", *(["-k", chosen] if chosen else []))


GATES: dict[str, Callable[[Path, str, str], bool]] = {
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
            if not GATES[name](root, mutant.family, selection):
                path.write_text(before)
                if not _stands(name, root, mutant.family, selection):
                    raise RuntimeError(f"{gate} of {mutant.family} fails without a mutant too")
                return name
        return None
    finally:
        path.write_text(before)


@cache
def _stands(gate: str, root: Path, family: str, selection: str) -> bool:
    """Whether a gate passes as things are."""
    return GATES[gate](root, family, selection)


def run(chosen: Sequence[Mutant]) -> Iterator[dict]:
    """One entry of the record per mutant."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "copy"
        root.mkdir()
        copy(root)
        for mutant in chosen:
            entry = {"family": mutant.family, "name": mutant.name, "file": mutant.file, "killed_by": None}
            if mutant.equivalent:
                entry["equivalent"] = mutant.equivalent
            else:
                entry["killed_by"] = killer(mutant, root)
            yield entry


def write(entries: Sequence[dict]) -> None:
    RECORD.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", metavar="NAME", help="families, or mutants by name")
    parser.add_argument("--table", action="store_true", help="print the table of the record")
    arguments = parser.parse_args()
    found = {(entry["family"], entry["name"]): entry for entry in json.loads(RECORD.read_text())}
    known = mutants()
    chosen = [m for m in known if not arguments.only or {m.family, m.name} & set(arguments.only)]
    for entry in run([] if arguments.table else chosen):
        print(
            f"{entry['family']}: {entry['name']}: {entry['killed_by'] or entry.get('equivalent', 'SURVIVES')}",
            flush=True,
        )
        found[entry["family"], entry["name"]] = entry
        write([found[m.family, m.name] for m in known if (m.family, m.name) in found])
    entries = list(found.values())
    print(table(entries))
    for line in survivors(entries):
        print(f"survives: {line}")
    return bool(survivors(entries))


if __name__ == "__main__":
    sys.exit(main())
