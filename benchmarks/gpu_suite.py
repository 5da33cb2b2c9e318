"""What needs a GPU, in stages that each end in time and leave one tar: `make gpu-suite STAGE=correct|tune|decide`.

docs/gpu-day.md says what to run and what each number decides. Every part is a process of its own (`parts.py`), so
that a failing test, an illegal access or a hang hides itself alone. Needs torch, numpy, safetensors, pydantic, pytest,
a C compiler and Python.h; no network, no installation. All parts share one warm cache of Triton and torch.compile, kept
between stages. `--device cpu --small` is the same with tiny shapes on any machine.
"""

import argparse
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dit_fast import kernels
from dit_fast.benchmarks.gate import RedGate, read_record
from dit_fast.benchmarks.machine import check_toolchain, sanitizer
from dit_fast.benchmarks.parts import Part, Record, run_parts
from dit_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("correct", "tune", "decide")
LIMIT = 520.0  # seconds of a stage
START_UP = 12.0  # of a benchmark's time: imports, device, ceilings
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
SOURCES = (".py", ".cpp", ".cu", ".h", ".json")  # .json: tuned tables
GATE = ("adaln", "diversity", "long_skip", "training")  # of `step`
Command = Callable[[float], Sequence[str]]
FAMILIES = ("adaln", "diversity", "flow", "gelu_mlp", "long_skip", "qk_norm", "repa_cosine")  # of kernels
TRAINING = ("tests/methods/test_diversedit.py", "tests/models/test_training_curve.py", "tests/train/test_optim.py",
            "tests/train/test_loss.py", "tests/train/test_graph.py", "tests/models/test_paths_devices.py",
            "tests/ops/test_linear.py", "tests/ops/test_attention_native.py",
            "tests/ops/test_gelu_native.py", "tests/ops/test_product_native.py")  # fmt: skip


