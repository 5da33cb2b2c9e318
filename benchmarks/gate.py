"""Tests before speed: an op whose tests fail, or whose sides disagree on the benchmark's own inputs, gets no number."""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_fast.benchmarks.cases.case import Case, Compute, Inputs, Side, differentiate
from dit_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


class RedGate(UserError):
    """The op is not right, so its speed is not printed."""


@dataclass(frozen=True)
class Verdict:
    """tests: files; passed and skipped: cases of them; seconds: what they took."""

    tests: tuple[str, ...]
    passed: int
    skipped: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_tests(op: str, patterns: Sequence[str], *, root: Path = ROOT, seconds: float | None = None) -> Verdict:
    """Runs pytest over the files in a process of its own. Raises RedGate if one fails, none passes or time is up."""
    files = _files(op, patterns, root)
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-x", f"--junitxml={record}", *files]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=root, capture_output=True, text=True, timeout=seconds, env=_environment()
            )
        except subprocess.TimeoutExpired:
            raise RedGate(f"{op}: its tests did not end within {seconds:.0f} s, so no speed is shown") from None
        if done.returncode:
            failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            reason = (failed or done.stdout.splitlines()[-1:] or done.stderr.splitlines()[-1:] or ["no output"])[0]
            raise RedGate(f"{op}: its tests fail, so no speed is shown: {reason}")
        return read_record(op, patterns, record, root=root, seconds=time.perf_counter() - start)


def read_record(
    op: str, patterns: Sequence[str], record: Path, *, root: Path = ROOT, seconds: float | None = None
) -> Verdict:
    """Verdict from pytest's --junitxml of earlier runs in this checkout, a file or a folder of them. Raises RedGate as
    `run_tests`.

    Every file must have passed something, so that a record of another run does not open the gate.
    """
    files = _files(op, patterns, root)
    modules = {file.removesuffix(".py").replace("/", "."): file for file in files}
    passed, skipped, spent, green = 0, 0, 0.0, set()
    records = sorted(record.glob("*.xml")) if record.is_dir() else [record]
    for case in (case for path in records for case in ElementTree.parse(path).iter("testcase")):
        module = next((name for name in modules if f"{case.get('classname')}.".startswith(f"{name}.")), None)
        if module is None:
            continue
        spent += float(case.get("time", 0))
        outcome = {child.tag for child in case}
        if outcome & {"failure", "error"}:
            raise RedGate(f"{op}: {modules[module]}::{case.get('name')} fails, so no speed is shown")
        if "skipped" in outcome:
            skipped += 1
        else:
            passed += 1
            green.add(module)
    silent = sorted(set(modules) - green)
    if silent:
        raise RedGate(f"{op}: nothing passed in {modules[silent[0]]}, so no speed is shown")
    return Verdict(tuple(files), passed, skipped, round(spent if seconds is None else seconds, 2))


def _files(op: str, patterns: Sequence[str], root: Path) -> list[str]:
    files = sorted(str(path.relative_to(root)) for pattern in patterns for path in root.glob(pattern))
    if not files:
        raise RedGate(f"{op}: no test files {', '.join(patterns)} in {root}; run the benchmark in a checkout")
    return files


def _environment() -> dict[str, str]:
    """Without what a surrounding pytest says to itself."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def check_agreement(case: Case, side: Side, inputs: Inputs, upstream: Inputs) -> dict[str, float]:
    """Largest errors of outputs and gradients against what the side must equal. Raises RedGate beyond tolerance."""
    expected = side.expected or case.sides[0].compute
    errors = {}
    ours, reference = _differentiate(side.compute, inputs, upstream), _differentiate(expected, inputs, upstream)
    for kind, tolerance, mine, theirs in zip(("outputs", "gradients"), case.tolerance, ours, reference, strict=True):
        errors[kind] = largest_error(mine, theirs)
        if not errors[kind] <= tolerance:
            raise RedGate(
                f"{case.name}: {kind} of '{side.name}' are off by {errors[kind]:.1e} (allowed {tolerance:.0e}), "
                "so no speed is shown"
            )
    return errors


def largest_error(ours: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Largest norm(ours - reference) / norm(reference) over tensors, after 1e-7 of the norm of all of them together is
    forgiven: a gradient that is nearly zero beside the others consists of their rounding. NaN if anything is NaN."""
    wide = [tensor.detach().float() for tensor in reference]
    norms = torch.stack([tensor.norm() for tensor in wide])
    distances = torch.stack([(mine.detach().float() - tensor).norm() for mine, tensor in zip(ours, wide, strict=True)])
    beyond = (distances - 1e-7 * norms.norm()).clamp_min(0)
    return float((beyond / norms.clamp_min(torch.finfo(torch.float32).tiny)).amax())


def _differentiate(compute: Compute | Callable[..., Any], inputs: Inputs, upstream: Inputs) -> tuple[Inputs, Inputs]:
    outputs = compute(inputs)
    return outputs, differentiate(outputs, inputs, upstream)
