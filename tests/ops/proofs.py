"""Families of kernels, the sources that decide what their proofs find, and which were proved as they are now.

    python -m tests.ops.proofs             print the families whose sources are not the recorded ones
    python -m tests.ops.proofs --record    record them; `make test-kernels RECORD=1` does it after all proofs passed

A family is a test file in interpreted/, a script in launched/ and the ahead-of-time cases of the kernel files that
they use. Its proofs take minutes and find the same every time, so `make test` skips a family whose sources have the
hash in proved.json; PROVE=all (`make test-kernels`, CI) runs every family.
"""

import ast
import hashlib
import json
import os
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.ops.aot import LOCK, ROOT, kernel_files

HERE = Path(__file__).parent
RECORD = HERE / "proved.json"
FAMILIES = sorted(path.stem[len("test_") : -len("_kernels")] for path in HERE.glob("interpreted/test_*_kernels.py"))
# Tests of an op that are repeated with its kernels; patterns below tests/.
OP_TESTS = {
    "diversity": ["ops/test_diversity_native.py", "data/diversity_*.npz"],
    "long_skip": ["ops/test_long_skip_op.py", "ops/test_long_skip_modes.py", "ops/test_row_statistics.py"],
}
ALWAYS = ["test_interpreter.py", "test_aot.py", "test_semantics.py", "semantics.py", "aot.py", "launches.py"]
ALWAYS += ["install_triton.py"]  # VERSIONS
# Beyond these folders a file that is imported counts, but not what it imports in turn.
FOLLOWED = [ROOT / "kernels", ROOT / "dit_fast/ops", ROOT / "tests"]
FIXTURES = ROOT / "tests/conftest.py"  # it makes data sets and runs too, which no proof uses


def _file(module: str) -> Path | None:
    """The file of a module of this project."""
    place = module.replace(".", "/")
    for name in (f"{place}.py", f"{place}/__init__.py"):
        if (ROOT / name).is_file():
            return (ROOT / name).resolve()  # dit_fast/kernels is a link
    return None


@cache
def _imported(path: Path) -> dict[str, Path]:
    """The project's files that a file imports, by the name that it gives them. Names that a package only hands on
    lead to the file that defines them."""
    found: dict[str, Path | None] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name: _file(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            package = _file(node.module)
            handed_on = _imported(package) if package and package.name == "__init__.py" else {}
            for alias in node.names:
                name = alias.asname or alias.name
                found[name] = _file(f"{node.module}.{alias.name}") or handed_on.get(alias.name, package)
    return {name: file for name, file in found.items() if file}


def op_tests(family: str) -> list[Path]:
    return sorted(path for pattern in OP_TESTS.get(family, ()) for path in (ROOT / "tests").glob(pattern))


@cache
def sources(family: str) -> set[Path]:
    """Every file that decides what the proofs of a family find, except the lock."""
    found: set[Path] = set()
    todo = [HERE / f"interpreted/test_{family}_kernels.py", HERE / f"launched/{family}.py", *op_tests(family)]
    todo += [HERE / name for name in ALWAYS] + [*HERE.glob("**/conftest.py"), FIXTURES]
    todo.append(ROOT / "kernels/__init__.py")
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        if path.suffix == ".py" and path != FIXTURES and any(folder in path.parents for folder in FOLLOWED):
            todo += _imported(path).values()
    return found


@cache
def _owners() -> dict[str, str]:
    """Of each kernel file with ahead-of-time cases the one family that compiles it: the shared one where it uses it,
    else the one with the fewest sources. As the file is among these, no change of it leaves its owner proved."""
    order = sorted(FAMILIES, key=lambda family: (family != "shared", len(sources(family)), family))
    return {name: next(f for f in order if path in sources(f)) for name, path in kernel_files().items()}


def kernel_modules(family: str) -> list[str]:
    """The kernel files whose ahead-of-time cases this family compiles; each file is of one family."""
    return sorted(name for name, owner in _owners().items() if owner == family)


def fingerprint(family: str, read=Path.read_bytes) -> str:
    """sha256 over names and bytes of the sources, and over their lines of the lock."""
    digest = hashlib.sha256()
    files = sorted(sources(family))
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + hashlib.sha256(read(path)).digest())
    kernels = {path.stem for path in files if ROOT / "kernels" in path.parents}
    for entry in json.loads(read(LOCK)):
        if entry["kernel"].split(".")[0] in kernels:
            digest.update(json.dumps(entry, sort_keys=True).encode())
    return digest.hexdigest()


def changed() -> list[str]:
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return [family for family in FAMILIES if recorded.get(family) != fingerprint(family)]


def skip_if_proved(family: str) -> None:
    if os.environ.get("PROVE") != "all" and family not in changed():
        pytest.skip(f"{family} kernels: sources unchanged since their recorded proof; `make test-kernels` runs it")


def skip_if_all_are_proved() -> list[str]:
    """The families to be proved, where one process proves several."""
    families = FAMILIES if os.environ.get("PROVE") == "all" else changed()
    if not families:
        pytest.skip("kernels unchanged since their recorded proofs; `make test-kernels` runs it")
    return families


def main() -> None:
    stale = changed()
    if "--record" in sys.argv[1:]:
        record = {family: fingerprint(family) for family in FAMILIES}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        print(f"recorded: {', '.join(stale) or 'nothing new'}")
    elif stale:
        print(f"not the recorded sources: {', '.join(stale)}; make test-kernels RECORD=1 records them when they pass")


if __name__ == "__main__":
    main()
