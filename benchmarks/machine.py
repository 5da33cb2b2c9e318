"""What a machine is and what it lacks, as JSON: `python -m dit_fast.benchmarks.machine`. What must be there first."""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dit_fast.errors import UserError

SANITIZER = "compute-sanitizer"
SMI_FIELDS = (
    "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.total,mig.mode.current"
)


def check_toolchain() -> None:
    """Triton compiles a C module per launch signature. Raises UserError where a C compiler or Python.h is absent."""
    compiler = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    if not compiler or not shutil.which(compiler):
        raise UserError("no C compiler (gcc, clang or CC), which every Triton launch needs; apt-get install gcc")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        raise UserError(
            f"{header} is absent, which every Triton launch needs; apt-get install python3-dev, of this Python"
        )


def sanitizer() -> str | None:
    """Path of NVIDIA's compute-sanitizer, if it is installed."""
    usual = shutil.which(SANITIZER) or "/usr/local/cuda/bin/compute-sanitizer"
    return usual if Path(usual).is_file() else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_fast.benchmarks.machine", description="Describes the machine.")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, required=True, help="folder for machine.json")
    parser.add_argument("--commit", help="recorded where there is no git history")
    parser.add_argument(
        "--ceilings", action="store_true", help="measure instead: copy, read, matrix products (ceilings.json)"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, whose rates mean nothing")
    options = parser.parse_args(argv)

    from dit_fast.benchmarks.ceilings import DTYPES, measure_ceilings, sustained_matmul
    from dit_fast.benchmarks.results import device_of, environment, rounded, write

    device = device_of(options.device)
    where = environment(device, options.commit)
    if options.ceilings:
        ceilings = asdict(measure_ceilings(device, small=options.small))
        sustained = {name: sustained_matmul(device, name, small=options.small) for name in DTYPES}
        write(options.out / "ceilings.json", rounded({**where, "ceilings": ceilings, "sustained_matmul": sustained}))
        return 0
    described = _output([sys.executable, "-m", "dit_fast.cli", "info"])
    print(described)
    smi = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
    state = _output(smi) if shutil.which("nvidia-smi") else None
    write(
        options.out / "machine.json",
        {**where, "info": described.splitlines(), "nvidia_smi": {SMI_FIELDS: state}, "sanitizer": sanitizer(),
         "cores": os.cpu_count()},
    )  # fmt: skip
    return 0


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
