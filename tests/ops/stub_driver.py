"""Triton's own launcher on a driver that checks calls by NVIDIA's rules (stub_driver.c), on the fake GPU.

    python -m tests.ops.stub_driver                        both Triton versions, sm_90
    python -m tests.ops.stub_driver --version 3.9.0 --gpu 120 --every

What fake_cuda.py ends at goes on here: machine code is loaded, tensor descriptors are encoded, kernels are launched, by
the C code that Triton ships (3.9) or compiles for each signature (3.6: it needs a C compiler and Python.h on the GPU's
machine, and about a second for each). Addresses are made up; nothing runs.
"""

import argparse
import ctypes
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.ops.install_triton import VERSIONS, folder

ROOT = Path(__file__).resolve().parents[2]
SHARED = {80: 166_912, 90: 232_448, 120: 101_376}  # bytes that a block can have
FEW = 2  # cases of a family, but of the long skip, which has the descriptors, all that reach its kernels


def library(version: str) -> Path:
    """The folder of the compiled stub, libcuda.so.1, with the cuda.h that this Triton carries. Raises
    CalledProcessError where the compiler does."""
    place = ROOT / ".cache" / f"stub_driver-{version}"
    built, source = place / "libcuda.so.1", Path(__file__).with_name("stub_driver.c")
    if not built.exists() or built.stat().st_mtime < source.stat().st_mtime:
        place.mkdir(parents=True, exist_ok=True)
        partial = place / f"libcuda.{os.getpid()}"
        include = folder(version) / "triton/backends/nvidia/include"
        flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", f"-I{include}"]
        subprocess.run([os.environ.get("CC", "gcc"), *flags, source, "-o", partial], check=True)
        partial.rename(built)
    return place


def run(version: str, gpu: int = 90, every: bool = False) -> dict[str, Any]:
    """{"cases": names, "launches": number, "tensor_maps": number, "reasons": what was refused, one line each}."""
    place = str(library(version))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {
        "PYTHONPATH": str(folder(version)),
        "TRITON_CACHE_DIR": str(ROOT / ".cache" / f"fake_cuda-{version}"),
        "TRITON_LIBCUDA_PATH": place,
        "LD_LIBRARY_PATH": place,
        "FAKE_GPU": str(gpu),
        "STUB_SHARED": str(SHARED[gpu]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.ops.stub_driver", "--worker", *(["--every"] if every else [])]
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    return json.loads(process.stdout)


def _worker(every: bool) -> None:
    from tests.ops import fake_ops  # first: it stands before torch

    reasons, names = [], []
    for family, cases in itertools.groupby(fake_ops.CASES.items(), key=lambda item: item[0].split()[1]):
        few = (item for item in cases if family != "long_skip" or not item[0].endswith((" gemm", " torch", "bf16")))
        for name, case in cases if every else itertools.islice(few, None if family == "long_skip" else FEW):
            names.append(name)
            try:
                case()
            except Exception as error:
                reasons.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    stub = ctypes.CDLL("libcuda.so.1")
    counts = {name: ctypes.c_ulong.in_dll(stub, f"stub_{name}").value for name in ("launches", "tensor_maps")}
    json.dump({"cases": names, **counts, "reasons": reasons}, sys.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", nargs="*", default=list(VERSIONS), choices=list(VERSIONS))
    parser.add_argument("--gpu", type=int, default=90, choices=list(SHARED))
    parser.add_argument("--every", action="store_true", help="every case of every op")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        _worker(given.every)
        return 0
    failed = False
    for version in given.version:
        found = run(version, given.gpu, given.every)
        failed |= bool(found["reasons"])
        counts = f"{found['launches']} launches, {found['tensor_maps']} tensor maps"
        print(f"sm_{given.gpu}, Triton {version}: {len(found['cases'])} cases, {counts}")
        print("".join(f"  {reason}\n" for reason in found["reasons"]), end="")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
