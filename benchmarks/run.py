"""One benchmark from its tests to its file, and the table that says the same in the terminal."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dit_fast.benchmarks import step
from dit_fast.benchmarks.cases import BENCHMARKS
from dit_fast.benchmarks.cases.case import Benchmark, Setting, Target
from dit_fast.benchmarks.ceilings import Ceilings, measure_ceilings
from dit_fast.benchmarks.gate import RedGate, read_record, run_tests
from dit_fast.benchmarks.measure import measure_case, reason
from dit_fast.benchmarks.results import document, environment, save
from dit_fast.errors import UserError

NAMES = (*BENCHMARKS, step.BENCHMARK.op)
Measure = Callable[[Ceilings, float], dict[str, Any]]


def run(
    name: str,
    setting: Setting,
    folder: Path,
    *,
    budget: float,
    record: Path | None = None,
    commit: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Measures one benchmark in about `budget` seconds, its tests not counted, and returns the file it wrote.

    record: pytest's --junitxml of a run that already covered the tests; if it never came to be, they run here. The file
    is written anew after every case, so that a run that is stopped leaves what it has; cases for which no time was left
    are named in "left_out", one whose baseline fails in "failed" with the reason, as a side is in its case.
    Raises UserError for an unknown name; RedGate, before any number is shown, if the op's tests fail, and at the end,
    with all other numbers in the file, if a baseline or a side that is ours raises or is wrong.
    """
    benchmark, measures = _plan(name, setting)
    tests = benchmark.tests
    verdict = read_record(name, tests, record) if record and record.exists() else run_tests(name, tests)
    say(f"{name}: {verdict.passed} tests passed, {verdict.skipped} skipped ({verdict.seconds:.0f} s)")
    where, start = environment(setting.device, commit), time.perf_counter()
    ceilings = measure_ceilings(setting.device, small=setting.small)
    say(_ceilings_line(ceilings))
    cases: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    wrong: list[str] = []
    path, names = folder, list(measures)
    label = f"{name} {', '.join(names)}" if isinstance(setting, step.StepSetting) and setting.chosen else name
    for number, (case, measure) in enumerate(measures.items()):
        left = budget - (time.perf_counter() - start)
        if number and left <= 0:
            break
        try:
            cases.append(measure(ceilings, left / (len(names) - number)))
        except Exception as error:  # memory that does not suffice, a driver's error: the other cases go on
            failed[case] = reason(error)
            wrong.append(f"{case}: {failed[case]}")
            say(f"\n{case}: not run ({failed[case]})")
        else:
            wrong += [f"{case}: {side}: {why}" for side, why in cases[-1]["failed"].items()]
            for line in table(cases[-1]):
                say(line)
        result = document(
            label,
            where,
            seconds=time.perf_counter() - start,
            gate=verdict.as_dict(),
            ceilings=ceilings,
            cases=cases,
            targets=[_judged(target, cases, ceilings) for target in benchmark.targets.get(setting.device.type, ())],
        )
        path = save({**result, "failed": failed, "left_out": names[number + 1 :]}, folder)
    for target in result["targets"]:
        say(target_line(target))
    say(f"-> {path}")
    if wrong:
        raise RedGate(f"{name}: {'; '.join(wrong)}")
    return path


def _plan(name: str, setting: Setting) -> tuple[Benchmark[Any], dict[str, Measure]]:
    if name == step.BENCHMARK.op:
        return step.BENCHMARK, step.step_measures(setting)
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark '{name}'; valid: {', '.join(NAMES)}, all, report")
    return BENCHMARKS[name], {
        case.name: partial(measure_case, case, setting) for case in BENCHMARKS[name].cases(setting)
    }


def _judged(target: Target, cases: list[dict[str, Any]], ceilings: Ceilings) -> dict[str, Any]:
    measured = target.measure(cases, ceilings)
    met = None if measured is None else (measured <= target.wanted if target.at_most else measured >= target.wanted)
    return {"text": target.text, "wanted": target.wanted, "measured": measured, "met": met}


def target_line(target: dict[str, Any]) -> str:
    """One target as text: what was measured, and whether that is enough."""
    if target["met"] is None:
        return f"target not measured: {target['text']}"
    return f"target {'met' if target['met'] else 'MISSED'}: {target['text']}; measured {target['measured']:.3g}"


def throughput(side: dict[str, Any]) -> str:
    """Samples per second, MFU, the host's time and that of its parts, of a side that trains; empty for others."""
    if "mfu" not in side:
        return ""
    shares = ", ".join(f"{share:.1%} of {of}" for of, share in side["mfu"].items())
    host = f", host {side['host_s'] * 1e3:.4g} ms" if "host_s" in side else ""
    parts = ", ".join(f"{part} {statistics.median(times) * 1e3:.4g}" for part, times in side.get("parts_s", {}).items())
    return f" ({side['samples_per_s']:.4g} samples/s, MFU {shares}{host}{f'; ms: {parts}' if parts else ''})"


def _ceilings_line(ceilings: Ceilings) -> str:
    matmul = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in ceilings.matmul.items())
    return f"ceilings: copy {ceilings.copy / 1e9:.4g} GB/s, read {ceilings.read / 1e9:.4g} GB/s, matmul {matmul}"


def table(case: dict[str, Any]) -> Iterator[str]:
    """Lines for a terminal: a case's sides by part, with median, quartiles, rates and memory."""
    yield f"\n{case['name']}  {' x '.join(f'{key} {value}' for key, value in case['shape'].items())}"
    heads = (("ms", 10), ("quartiles", 20), ("GB/s", 9), ("TFLOP/s", 9), ("of bound", 9), ("ratio", 8), ("peak MB", 9))
    yield f"  {'':38}{''.join(f'{text:>{width}}' for text, width in heads)}{'n':>4}"
    for part, entry in case["parts"].items():
        least = min(side["bound_s"] for side in entry["sides"].values())
        yield f"  {part}: at least {least * 1e3:.4g} ms"
        for name, side in entry["sides"].items():
            low, high = (f"{value * 1e3:.4g}" for value in side["quartiles_s"])
            memory = case["costs"][name]["peak_memory_bytes"] / 1e6
            yield (
                f"    {name:36}{side['median_s'] * 1e3:>10.4g}{f'{low} .. {high}':>20}{side['bytes_per_s'] / 1e9:>9.4g}"
                f"{side['flops_per_s'] / 1e12:>9.3g}{side['of_bound']:>9.1%}{side['speedup']:>7.2f}x{memory:>9.4g}"
                f"{len(side['samples_s']):>4}{throughput(side)}"
            )
    for name, why in (*case["skipped"].items(), *case["failed"].items()):
        yield f"    {name}: not run ({why})"
