"""Everything that needs a GPU, in one go that always ends: tests, all benchmarks, the whole step, tables and figure.

`make gpu-suite`. Every part is a process with an end to its time; time that a part leaves goes to the next. A part that
fails or runs out of time is recorded, what it had written stays, and the others run. Needs torch, numpy, safetensors,
pytest and, for the figure, matplotlib; no network. `--device cpu --small` is the same in a minute on any machine.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

LIMIT = 500.0  # seconds, all parts
START_UP = 12.0  # of a benchmark's time: imports, device, ceilings
USUAL_SHARE = 10.0
SHARES = {
    "tests": 120, "step": 80, "diversity_loss": 100, "long_skip": 90, "adaln": 30, "qk_norm": 20, "gelu_mlp": 25,
    "mean_flow": 20, "report": 15,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """command(seconds): what to run, told how long it may take. share: of the limit, relative to the other parts."""

    name: str
    share: float
    command: Callable[[float], Sequence[str]]


@dataclass(frozen=True)
class Outcome:
    """status: ok, failed, stopped (its time was up). tail: its last lines."""

    name: str
    status: str
    seconds: float
    tail: list[str]


def run_parts(parts: Sequence[Part], limit: float, *, cwd: Path, say: Callable[[str], None] = print) -> list[Outcome]:
    """Runs the parts in order; each ends at its share of `limit` counted from the beginning, so the whole does too."""
    start, spent, whole = time.monotonic(), 0.0, sum(part.share for part in parts)
    outcomes = []
    for part in parts:
        spent += part.share
        seconds = max(limit * spent / whole - (time.monotonic() - start), 1.0)
        say(f"--- {part.name} (at most {seconds:.0f} s)")
        outcomes.append(_run(part.name, part.command(seconds), seconds, cwd, say))
        say(f"--- {part.name}: {outcomes[-1].status} after {outcomes[-1].seconds:.0f} s")
    return outcomes


def _run(name: str, command: Sequence[str], seconds: float, cwd: Path, say: Callable[[str], None]) -> Outcome:
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        status = "failed" if process.returncode else "ok"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = "stopped"
    say(output.rstrip())
    return Outcome(name, status, round(time.monotonic() - start, 1), output.rstrip().splitlines()[-12:])


def names() -> list[str]:
    """Of all parts, in their order: every benchmark is one."""
    from dit_fast.benchmarks.cases import BENCHMARKS
    from dit_fast.benchmarks.step import BENCHMARK

    return ["tests", BENCHMARK.op, *BENCHMARKS, "report"]


def suite(options: argparse.Namespace, root: Path, results: Path, record: Path) -> list[Part]:
    """The parts of the whole suite. record: where the tests' outcome goes, for the benchmarks' gates; without the
    part "tests" it is that of an earlier run (--tested), or each benchmark runs its own."""
    from dit_fast.benchmarks.cases import BENCHMARKS
    from dit_fast.benchmarks.step import BENCHMARK

    patterns = {*BENCHMARK.tests, *(pattern for benchmark in BENCHMARKS.values() for pattern in benchmark.tests)}
    files = sorted(str(path.relative_to(root)) for pattern in patterns for path in root.glob(pattern))
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    python = [sys.executable, "-m"]
    wanted = options.only or names()
    common = ["--device", options.device, "--out", str(results)]
    common += ["--tested", str(record)] if "tests" in wanted or options.tested else []
    common += ["--small"] * options.small + (["--commit", options.commit] if options.commit else [])

    def benchmark(name: str) -> Callable[[float], Sequence[str]]:
        return lambda seconds: [
            *python, "dit_fast.benchmarks", name, *common, "--budget", str(max(0.9 * seconds - START_UP, 1.0))
        ]  # fmt: skip

    commands: dict[str, Callable[[float], Sequence[str]]] = {
        "tests": lambda seconds: [*python, "pytest", "-q", *workers, f"--junitxml={record}", *files],
        **{name: benchmark(name) for name in (BENCHMARK.op, *BENCHMARKS)},
        "report": lambda seconds: [*python, "dit_fast.benchmarks", "report", "--out", str(results)],
    }
    return [Part(name, SHARES.get(name, USUAL_SHARE), commands[name]) for name in names() if name in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 if every part is ok."""
    options = _parser().parse_args(argv)

    from dit_fast.benchmarks.gate import ROOT
    from dit_fast.benchmarks.results import RESULTS, device_of, environment

    results = (options.out or RESULTS).resolve()
    where = environment(device_of(options.device), options.commit)
    folder = results / where["device"]["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        parts = suite(options, ROOT, results, options.tested or Path(scratch) / "tests.xml")
        outcomes = run_parts(parts, options.limit, cwd=ROOT)
    summary = {**where, "limit_s": options.limit, "parts": [asdict(outcome) for outcome in outcomes]}
    (folder / "suite.json").write_text(json.dumps(summary, indent=1) + "\n")
    for outcome in outcomes:
        print(f"{outcome.name:16}{outcome.status:9}{outcome.seconds:7.1f} s")
    return int(any(outcome.status != "ok" for outcome in outcomes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dit_fast.benchmarks.gpu_suite", description="See make gpu-suite.")
    parser.add_argument("--device", default="cuda", help="cuda, cpu or auto")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything")
    parser.add_argument("--only", action="append", choices=names(), help="one part; may be given again")
    parser.add_argument("--small", action="store_true", help="tiny shapes: a check of the suite, no measurement")
    parser.add_argument("--out", type=Path, help="folder for results instead of benchmarks/results")
    parser.add_argument("--tested", type=Path, metavar="XML", help="--junitxml of the tests; written by the part tests")
    parser.add_argument("--commit", help="recorded where there is no git history")
    return parser


if __name__ == "__main__":
    sys.exit(main())
