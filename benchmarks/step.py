"""The whole training step of DiverseDiT: model, flow matching, diversity loss, clipping, AdamW with EMA.

Sides (`step_sides.py`) in turn in one process, by groups that hold the weights of few models at once. A turn is ten
steps in a row on a GPU, so that a host which is slower than the device shows; on a CPU each side has a process of its
own (`step_process.py`). Data are random latents on the device.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dit_fast.benchmarks.cases.case import Benchmark, Setting, Target, Work, speedup_of
from dit_fast.benchmarks.ceilings import Ceilings, data_sheet, sustained_matmul
from dit_fast.benchmarks.cost import host_waits
from dit_fast.benchmarks.measure import SAMPLES, part_entry, reason
from dit_fast.benchmarks.step_process import SideProcess
from dit_fast.benchmarks.step_sides import (
    ALONE,
    BENCH,
    BF16_STREAM,
    CAREFUL,
    COMPILED,
    GROUPS,
    OURS,
    VARIANTS,
    Side,
    Sides,
    StepCase,
)
from dit_fast.benchmarks.timing import Call, clock_for, interleave, summarise
from dit_fast.errors import ConfigError

OPTIMIZER_BYTES = 40  # per parameter: gradient read twice, weight, two moments and EMA read and written, all float32
ROWS = 10  # steps in a row on a GPU
PART_STEPS = 3  # in which the parts of a step are told apart
BENCH_STEPS, BENCH_WARM_UP = 500, 300
MAY_FAIL = (CAREFUL, COMPILED, BENCH)  # a compiler's work; so may a variant that this machine's configuration refuses


@dataclass(frozen=True)
class StepSetting(Setting):
    """groups: of `GROUPS`. overrides: key=value for every side of ours. models, batches, precisions, pixels: every
    combination of these instead of the usual cases; what is not given is as usual."""

    groups: tuple[str, ...] = ("plain", "compiled")
    overrides: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    precisions: tuple[str, ...] = ()
    pixels: tuple[int, ...] = ()

    @property
    def chosen(self) -> bool:
        """Whether it asks for anything but the usual."""
        return self != StepSetting(self.device, self.small)


def usual_cases(setting: Setting) -> list[StepCase]:
    if setting.small:
        return [StepCase("SiT-Nano/2", 2, "fp32", input_size=8)]
    if setting.device.type != "cuda":
        return [StepCase("SiT-Nano/2", 32, "fp32", input_size=16)]
    return [StepCase("SiT-XL/2", 32, "bf16"), StepCase("SiT-B/2", 32, "bf16"), StepCase("SiT-B/2", 256, "bf16")]


def step_cases(setting: Setting) -> list[StepCase]:
    usual = usual_cases(setting)
    if not isinstance(setting, StepSetting) or not any(
        (setting.models, setting.batches, setting.precisions, setting.pixels)
    ):
        return usual
    first = usual[0]
    return [
        StepCase(f"SiT-{model.removeprefix('SiT-')}", batch, precision, pixels // 8)
        for model in setting.models or (first.model,)
        for batch in setting.batches or (first.batch,)
        for precision in setting.precisions or (first.precision,)
        for pixels in setting.pixels or (8 * first.input_size,)
    ]


def step_measures(setting: Setting) -> dict[str, Callable[[Ceilings, float], dict[str, Any]]]:
    """By name, every case with every group of sides; those of "plain" have the case's own."""
    setting = setting if isinstance(setting, StepSetting) else StepSetting(setting.device, setting.small)
    return {
        case.name if group == "plain" else f"{case.name}, {group}": partial(measure_step, case, group, setting)
        for group in setting.groups
        for case in step_cases(setting)
    }


def warm(setting: StepSetting, say: Callable[[str], None] = print) -> None:
    """One step of every side, so that all of it is compiled and cached; nothing is measured."""
    for case in step_cases(setting):
        for group in setting.groups:
            sides = Sides(case, setting.device, setting.overrides, setting.small)
            for name in GROUPS[group]:
                start = time.perf_counter()
                try:
                    sides.make(name).run(0)
                    _finish(setting.device)
                    say(f"{case.name}: {name}: {time.perf_counter() - start:.1f} s")
                except Exception as error:
                    say(f"{case.name}: {name}: not run ({reason(error)})")


