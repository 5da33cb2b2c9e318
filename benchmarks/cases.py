"""What is measured: op -> shapes, inputs, sides, and the bytes and FLOPs that nobody can avoid.

One more op is one more entry of BENCHMARKS: a function that lists its cases. A side computes outputs from inputs; the
harness differentiates them. The first side of a case is the baseline, and every other one must equal it (or its own
`expected`) before any of them is timed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dit_fast import ops
from dit_fast.backend import explain
from dit_fast.benchmarks.baselines.published_diversity import published_diversity_loss
from dit_fast.methods.diversedit import select_pairs
from dit_fast.models.registry import SIZES

AnyCase = TypeVar("AnyCase")
Inputs = tuple[Tensor, ...]
Compute = Callable[[Inputs], Inputs]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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

    forward, backward: its least work where that is not the case's.
    """

    name: str
    compute: Compute
    expected: Compute | None = None
    compiled: bool = False
    forward: Work | None = None
    backward: Work | None = None


@dataclass(frozen=True)
class Case:
    """inputs(generator): fresh leaves on the generator's device; all are differentiated.

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
    """A promise about results: `measure(cases as in the JSON)` against `wanted`; None: not measured here."""

    text: str
    wanted: float
    measure: Callable[[list[dict[str, Any]]], float | None]
    at_most: bool = False


@dataclass(frozen=True)
class Benchmark(Generic[AnyCase]):
    """tests: files below the checkout (patterns allowed) that must pass before a speed is printed."""

    op: str
    tests: tuple[str, ...]
    cases: Callable[[Setting], list[AnyCase]]
    targets: dict[str, tuple[Target, ...]] = field(default_factory=dict)  # by device type


def speedup_of(case: str, side: str, part: str = BOTH) -> Callable[[list[dict[str, Any]]], float | None]:
    """Measure of a target: the ratio to the baseline of one side of one case."""

    def measure(cases: list[dict[str, Any]]) -> float | None:
        for entry in cases:
            if entry["name"] == case and side in entry["parts"][part]["sides"]:
                return entry["parts"][part]["sides"][side]["speedup"]
        return None

    return measure


def _normal(generator: torch.Generator, shape: Sequence[int], dtype: str) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device).to(DTYPES[dtype])


def _shapes(setting: Setting) -> list[tuple[str, int, int, int, str]]:
    """(label, blocks, width, batch, dtype)"""
    if setting.small:
        return [("Nano/2 b2", 6, 160, 2, "fp32")]
    if setting.device.type != "cuda":
        return [("B/2 b16", 12, 768, 16, "fp32")]
    return [
        (f"{size}/2 b{batch}", SIZES[size][1], SIZES[size][0], batch, dtype)
        for size in ("XL", "B", "L")
        for batch in (32, 256)
        for dtype in ("bf16", "fp32")
    ]


# diversity_loss


def _diversity_cases(setting: Setting) -> list[Case]:
    return [case for shape in _shapes(setting) for case in _diversity_pair(setting, *shape)]


def _diversity_pair(setting: Setting, label: str, blocks: int, width: int, batch: int, dtype: str) -> list[Case]:
    shape = {"blocks": blocks, "batch": batch, "tokens": TOKENS, "width": width}
    pairs, every = select_pairs("release", blocks), blocks * (blocks - 1) // 2
    elements = blocks * batch * TOKENS * width
    size = DTYPES[dtype].itemsize

    def inputs(generator: torch.Generator) -> Inputs:
        # A residual stream: what is common to all blocks, and what each adds.
        common = _normal(generator, (batch, TOKENS, width), dtype)
        own = (_normal(generator, (batch, TOKENS, width), dtype) for _ in range(blocks))
        return tuple((common + 0.7 * x).requires_grad_() for x in own)

    def ours(pairs: Any, backend: str = "auto") -> Compute:
        return lambda features: (ops.diversity_loss(features, pairs, backend=backend).total,)

    def published(features: Inputs, checks: bool = True) -> Inputs:
        return (published_diversity_loss(features, checks=checks).total,)

    def work(pairs: int) -> tuple[Work, Work]:
        per_pair = elements // blocks
        return (
            Work(elements * size, 8 * elements + 2 * pairs * per_pair),
            Work(2 * elements * size, 10 * elements + 4 * pairs * per_pair),
        )

    forward, backward = work(len(pairs))
    forward_all, backward_all = work(every)
    sides = [
        Side("published", published),
        Side("published, without checks", lambda features: published(features, checks=False)),
        Side(f"dit_fast, same {len(pairs)} pairs", ours(pairs)),
        Side(f"dit_fast, all {every} pairs", ours("all"), ours("all", "torch"), False, forward_all, backward_all),
    ]
    if setting.device.type == "cuda" and dtype == "bf16" and label in ("XL/2 b32", "B/2 b32"):
        without_checks = torch.compile(lambda features: published(features, checks=False), dynamic=False)
        sides.append(Side("published, without checks, torch.compile", without_checks, compiled=True))
    tolerance = (1e-5, 1e-4) if dtype == "fp32" else (1e-4, 6e-3)
    loss = Case(f"{label} {dtype}", dtype, shape, inputs, tuple(sides), forward, backward, tolerance)
    if setting.device.type == "cuda" and batch == 256:
        return [loss]

    # Inside a model: each block's output also goes on, and the gradient that comes back from there is added.
    def added(features: Inputs) -> Inputs:
        onward = tuple(x.view_as(x) for x in features)
        return (ops.diversity_loss(onward, "all").total, *onward)

    def tapped(features: Inputs) -> Inputs:
        taps = ops.DiversityTaps()
        onward = tuple(taps.tap(x) for x in features)
        return (taps.loss("all").total, *onward)

    backward = Work(3 * elements * size, backward_all.flops + elements)
    tap_sides = (Side("dit_fast, gradients added by autograd", added), Side("dit_fast, taps", tapped))
    inside = Case(f"inside a model, {label} {dtype}", dtype, shape, inputs, tap_sides, forward_all, backward, tolerance)
    return [loss, inside]


# long_skip and the adaLN family: one reference so far; a fused side appears as soon as "auto" is not "torch"


def _ours_and_eager(setting: Setting, op: str, call: Callable[..., Any]) -> tuple[Side, ...]:
    """`call(inputs, backend)`: the reference as baseline, what "auto" picks where that differs, and it compiled."""

    def compute(backend: str) -> Compute:
        def run(inputs: Inputs) -> Inputs:
            result = call(inputs, backend)
            return result if isinstance(result, tuple) else (result,)

        return run

    sides = [Side("eager", compute("torch"))]
    if ("torch", "used") not in explain(op, setting.device.type):
        sides.append(Side("dit_fast", compute("auto")))
    if setting.device.type == "cuda":
        sides.append(Side("torch.compile", torch.compile(compute("torch"), dynamic=False), compiled=True))
    return tuple(sides)


def _row_shapes(setting: Setting) -> list[tuple[str, int, int, str]]:
    """(label, width, batch, dtype); on a GPU only half precision, in which these ops run there, and not every size."""
    chosen = ("XL/2 b32", "XL/2 b256", "B/2 b256")
    return [
        (label, width, batch, dtype)
        for label, _, width, batch, dtype in _shapes(setting)
        if setting.device.type != "cuda" or (dtype == "bf16" and label in chosen)
    ]


def _long_skip(inputs: Inputs, backend: str) -> Tensor:
    x, skip, norm_weight, norm_bias, weight, bias = inputs
    return ops.long_skip(x, skip, norm_weight, norm_bias, weight, bias, backend=backend)


def _long_skip_cases(setting: Setting) -> list[Case]:
    cases = []
    for label, width, batch, dtype in _row_shapes(setting):
        rows, size = batch * TOKENS, DTYPES[dtype].itemsize

        def inputs(generator: torch.Generator, width: int = width, batch: int = batch, dtype: str = dtype) -> Inputs:
            shapes = [(batch, TOKENS, width)] * 2 + [(2 * width,)] * 2 + [(width, 2 * width), (width,)]
            scales = (1.0, 1.0, 1.0, 1.0, width**-0.5, 1.0)
            pairs = zip(shapes, scales, strict=True)
            return tuple((scale * _normal(generator, shape, dtype)).requires_grad_() for shape, scale in pairs)

        sides = _ours_and_eager(setting, "long_skip", _long_skip)
        weights = 2 * width**2
        forward = Work((3 * rows * width + weights) * size, 4 * rows * width**2)
        backward = Work((6 * rows * width + 2 * weights) * size, 8 * rows * width**2)
        shape = {"batch": batch, "tokens": TOKENS, "width": width}
        tolerance = (1e-5, 1e-4) if dtype == "fp32" else (1e-2, 2e-2)
        cases.append(Case(f"{label} {dtype}", dtype, shape, inputs, sides, forward, backward, tolerance))
    return cases


# op: (streams [N, T, D], vectors [N, D], call, tensor-sized reads and writes forward and backward, FLOPs per element)
_ADALN: dict[str, tuple[int, int, Callable[..., Any], tuple[int, int], tuple[int, int]]] = {
    "layer_norm_modulate": (1, 2, ops.layer_norm_modulate, (2, 3), (9, 16)),
    "gate_residual": (2, 1, ops.gate_residual, (3, 3), (2, 3)),
    "gate_residual_modulate": (2, 3, ops.gate_residual_modulate, (4, 6), (11, 20)),
}


def _adaln_cases(setting: Setting) -> list[Case]:
    cases = []
    for label, width, batch, dtype in _row_shapes(setting):
        for op, (streams, vectors, call, passes, flops) in _ADALN.items():
            elements, size = batch * TOKENS * width, DTYPES[dtype].itemsize
            shapes = [(batch, TOKENS, width)] * streams + [(batch, width)] * vectors

            def inputs(generator: torch.Generator, shapes: Any = shapes, dtype: str = dtype) -> Inputs:
                return tuple(_normal(generator, shape, dtype).requires_grad_() for shape in shapes)

            sides = _ours_and_eager(setting, op, lambda x, backend, call=call: call(*x, backend=backend))
            forward, backward = (
                Work(count * elements * size, each * elements) for count, each in zip(passes, flops, strict=True)
            )
            shape = {"batch": batch, "tokens": TOKENS, "width": width}
            tolerance = (1e-5, 1e-4) if dtype == "fp32" else (1e-2, 2e-2)
            cases.append(Case(f"{op}, {label} {dtype}", dtype, shape, inputs, sides, forward, backward, tolerance))
    return cases


_SAME, _ALL = "dit_fast, same 10 pairs", "dit_fast, all {} pairs"
BENCHMARKS: dict[str, Benchmark[Case]] = {
    benchmark.op: benchmark
    for benchmark in (
        Benchmark(
            "diversity_loss",
            ("tests/ops/test_diversity*.py",),
            _diversity_cases,
            {
                "cpu": (
                    Target("same 10 pairs, forward + backward: 10x published", 10, speedup_of("B/2 b16 fp32", _SAME)),
                    Target(
                        "all 66 pairs, forward + backward: 5x published with 10",
                        5,
                        speedup_of("B/2 b16 fp32", _ALL.format(66)),
                    ),
                ),
                "cuda": tuple(
                    Target(
                        f"XL/2 {batch} bf16, all pairs, forward + backward: 30x published with 10",
                        30,
                        speedup_of(f"XL/2 {batch} bf16", _ALL.format(378)),
                    )
                    for batch in ("b32", "b256")
                ),
            },
        ),
        Benchmark("long_skip", ("tests/ops/test_long_skip*.py",), _long_skip_cases),
        Benchmark("adaln", ("tests/ops/test_adaln*.py",), _adaln_cases),
    )
}
