"""What the launchers really launch, without a GPU: run by aot.py in a process with one Triton version.

A driver that only knows its target stands in for the GPU, and a launch stops after the compiler's front end. The
launcher's own path runs (argument specialisation, tuples, options), and what it asks for is compared with the
ahead-of-time cases: a kernel or configuration outside of the lock is a finding, and so is a number of another type than
its case declares. What to launch stands in launched/, one script per family.
"""

import importlib
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.ops.aot import Types, kernel_files, misdeclared


class _NoGpu:
    """The part of a driver that compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _stop_after_front_end() -> None:
    """What an argument is compiled to (a constant, a pointer) shows in the front end, where it also fails if it must.
    The machine code is that of the ahead-of-time case with the same constants and options."""
    compiler = backends["nvidia"].compiler
    add_stages = compiler.add_stages

    def add_front_end(self, stages, *arguments):
        add_stages(self, stages, *arguments)
        nothing = lambda source, metadata: metadata.update(shared=0, name="") or b""  # noqa: E731
        stages.update(dict.fromkeys(list(stages)[1:], nothing))

    compiler.add_stages = add_front_end


def record() -> list[tuple[tuple, Types]]:
    """Makes every launch a compilation; returns the list that (kernel, constants, options) with types are added to."""
    driver.set_active(_NoGpu())
    _stop_after_front_end()
    launched: list[tuple[tuple, Types]] = []
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        constants = {}
        for path, value in compiled.src.constants.items():
            name = self.arg_names[path[0]]
            if len(path) == 1 and name.isupper():
                constants[name] = value
        asked = {name: value for name, value in options.items() if name.islower() and name not in self.arg_names}
        launched.append((_key(self, constants, asked), _types(compiled.src.signature)))
        return compiled

    JITFunction.run = compile_only
    return launched


def _key(kernel: JITFunction, constants: dict, options: dict) -> tuple:
    launch = {"enable_fp_fusion": True} | options
    return kernel.fn.__qualname__, tuple(sorted(constants.items())), tuple(sorted(launch.items()))


def _types(signature: Mapping[str, Any]) -> Types:
    """Of the numbers among the arguments, and of those in tuples by their place."""
    flat = {}
    for name, kind in signature.items():
        parts = {f"{name}[{i}]": part for i, part in enumerate(kind)} if isinstance(kind, tuple) else {name: kind}
        flat |= {name: part for name, part in parts.items() if not part.startswith("*")}
    return flat


def uncovered(scripts: Sequence[str]) -> list[str]:
    """One line per launch of these scripts of launched/ that no ahead-of-time case covers, or not with its types."""
    launched = record()
    for script in scripts:
        runpy.run_path(str(Path(__file__).with_name("launched") / f"{script}.py"))
    assert launched or not scripts, f"{', '.join(scripts)}: nothing was launched"
    covered: dict[tuple, list[Types]] = {}
    for name in kernel_files():
        for case in importlib.import_module(f"dit_fast.kernels.{name}").aot_cases(80):
            key = _key(case.kernel, dict(case.constants), dict(case.options))
            covered.setdefault(key, []).append(_types(case.signature))
    # The table's length is the number of tensors, and changes nothing else.
    strange = {key for key, _ in launched if key not in covered and key[0] != "write_table"}
    lines = [f"launched, but no ahead-of-time case: {key}" for key in sorted(strange)]
    others = {(key, other) for key, types in launched if key in covered and (other := misdeclared(types, covered[key]))}
    return lines + [f"launched with other types than its ahead-of-time case: {other}: {key}" for key, other in others]
