"""What the launchers really launch, without a GPU: run by test_aot.py in a process with one Triton version.

A driver that only knows its target stands in for the GPU, and a launch stops after compilation. The launcher's own
path runs (argument specialisation, tuples, options), and what it asks for is compared with the ahead-of-time cases:
a kernel or configuration outside of the lock is a finding. What to launch stands in launched/, one script per op.
"""

import runpy
import sys
from pathlib import Path

from aot import kernel_modules
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class _NoGpu:
    """The part of a driver that compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def record() -> list[tuple]:
    """Makes every launch a compilation; returns the list that (kernel, constants, options) are added to."""
    driver.set_active(_NoGpu())
    launched: list[tuple] = []
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        constants = {}
        for path, value in compiled.src.constants.items():
            name = self.arg_names[path[0]]
            if len(path) == 1 and name.isupper():
                constants[name] = value
        asked = {name: value for name, value in options.items() if name.islower() and name not in self.arg_names}
        launched.append(_key(self, constants, asked))
        return compiled

    JITFunction.run = compile_only
    return launched


def _key(kernel: JITFunction, constants: dict, options: dict) -> tuple:
    launch = {"enable_fp_fusion": True} | options
    return kernel.fn.__qualname__, tuple(sorted(constants.items())), tuple(sorted(launch.items()))


def main() -> None:
    """Prints one line per launch that no ahead-of-time case covers, or how many launches there were."""
    import importlib

    launched = record()
    for script in sorted((Path(__file__).parent / "launched").glob("*.py")):
        runpy.run_path(str(script))
    covered = set()
    for name in kernel_modules():
        for case in importlib.import_module(f"dit_fast.kernels.{name}").aot_cases(80):
            covered.add(_key(case.kernel, dict(case.constants), dict(case.options)))
    # The table's length is the number of tensors, and changes nothing else.
    strange = {key for key in launched if key not in covered and key[0] != "write_table"}
    print("\n".join(str(key) for key in sorted(strange)) or f"{len(launched)} launches are covered")
    sys.exit(bool(strange))


if __name__ == "__main__":
    main()
