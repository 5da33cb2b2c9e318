"""The import directions of docs/architecture.md, read off the syntax trees of every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "dit_fast": ROOT / "dit_fast",
    "dit_fast.kernels": ROOT / "kernels",
    "dit_fast.train": ROOT / "train",
    "dit_fast.benchmarks": ROOT / "benchmarks",
}
LOW = {
    "data", "options", "backend", "philox", "published", "tree", "errors", "files", "display", "terminal", "world",
    "cpu", "_C",
}  # fmt: skip
FLOORS = [
    {"kernels"},
    {"ops"},
    {"nn"},
    {"models"},
    {"encoders"},
    {"diffusion", "autoencoders", "patch"},
    {"objectives"},
    {"methods"},
    {"runs"},
    {"recipes", "checkpoint"},
    {"sampling"},
    {"evaluation"},
    {"train", "preparation", "exchange"},
    {"analysis", "sweep"},
    {"report"},
    {"benchmarks"},  # of the training step too
    {"info"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
REMOTE = {"dit_fast/data/remote.py"}
HOME_OF = {"deepspeed": {"train/zero.py"}, "fsspec": REMOTE, "aiohttp": REMOTE}


def _files():
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            yield package, path, path.relative_to(folder).with_suffix("").parts


def _imports(path):
    """(module, line) of every import statement, at any depth of the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"{path}:{node.lineno}: relative import; write the full name")
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _room(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "dit_fast" and len(parts) > 1 else None


def test_imports_point_one_way_only():
    wrong = []
    for package, path, parts in _files():
        own = _room(f"{package}.{'.'.join(parts)}")
        if own in (None, "__init__", "__version__"):
            continue
        assert own in FLOOR or own in LOW, f"{path}: room '{own}' has no floor; name it in tests/test_layers.py"
        for module, line in _imports(path):
            other = _room(module)
            if other in (None, own) or other not in FLOOR.keys() | LOW:
                continue
            allowed = other in LOW or (own not in LOW and FLOOR[other] < FLOOR[own])
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {own} imports {other}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", sorted(HOME_OF))
def test_heavy_libraries_have_one_home(library):
    users = {
        str(path.relative_to(ROOT))
        for _, path, _ in _files()
        for module, _ in _imports(path)
        if module and module.split(".")[0] == library
    }
    assert users <= HOME_OF[library]


def test_importing_the_package_is_light():
    """torch's counter of FLOPs, which our formulas are registered with, loads Triton where it is installed."""
    code = (
        "import sys, torch.utils.flop_counter\n"
        "by_torch = set(sys.modules)\n"
        "import dit_fast, dit_fast.ops, dit_fast.models, dit_fast.methods, dit_fast.diffusion\n"
        "heavy = {'triton', 'deepspeed', 'webdataset', 'matplotlib', 'diffusers'} & (set(sys.modules) - by_torch)\n"
        "bare = {'kernels', 'train', 'benchmarks'} & set(sys.modules)\n"
        "print(sorted(heavy), sorted(bare))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert result.stdout.strip() == "[] []"


def test_no_file_in_train_bears_the_name_of_a_library():
    # `deepspeed train/__main__.py` puts train/ first on sys.path
    names = {path.stem for path in (ROOT / "train").glob("*.py")} - {"__init__", "__main__"}
    assert not names & sys.stdlib_module_names
    assert not names & {"deepspeed", "torch", "numpy", "webdataset", "datasets", "wandb", "tensorboard", "types"}


def test_files_stay_readable():
    long = {
        str(path.relative_to(ROOT)): lines
        for _, path, _ in _files()
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long


_MAKERS = {"empty", "zeros", "ones", "full", "arange", "linspace", "tensor", "eye", "rand", "randn"}


def _undeclared(tree):
    """Calls of torch's makers without a dtype: what they make follows torch.set_default_dtype."""
    for node in ast.walk(tree):
        named = isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{maker}" for maker in _MAKERS}
        if named and all(keyword.arg not in ("dtype", None) for keyword in node.keywords):
            yield node.lineno


def test_new_tensors_name_their_dtype():
    found = [
        f"{path}:{line}"
        for package, path, _ in _files()
        if package != "dit_fast.benchmarks"  # processes of their own
        for line in _undeclared(ast.parse(path.read_text()))
    ]
    assert not found, "without dtype:\n" + "\n".join(found)
    assert list(_undeclared(ast.parse("torch.empty(3)\ntorch.empty(3, dtype=a)\nnp.empty(3)"))) == [1]
