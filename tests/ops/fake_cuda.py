"""Run every CUDA branch on a fake GPU, and compile what is launched there with the types that are asked for.

    python -m tests.ops.fake_cuda                          every GPU and Triton version, and each case but the sizes
    python -m tests.ops.fake_cuda --gpu 90 --version 3.6.0 --only "step sit"      cases that begin so
    python -m tests.ops.fake_cuda --gpu 90 --version 3.6.0 --only "size"          every recipe in every other size

Each GPU and version is a process of its own (fake_device.py). Cases stand in fake_cases.py. Where the ahead-of-time
cases of aot.py are written by hand, with the types and alignments that are meant, here they are those of the launches.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.ops.install_triton import VERSIONS, folder

ROOT = Path(__file__).resolve().parents[2]
GPUS = (80, 90, 120)


def run(gpu: int, version: str, only: str = "", compiled: bool = True) -> dict[str, Any]:
    """{"cases": {name: launches}, "compiled": number of variants, "reasons": what is wrong, one line each}.

    only: cases that begin so; "": all but those of "size". compiled: whether what they launch is compiled.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {
        "PYTHONPATH": str(folder(version)),
        "TRITON_CACHE_DIR": str(ROOT / ".cache" / f"fake_cuda-{version}"),
        "FAKE_GPU": str(gpu),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.ops.fake_cuda", "--worker", "--only", only]
    process = subprocess.run(
        [*command, *(["--no-compile"] if not compiled else [])],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return json.loads(process.stdout)


def _sources() -> str:
    """A hash over what decides how the cases run; of a change of anything below these folders, tests left out."""
    import torch

    digest = hashlib.sha256(f"{sys.version} {torch.__version__}".encode())
    for name in ("dit_fast", "kernels", "train", "benchmarks", "tests/ops", "tests/helpers"):  # links are not followed
        for path in sorted((ROOT / name).rglob("*")):
            if path.suffix in (".py", ".cpp", ".toml") and not path.name.startswith("test_"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _note(gpu: int, version: str) -> Path:
    return ROOT / ".cache" / f"fake_cuda-{version}-sm_{gpu}.sha256"


def keep(gpu: int, version: str) -> None:
    """Notes that every case but those of "size" ran with these sources, and well."""
    _note(gpu, version).parent.mkdir(exist_ok=True)
    _note(gpu, version).write_text(_sources())


def kept(gpu: int, version: str) -> bool:
    note = _note(gpu, version)
    return note.exists() and note.read_text() == _sources()


def _worker(only: str, compiled: bool) -> None:
    from tests.ops import fake_cases, fake_device  # first: they stand before torch

    launched, variants, reasons, counts = {}, {}, [], {}
    for name, case in fake_cases.CASES.items():
        if not (name.startswith(only) if only else not name.startswith("size")):
            continue
        try:
            found = case()
        except Exception as error:
            reasons.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        reasons += [f"{name}: {line}" for line in found.mismatches]
        counts[name] = dict(found.kernels)
        for text, variant in found.variants.items():
            launched.setdefault(text, name)
            variants[text] = variant
    for text, variant in variants.items() if compiled else ():
        reasons += [f"{launched[text]}: {variant.name}: {line}" for line in compile_variant(variant, fake_device)]
    json.dump({"cases": counts, "compiled": len(variants), "reasons": reasons}, sys.stdout)


def compile_variant(variant: Any, device: Any) -> list[str]:
    """Reasons why this machine code may not run on the fake GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", device.ARCH, 32)
    try:
        compiled = triton.compile(variant.source(), target=target, options=variant.options.__dict__)
    except Exception as error:
        return [f"does not compile for sm_{device.ARCH}: {type(error).__name__}: {str(error).splitlines()[0]}"]
    reasons, used = [], resources(compiled.asm["cubin"])
    for name in ("STACK", "LOCAL"):
        if used[name]:
            reasons.append(f"{used[name]} bytes of {name.lower()} memory on sm_{device.ARCH}, {variant.constants}")
    shared = max(compiled.metadata.shared, used["SHARED"])
    if shared > device.SHARED:
        reasons.append(f"{shared} bytes of shared memory, sm_{device.ARCH} has {device.SHARED}, {variant.constants}")
    for name in ("global_scratch_size", "profile_scratch_size"):
        if getattr(compiled.metadata, name, 0):
            reasons.append(f"{name} is {getattr(compiled.metadata, name)}")
    return reasons


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the one kernel in it."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", type=int, nargs="*", default=GPUS, choices=GPUS)
    parser.add_argument("--version", nargs="*", default=list(VERSIONS), choices=list(VERSIONS))
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose names begin so")
    parser.add_argument("--no-compile", action="store_true", help="trace alone")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        _worker(given.only, not given.no_compile)
        return 0
    failed = False
    for version in given.version:
        for gpu in given.gpu:
            found = run(gpu, version, given.only, not given.no_compile)
            failed |= bool(found["reasons"])
            print(f"sm_{gpu}, Triton {version}: {len(found['cases'])} cases, {found['compiled']} compilations")
            print("".join(f"  {reason}\n" for reason in found["reasons"]), end="")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