class Stage:
    """Makes the parts of a stage. folder: where they write. tested: for pytest's records of these very sources, which
    open the gates of the benchmarks."""

    def __init__(self, options: argparse.Namespace, folder: Path, tested: Path):
        self.options, self.folder, self.tested = options, folder, tested
        self.common = ["--device", options.device, "--out", str(folder)]
        self.common += ["--small"] * options.small + (["--commit", options.commit] if options.commit else [])

    def parts(self) -> list[Part]:
        return [Part("machine", 20, self._module("machine")), *getattr(self, self.options.stage)()]

    def correct(self) -> list[Part]:
        """Values and gradients on the device, opcheck, memory and races, ceilings, one step's profile, resume."""
        tools = ("memcheck", "racecheck")
        return [
            *(self._tests(f"tests {name}", patterns) for name, patterns in self._families().items()),
            self._tests("resume", ["tests/train/test_resume_devices.py"]),
            Part("ceilings", 20, self._module("machine", "--ceilings")),
            Part("profile", 40, self._module("profile_step")),
            *(self._sanitized(tool, family) for tool in tools for family in FAMILIES),
        ]

    def tune(self) -> list[Part]:
        """SDPA's back ends and what cannot change a bit of our kernels, as one table; then bits with it and without."""
        absent = None if self.options.device != "cpu" else kernels.unavailable()
        return [
            Part("tune attention", 60, self._module("tune", "attention")),
            Part("tune long_skip", 250, self._module("tune", "long_skip"), absent=absent),
            Part("tune adaln", 90, self._module("tune", "adaln"), absent=absent),
            Part("check", 90, self._module("tune", "check"), absent=absent),
        ]

    def decide(self) -> list[Part]:
        """Whole steps, what decides most first: the last ones have the time that is left. Each part builds its models
        anew. What is compiled is compiled by a part of its own; diffusion-bench's is last, as a compiler may hang."""
        report = [sys.executable, "-m", "dit_fast.benchmarks", "report", "--out", str(self.folder)]
        return [
            *self._gate(),
            self._step("XL/2", 32, "plain", 60),
            self._step("XL/2", 32, "graph", 50),
            self._step("XL/2", 128, "plain", 60),
            self._step("XL/2", 32, "types", 45),
            self._step("XL/2", 32, "compiled", 60, once=True),
            self._step("XL/2", 32, "compiled", 45),
            self._step("B/2", 256, "plain", 45),
            *(self._step(model, batch, "plain", 25) for model, batch in (("XL/2", 64), ("B/2", 32))),
            self._step("XL/2", 128, "graph", 25),
            self._step("XL/2", 32, "diffusion-bench", 30, once=True),
            self._step("XL/2", 32, "diffusion-bench", 45),
            Part("report", 10, lambda _: report),
        ]

    def _gate(self) -> list[Part]:
        """The tests that must pass before a step's time is shown."""
        families = {name: patterns for name, patterns in self._families(whole=True).items() if name in GATE}
        return [
            self._unless_known(self._tests(f"tests {name}", patterns), patterns) for name, patterns in families.items()
        ]

    def _unless_known(self, part: Part, patterns: Sequence[str]) -> Part:
        """Absent where an earlier stage's record is of all these tests: a small stage ran fewer of them."""
        record = self.tested / f"{part.slug}.xml"
        if not record.exists():
            return part
        try:
            read_record(part.name, patterns, record)
        except RedGate:
            return part
        return replace(part, absent="an earlier stage has their record, of these very sources")

    def _step(self, model: str, batch: int, group: str, share: float, once: bool = False) -> Part:
        sizes = [] if self.options.small else ["--model", model, "--batch", str(batch)]
        begin = [sys.executable, "-m", "dit_fast.benchmarks", "step", *self.common, *sizes, "--sides", group]
        begin += ["--tested", str(self.tested)] + ["--once"] * once
        return Part(f"{'compile' if once else 'step'} {model} b{batch} {group}", share,
                    lambda seconds: [*begin, "--budget", str(max(0.9 * seconds - START_UP, 1.0))])  # fmt: skip

    def _families(self, whole: bool = False) -> dict[str, list[str]]:
        """Patterns of the tests that must pass before a number is printed, in groups that may hide each other. small
        and not whole: those alone that run on every device."""
        if self.options.small and not whole:
            return {family: [f"tests/ops/test_{family}_devices.py"] for family in FAMILIES}
        families = {family: [f"tests/ops/test_{family}*.py"] for family in FAMILIES}
        return families | {"library": ["tests/ops/test_library*.py"], "training": list(TRAINING)}

    def _tests(self, name: str, patterns: Sequence[str]) -> Part:
        part = Part(name, 90, lambda _: [*command, *files], beside=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE",
                   f"--junitxml={self.tested / part.slug}.xml"]  # fmt: skip
        files = sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))
        return part

    def _sanitized(self, tool: str, family: str) -> Part:
        """NVIDIA's checker around the small cases, fp32 and bf16, of one family."""
        checker = sanitizer()
        test = [f"tests/ops/test_{family}_devices.py", "-k", "values and cuda"]
        command = [str(checker), "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", sys.executable,
                   "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *test]  # fmt: skip
        absent = None if checker else "compute-sanitizer is not installed (it comes with the CUDA toolkit)"
        return Part(f"{tool} {family}", 150, lambda _: command, beside=True, absent=absent)

    def _module(self, name: str, *arguments: str) -> Command:
        return lambda _: [sys.executable, "-m", f"dit_fast.benchmarks.{name}", *arguments, *self.common]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if every part is ok or absent, 1 if not, 2 if the stage cannot begin."""
    options = _parser().parse_args(argv)
    try:
        if options.device != "cpu":
            check_toolchain()
    except UserError as error:
        print(f"gpu-suite: error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _leave)
    out = options.out.resolve()
    record = Record(
        out / options.stage, out / f"{options.stage}.tar", {"stage": options.stage, "limit_s": options.limit}
    )
    cache = ROOT / ".cache" / "gpu-suite"
    tested = cache / f"tested-{options.device}-{_sources()}"
    tested.mkdir(parents=True, exist_ok=True)
    parts = Stage(options, record.folder, tested).parts()
    for name in options.only:
        if name not in [part.name for part in parts]:
            print(
                f"gpu-suite: error: no part '{name}'; valid: {', '.join(part.name for part in parts)}", file=sys.stderr
            )
            return 2
    wanted = [part for part in parts if not options.only or part.name in options.only]
    environment = {**{name: str(cache / folder) for name, folder in CACHES.items()}, "PIP_NO_INDEX": "1", **os.environ}
    outcomes = run_parts(wanted, options.limit, record, cwd=ROOT, environment=environment)
    for outcome in outcomes:
        print(f"{outcome.name:26}{outcome.status:9}{outcome.seconds:7.1f} s")
    print(f"-> {record.tar}")
    return int(any(outcome.status not in ("ok", "absent") for outcome in outcomes))


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _sources() -> str:
    """Hash of what the tests test, so that no record of other sources opens a gate."""
    found = hashlib.sha256()
    for folder in ("dit_fast", "kernels", "train", "csrc", "tests"):
        for path in sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES):
            found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dit_fast.benchmarks.gpu_suite", description="See docs/gpu-day.md.")
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="one part; may be given again")
    parser.add_argument("--small", action="store_true", help="tiny shapes: a check of the suite, no measurement")
    parser.add_argument("--out", type=Path, default=Path("gpu-suite"), help="folder of STAGE.tar and STAGE/")
    parser.add_argument("--commit", help="recorded where there is no git history")
    return parser


if __name__ == "__main__":
    sys.exit(main())
