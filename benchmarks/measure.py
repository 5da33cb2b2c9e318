"""One case: agreement of its sides, what they cost, and their times in turn."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fast.benchmarks.cases.case import BACKWARD, BOTH, FORWARD, Case, Inputs, Setting, Side, Work, differentiate
from dit_fast.benchmarks.ceilings import Ceilings
from dit_fast.benchmarks.cost import host_waits, peak_memory, traffic
from dit_fast.benchmarks.gate import check_agreement
from dit_fast.benchmarks.timing import Call, cache_bytes, clock_for, interleave, sets_to_rotate, summarise
from dit_fast.errors import UserError

SAMPLES = 50
Sets = Sequence[tuple[Inputs, Inputs]]


def measure_case(case: Case, setting: Setting, ceilings: Ceilings, seconds: float) -> dict[str, Any]:
    """The case as it stands in the JSON. Takes about `seconds`, and at least three rounds of all sides.

    A side that raises or is wrong takes no other with it: it is named with the reason in "failed", or in "skipped" if
    it may fail. Only the first one, against which the others are held, raises what it raises.
    """
    start, device = time.perf_counter(), setting.device
    if device.type == "cuda":
        torch.cuda.empty_cache()  # blocks of earlier cases would crowd the largest ones
    sets = _input_sets(case, device, 0 if setting.small else cache_bytes(device))
    torch.compiler.reset()  # shapes of earlier cases count against the compiler's limit, beyond which it runs eagerly
    errors, costs = {}, {}
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    calls: dict[str, Call] = {}
    for side in case.sides:
        try:
            if side is not case.sides[0]:
                errors[side.name] = check_agreement(case, side, *sets[0])
            costs[side.name] = _costs(side, sets[0], device)
        except Exception as error:  # compiled code and libraries raise whatever they like
            if side is case.sides[0]:
                raise
            (skipped if side.may_fail else failed)[side.name] = reason(error)
            continue
        calls[side.name] = _timed(side, sets)
    left = seconds - (time.perf_counter() - start)
    warm_up = 3 if device.type == "cuda" else 1
    rounds = interleave(calls, clock_for(device), samples=SAMPLES, seconds=left, warm_up=warm_up)
    return {
        "name": case.name,
        "dtype": case.dtype,
        "shape": case.shape,
        "input_sets": len(sets),
        "baseline": case.sides[0].name,
        "skipped": skipped,
        "failed": failed,
        "errors": errors,
        "costs": costs,
        "parts": {
            part: part_entry(
                {name: [pick(times) for times in turns] for name, turns in rounds.items()},
                {side.name: case.work(side, part) for side in case.sides},
                ceilings,
                case.dtype,
            )
            for part, pick in ((FORWARD, _first), (BACKWARD, _second), (BOTH, sum))
        },
    }


def reason(error: Exception) -> str:
    """The first line of what it says, behind its kind where that is not ours."""
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def part_entry(
    samples: Mapping[str, Sequence[float]], works: Mapping[str, Work], ceilings: Ceilings, dtype: str
) -> dict[str, Any]:
    """One part: its sides, from seconds and least work per side; the first side is the baseline.

    speedup is the ratio of medians; paired_speedup the quartiles of the ratio within each round.
    """
    baseline = next(iter(samples.values()))
    sides = {}
    for name, own in samples.items():
        summary, work = summarise(own), works[name]
        ratio = summarise([theirs / ours for theirs, ours in zip(baseline, own, strict=True)])
        bound = ceilings.time_bound(work.bytes, work.flops, dtype)
        sides[name] = {
            "samples_s": [float(f"{value:.6g}") for value in own],
            "median_s": summary.median,
            "quartiles_s": [summary.lower_quartile, summary.upper_quartile],
            "bytes": work.bytes,
            "flops": work.flops,
            "bound_s": bound,
            "bytes_per_s": work.bytes / summary.median,
            "flops_per_s": work.flops / summary.median,
            "of_bound": bound / summary.median,
            "speedup": summarise(baseline).median / summary.median,
            "paired_speedup": [ratio.lower_quartile, ratio.median, ratio.upper_quartile],
        }
    return {"sides": sides}


def _input_sets(case: Case, device: torch.device, cache: int) -> Sets:
    def make(seed: int) -> tuple[Inputs, Inputs]:
        generator = torch.Generator(device).manual_seed(seed)
        inputs = case.inputs(generator)
        outputs = case.sides[0].compute(inputs)
        return inputs, tuple(_upstream(output.detach(), generator) for output in outputs if output.requires_grad)

    first = make(0)
    count = sets_to_rotate(sum(x.nbytes for x in (*first[0], *first[1])), cache)
    return [first, *(make(seed) for seed in range(1, count))]


def _upstream(output: Tensor, generator: torch.Generator) -> Tensor:
    if output.dim() == 0:
        return torch.ones_like(output)
    return torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)


def _timed(side: Side, sets: Sets) -> Call:
    def call(number: int, mark: Callable[[], None]) -> Any:
        inputs, upstream = sets[number % len(sets)]
        outputs = side.compute(inputs)
        mark()
        gradients = differentiate(outputs, inputs, upstream)
        mark()
        return gradients

    return call


def _costs(side: Side, inputs_and_upstream: tuple[Inputs, Inputs], device: torch.device) -> dict[str, int]:
    inputs, upstream = inputs_and_upstream

    def work() -> Inputs:
        return differentiate(side.compute(inputs), inputs, upstream)

    costs = {"peak_memory_bytes": peak_memory(work, device)}
    if not side.may_fail:  # neither a compiled graph nor a library is a sequence of torch's operators
        costs["host_waits"] = host_waits(work, device)
        moved = traffic(work)
        if moved is not None:
            costs["traffic_bytes"] = moved
    return costs


def _first(times: Sequence[float]) -> float:
    return times[0]


def _second(times: Sequence[float]) -> float:
    return times[1]
