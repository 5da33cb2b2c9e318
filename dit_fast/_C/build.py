"""Compiles `csrc/` into libraries that serve every Python and every torch from 2.11 on (torch's stable ABI), one for
the CPU and, where there is nvcc and torch has CUDA, one for CUDA; and `csrc/host/` into a module for the running Python
that knows no torch (pybind11).

Runs by itself, without dit_fast installed: `python dit_fast/_C/build.py` (that is `make native`), and from `setup.py`.
Any may be missing. The library is built for plain x86-64 (or whatever the compiler's default is) and holds AVX2 and
AVX-512 versions of each kernel that are chosen when it runs, so that it can be built on one machine and used on
another.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"
LIBRARY = HERE / "libdit_fast_cpu.so"
CUDA_LIBRARY = HERE / "libdit_fast_cuda.so"
HOST_SOURCES = SOURCES / "host"
HOST = HERE / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"
OLDEST_TORCH = "0x020b000000000000"  # 2.11
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"]
ARCHITECTURES = ("80", "90")  # and PTX of the last one, for newer devices


class CannotBuild(Exception):
    """One line that says what is missing and how to get it."""


def source_hash(folder: Path = SOURCES) -> str | None:
    """Identifies the sources in a folder, 16 hex digits; None where there are none (an installed wheel)."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".cpp", ".cu", ".h", ".inc"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def compiler() -> str | None:
    """The C++ compiler: $CXX, else g++ or clang++ on the path."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")


def cuda_compiler() -> str | None:
    """nvcc: $NVCC, else on the path."""
    return shutil.which(os.environ.get("NVCC", "nvcc"))


def is_current(target: Path = LIBRARY, folder: Path = SOURCES) -> bool:
    """Whether what is built was built from the sources at hand."""
    marker = f"source={source_hash(folder)} ".encode()
    return target.exists() and marker in target.read_bytes()


def _prepare(folder: Path) -> tuple[str, str]:
    """(identity of the sources, compiler). Raises CannotBuild."""
    identity, found, named = source_hash(folder), compiler(), os.environ.get("CXX")
    if identity is None:
        raise CannotBuild(f"no sources at {folder}; build in a checkout")
    if found is None:
        raise CannotBuild(f"$CXX={named} is not a program" if named else "no C++ compiler; install g++ or set CXX")
    return identity, found


def build_host() -> Path:
    """The module of `csrc/host/`; it appears under its name only when it is whole.

    Raises CannotBuild without sources, compiler, pybind11 or Python's headers, or with the compiler's message.
    """
    identity, found = _prepare(HOST_SOURCES)
    spec, headers = importlib.util.find_spec("pybind11"), Path(sysconfig.get_paths()["include"])
    if spec is None or spec.origin is None:
        raise CannotBuild(f"{sys.executable} has no pybind11; pip install pybind11, then run `make native`")
    if not (headers / "Python.h").exists():
        raise CannotBuild(f"no Python.h in {headers}; install Python's headers (Debian: python3-dev)")
    includes = [f"-I{Path(spec.origin).parent / 'include'}", f"-I{headers}"]
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".") as scratch:
        target = Path(scratch) / HOST.name
        defines = [f'-DDIT_FAST_SOURCE_HASH="{identity} "']
        sources = map(str, sorted(HOST_SOURCES.glob("*.cpp")))
        _run([found, *FLAGS, *defines, *includes, "-shared", *sources, "-o", str(target)])
        target.replace(HOST)
    return HOST


def build() -> Path:
    """Compiles and links, all cores at once; the library appears under its name only when it is whole.

    Raises CannotBuild without sources, compiler or torch headers, or with the compiler's message.
    """
    identity, found = _prepare(SOURCES)
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotBuild(f"{sys.executable} has no torch (its headers are needed); run `make native` later")
    torch_folder = Path(spec.origin).parent
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".") as scratch:
        target = Path(scratch) / LIBRARY.name
        defines = [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", f'-DDIT_FAST_SOURCE_HASH="{identity}"']
        compile_one = [found, *FLAGS, *defines, f"-I{torch_folder / 'include'}", "-c"]
        objects = {path: Path(scratch) / f"{path.stem}.o" for path in SOURCES.glob("*.cpp")}
        largest_first = sorted(objects, key=lambda path: (-path.stat().st_size, path.name))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = ([*compile_one, str(path), "-o", str(objects[path])] for path in largest_first)
            for done in [pool.submit(_run, command) for command in commands]:
                done.result()
        link = ["-shared", *map(str, sorted(objects.values())), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
        _run([found, *link, "-o", str(target)])
        target.replace(LIBRARY)
    return LIBRARY


def cuda_command(*arguments: str) -> list[str]:
    """nvcc on the CUDA sources, for every architecture. Raises CannotBuild without nvcc or torch's headers."""
    nvcc, spec = cuda_compiler(), importlib.util.find_spec("torch")
    if nvcc is None:
        raise CannotBuild("no nvcc on the path; install the CUDA toolkit or set NVCC")
    if spec is None or spec.origin is None:
        raise CannotBuild(f"{sys.executable} has no torch (its headers are needed); run `make native` later")
    defines = [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", f'-DDIT_FAST_SOURCE_HASH="{source_hash()}"']
    flags = ["-std=c++20", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return [nvcc, *flags, *defines, f"-I{Path(spec.origin).parent / 'include'}", *arguments]


def build_cuda() -> Path:
    """Compiles and links the CUDA library; it appears under its name only when it is whole. Raises CannotBuild."""
    spec = importlib.util.find_spec("torch")
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".") as scratch:
        target = Path(scratch) / CUDA_LIBRARY.name
        codes = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in ARCHITECTURES]
        codes.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
        sources = map(str, sorted(SOURCES.glob("*.cu")))
        command = cuda_command(*codes, "-shared", *sources, "-o", str(target), "-ltorch_cpu")
        _run([*command, f"-L{Path(str(spec and spec.origin)).parent / 'lib'}"])
        target.replace(CUDA_LIBRARY)
    return CUDA_LIBRARY


def has_cuda() -> bool:
    """Whether the torch of this Python was built for CUDA; its version's file says so, without importing it."""
    spec = importlib.util.find_spec("torch")
    version = Path(str(spec.origin)).parent / "version.py" if spec is not None else None
    return version is not None and version.exists() and "cuda: Optional[str] = '" in version.read_text()


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        raise CannotBuild(f"{Path(command[0]).name} failed: {errors[0] if errors else result.returncode}")


def main() -> int:
    """Builds what is not current; exit status 1 if one could not be built, with the reason."""
    status = 0
    targets = [(LIBRARY, SOURCES, build), (HOST, HOST_SOURCES, build_host)]
    if has_cuda() and cuda_compiler():
        targets.append((CUDA_LIBRARY, SOURCES, build_cuda))
    for target, folder, make in targets:
        if is_current(target, folder):
            print(f"{target.name} is up to date")
            continue
        try:
            print(f"built {make()}")
        except (CannotBuild, OSError) as reason:
            print(f"{target.name} was not built: {reason}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