def measure_step(
    case: StepCase, group: str, setting: StepSetting, ceilings: Ceilings, seconds: float
) -> dict[str, Any]:
    """The case as it stands in the JSON: part "step" (or "diffusion_bench"), each side with samples per second,
    MFU, the host's time and the step's parts, and part "diversity_loss". A side that raises is left out, with the
    reason."""
    with contextlib.ExitStack() as closing:
        return _measure(case, group, setting, ceilings, seconds, closing)


def _measure(
    case: StepCase, group: str, setting: StepSetting, ceilings: Ceilings, seconds: float, closing: contextlib.ExitStack
) -> dict[str, Any]:
    device, end = setting.device, time.perf_counter() + seconds
    makers = Sides(case, device, setting.overrides, setting.small)
    apart = device.type == "cpu" and group != "diffusion-bench" and not setting.small
    sides: dict[str, Side | SideProcess] = {}
    costs: dict[str, dict[str, int]] = {}
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name in GROUPS[group]:
        try:
            side: Side | SideProcess = (
                makers.make(name)
                if not apart
                else closing.enter_context(
                    contextlib.closing(SideProcess(case, setting.overrides, setting.small, name))
                )
            )
            side.first()  # a compiler's memory is not the step's
            costs[name] = {"peak_memory_bytes": side.peak(device)}
            if device.type == "cuda":  # elsewhere the count would be of counters that lie on the CPU anyway
                costs[name]["host_waits"] = host_waits(partial(side.run, 0), device)
            sides[name] = side
        except Exception as error:
            elsewhere = name in MAY_FAIL or (name in VARIANTS and isinstance(error, ConfigError))
            (skipped if elsewhere else failed)[name] = reason(error)
    if not any(name != ALONE for name in sides):
        raise RuntimeError(f"no side ran: {'; '.join([*failed.values(), *skipped.values()])}")
    engine = next(iter(makers._engines.values()), None) or makers.engine(False, ())
    model: Any = engine.model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    work = Work(OPTIMIZER_BYTES * trained, 3 * model.flops_per_sample() * case.batch)
    left = end - time.perf_counter()
    parts: dict[str, Any] = {}
    host: dict[str, list[float]] = {}
    if group == "diffusion-bench":
        samples = {name: _in_a_row(side, setting) for name, side in sides.items()}
        parts["diffusion_bench"] = part = part_entry(samples, dict.fromkeys(samples, work), ceilings, case.precision)
    else:
        samples, host = _in_turn(sides, setting, left)
        alone = {name: samples.pop(name) for name in (ALONE,) if name in samples}
        parts["step"] = part = part_entry(samples, dict.fromkeys(samples, work), ceilings, case.precision)
        if alone:
            parts["diversity_loss"] = part_entry(alone, {ALONE: _least(makers)}, ceilings, case.precision)
    matmul = "fp32" if case.precision == "fp32" else "bf16"
    peaks = {"the data sheet": data_sheet(device, matmul),
             "the sustained rate": sustained_matmul(device, matmul, small=setting.small)}  # fmt: skip
    for name, found in part["sides"].items():
        spent = sum(found["samples_s"]) / len(found["samples_s"]) if group == "diffusion-bench" else found["median_s"]
        found["samples_per_s"] = case.batch / spent
        found["mfu"] = {of: work.flops / spent / peak for of, peak in peaks.items() if peak}
        if name in host:
            found["host_s"] = summarise(host[name]).median
        if sides[name].has_parts:
            told = [sides[name].parts(step, device) for step in range(PART_STEPS)]
            found["parts_s"] = {key: [each[key] for each in told] for key in told[0]}
    entry = {
        "name": case.name if group == "plain" else f"{case.name}, {group}",
        "dtype": case.precision,
        "shape": {
            "batch": case.batch,
            "tokens": model.num_tokens,
            "width": model.hidden_size,
            "blocks": model.depth,
            "parameters": trained,
        },
        "baseline": next(iter(samples)),
        "overrides": list(setting.overrides),
        "skipped": skipped,
        "failed": failed,
        "costs": costs,
        "parts": parts,
    }
    return entry | ({"feature_dtype": makers.feature_dtype} if ALONE in sides else {})


