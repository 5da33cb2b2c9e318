"""Parts of a benchmark: cases with shapes, inputs and sides, and the minimum of bytes and FLOPs.

A side computes outputs from inputs; the harness differentiates them. The first side of a case is the baseline, and
every other one must equal it (or its own `expected`) before any of them is timed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dit_fast.backend import explain, runnable
from dit_fast.benchmarks.ceilings import DTYPES, Ceilings
from dit_fast.models.registry import PRESETS

AnyCase = TypeVar("AnyCase")
Inputs = tuple[Tensor, ...]
Compute = Callable[[Inputs], Inputs]
TOKENS = 256
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward_backward"


@dataclass(frozen=True)
class Setting:
    """Where a benchmark runs. small: shapes for a test of the harness, whose times mean nothing."""

    device: torch.device
    small: bool = False


@dataclass(frozen=True)
class Work:
    """Least bytes to and from memory (each input read once, each output written once) and FLOPs, multiply-add = 2."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Side:
    """One implementation. expected: what its outputs and gradients must equal; None: the baseline's.

    may_fail: somebody else's work (a compiler's, a library's); if it fails or is wrong it is left out, with the reason.
    forward, backward: its least work where that is not the case's.
    """

    name: str
    compute: Compute
    expected: Compute | None = None
    may_fail: bool = False
    forward: Work | None = None
    backward: Work | None = None


@dataclass(frozen=True)
class Case:
    """inputs(generator): fresh leaves on the generator's device; differentiated are those that require gradients.

    tolerance: of outputs and of gradients, as the norm of the difference over the norm.
    """

    name: str
    dtype: str
    shape: dict[str, int]
    inputs: Callable[[torch.Generator], Inputs]
    sides: tuple[Side, ...]
    forward: Work
    backward: Work
    tolerance: tuple[float, float]

    def work(self, side: Side, part: str) -> Work:
        forward, backward = side.forward or self.forward, side.backward or self.backward
        if part == BOTH:
            return Work(forward.bytes + backward.bytes, forward.flops + backward.flops)
        return forward if part == FORWARD else backward


@dataclass(frozen=True)
class Target:
    """A promise about results: `measure(cases as in the JSON, ceilings)` against `wanted`; None: not measured here."""

    text: str
    wanted: float
    measure: Callable[[list[dict[str, Any]], Ceilings], float | None]
    at_most: bool = False


@dataclass(frozen=True)
class Benchmark(Generic[AnyCase]):
    """tests: files below the checkout (patterns allowed) that must pass before a speed is printed."""

    op: str
    tests: tuple[str, ...]
    cases: Callable[[Setting], list[AnyCase]]
    targets: dict[str, tuple[Target, ...]] = field(default_factory=dict)  # by device type


def _sides(cases: list[dict[str, Any]], case: str, part: str) -> dict[str, Any]:
    return next((entry["parts"][part]["sides"] for entry in cases if entry["name"] == case), {})


def speedup_of(
    case: str, side: str, part: str = BOTH, over: Sequence[str] = ()
) -> Callable[[list[dict[str, Any]], Ceilings], float | None]:
    """Measure of a target: ratio of a side of a case to the baseline, or to the fastest of those `over` that ran."""

    def measure(cases: list[dict[str, Any]], _: Ceilings) -> float | None:
        sides = _sides(cases, case, part)
        others = [sides[name]["median_s"] for name in over if name in sides]
        if side not in sides or (over and not others):
            return None
        return min(others) / sides[side]["median_s"] if over else sides[side]["speedup"]

    return measure


def copy_share_of(case: str, side: str, part: str) -> Callable[[list[dict[str, Any]], Ceilings], float | None]:
    """Measure of a target: least bytes per second of one side over the measured copy, in percent."""

    def measure(cases: list[dict[str, Any]], ceilings: Ceilings) -> float | None:
        found = _sides(cases, case, part).get(side)
        return found and 100 * found["bytes_per_s"] / ceilings.copy

    return measure


def normal(generator: torch.Generator, shape: Sequence[int], dtype: str) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device).to(DTYPES[dtype])


def model_shapes(setting: Setting) -> list[tuple[str, int, int, int, str]]:
    """(label, blocks, width, batch, dtype)"""
    if setting.small:
        return [("Nano/2 b2", 6, 160, 2, "fp32")]
    if setting.device.type != "cuda":
        return [("B/2 b16", 12, 768, 16, "fp32")]
    return [
        (f"{size}/2 b{batch}", sizes["depth"], sizes["hidden_size"], batch, dtype)
        for size in ("XL", "B", "L")
        for sizes in [PRESETS[f"SiT-{size}/2"]]
        for batch in (32, 256)
        for dtype in ("bf16", "fp32")
    ]


def row_shapes(setting: Setting) -> list[tuple[str, int, int, str]]:
    """(label, width, batch, dtype) for ops on one stream; on a GPU not every size, and only bf16, their usual dtype."""
    chosen = ("XL/2 b32", "XL/2 b256", "B/2 b256")
    return [
        (label, width, batch, dtype)
        for label, _, width, batch, dtype in model_shapes(setting)
        if setting.device.type != "cuda" or (dtype == "bf16" and label in chosen)
    ]


def autocast(x: Tensor, dtype: str) -> torch.autocast:
    """As in training: parameters stay float32, and matrix products run in the dtype of the streams."""
    return torch.autocast(x.device.type, DTYPES[dtype], enabled=dtype != "fp32")


def differentiate(outputs: Inputs, inputs: Inputs, upstream: Inputs) -> Inputs:
    """Gradients of the outputs that have them (upstream: one for each of these) for the inputs that want them."""
    ends = [output for output in outputs if output.requires_grad]
    return torch.autograd.grad(ends, [x for x in inputs if x.requires_grad], upstream)


def compiled(call: Callable[..., Any], **options: Any) -> Any:
    return torch.compile(call, dynamic=False, **options)


def ours_and_eager(setting: Setting, op: str, call: Callable[..., Any]) -> tuple[Side, ...]:
    """`call(inputs, backend)`: the reference as baseline, what "auto" picks, each implementation that can run by
    its name where there are several, and the reference compiled."""

    def compute(backend: str) -> Compute:
        def run(inputs: Inputs) -> Inputs:
            result = call(inputs, backend)
            return tuple(result) if isinstance(result, tuple) else (result,)

        return run

    sides = [Side("eager", compute("torch"))]
    ours = [name for name in runnable(op, setting.device.type) if name != "torch"]
    if ("torch", "used") not in explain(op, setting.device.type):
        sides.append(Side("dit_fast", compute("auto")))
    if len(ours) > 1 or (ours and len(sides) == 1):
        sides += [Side(f"dit_fast, {name}", compute(name)) for name in ours]
    if setting.device.type == "cuda":
        sides.append(Side("torch.compile", compiled(compute("torch")), may_fail=True))
    return tuple(sides)