def _in_turn(
    sides: Mapping[str, Side | SideProcess], setting: Setting, seconds: float
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of a step by side, sides in turn, and those of the host's calls."""
    device = setting.device
    row = ROWS if device.type == "cuda" else 1
    warm_up = 1
    host: dict[str, list[float]] = {name: [] for name in sides}

    def timed(name: str, side: Side | SideProcess) -> Call:
        def call(number: int, mark: Callable[[], None]) -> Any:
            start = time.perf_counter()
            for step in range(number * row, number * row + row):
                kept = side.run(step)
            host[name].append((time.perf_counter() - start) / row)
            mark()
            return kept

        return call

    calls = {name: timed(name, side) for name, side in sides.items()}
    rounds = interleave(calls, clock_for(device), samples=SAMPLES, seconds=seconds, warm_up=warm_up)
    samples = {name: [times[0] / row for times in turns] for name, turns in rounds.items()}
    return samples, {name: times[warm_up:] for name, times in host.items()}


def _in_a_row(side: Any, setting: Setting) -> list[float]:
    """diffusion-bench's protocol: one side alone, 500 steps of which 300 do not count, TF32 allowed, each step's
    loss read by the host. Its rate is the steps that count over all of their time; here each one's time is kept."""
    steps, first = (5, 3) if setting.small else (BENCH_STEPS, BENCH_WARM_UP)
    before, times = torch.get_float32_matmul_precision(), []
    torch.set_float32_matmul_precision("high")
    try:
        for step in range(steps):
            if step == first:
                _finish(setting.device)
                start = time.perf_counter()
            float(side.run(step))
            if step >= first:
                times.append(time.perf_counter() - start)
                start = time.perf_counter()
    finally:
        torch.set_float32_matmul_precision(before)
    return times


def _least(makers: Sides) -> Work:
    """Of the diversity loss of all pairs on features in memory."""
    features = makers._features
    elements, pairs = sum(x.numel() for x in features), len(features) * (len(features) - 1) // 2
    return Work(3 * sum(x.nbytes for x in features), 18 * elements + 6 * pairs * features[0].numel())


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _side(cases: Sequence[dict[str, Any]], case: str, name: str) -> dict[str, Any] | None:
    found = (part["sides"].get(name) for entry in cases if entry["name"] == case for part in entry["parts"].values())
    return next((side for side in found if side is not None), None)


def diversity_share(cases: list[dict[str, Any]], case: str) -> float | None:
    """Time of the diversity loss alone over that of our step with it, in percent."""
    alone, ours = _side(cases, case, ALONE), _side(cases, case, OURS)
    return 100 * alone["median_s"] / ours["median_s"] if alone and ours else None


def _sustained_share(cases: list[dict[str, Any]], _: Ceilings) -> float | None:
    ours = _side(cases, "XL/2 b128 bf16", OURS)
    return 100 * ours["mfu"]["the sustained rate"] if ours else None


def _both(case: str, published: float, careful: float) -> tuple[Target, Target]:
    return (
        Target(f"{case}: {published}x as published", published, speedup_of(case, OURS, "step")),
        Target(f"{case}: {careful}x careful", careful, speedup_of(f"{case}, compiled", OURS, "step", (CAREFUL,))),
    )


BENCHMARK: Benchmark[StepCase] = Benchmark(
    "step",
    ("tests/ops/test_diversity*.py", "tests/ops/test_adaln*.py", "tests/ops/test_long_skip*.py",
     "tests/methods/test_diversedit.py", "tests/models/test_training_curve.py", "tests/train/test_optim.py",
     "tests/train/test_loss.py", "tests/ops/test_linear.py", "tests/ops/test_attention_native.py",
     "tests/ops/test_gelu_native.py", "tests/ops/test_product_native.py"),
    step_cases,
    {
        "cpu": (
            *_both("Nano/2 b32 fp32 128px", 1.6, 1.25),
            *_both("S/2 b8 fp32", 1.3, 1.2),
            *_both("S/2 b8 bf16", 1.7, 1.5),
        ),
        "cuda": (
            Target("XL/2 b32, fp32 stream: 1.5x as published", 1.5, speedup_of("XL/2 b32 bf16", OURS, "step")),
            Target("XL/2 b32, bf16 stream: 1.6x as published", 1.6,
                   speedup_of("XL/2 b32 bf16, types", BF16_STREAM, "step")),
            Target("XL/2 b32: 1.25x careful", 1.25, speedup_of("XL/2 b32 bf16, compiled", OURS, "step", (CAREFUL,))),
            Target("XL/2 b128: 65 % of the sustained matrix rate (percent)", 65, _sustained_share),
            Target("XL/2 b32: diversity loss, all pairs, under 2 % of the step (percent)", 2,
                   lambda cases, _: diversity_share(cases, "XL/2 b32 bf16"), at_most=True),
        )
    },
)  # fmt: skip
