"""The diversity loss, alone and inside a model, against the published formulation."""

from typing import Any

import torch

from dit_fast import ops
from dit_fast.benchmarks.baselines.published_diversity import published_diversity_loss
from dit_fast.benchmarks.cases.case import (
    TOKENS,
    Benchmark,
    Case,
    Compute,
    Inputs,
    Setting,
    Side,
    Target,
    Work,
    compiled,
    model_shapes,
    normal,
    speedup_of,
)
from dit_fast.benchmarks.ceilings import DTYPES
from dit_fast.methods.diversedit import select_pairs


def _diversity_cases(setting: Setting) -> list[Case]:
    return [case for shape in model_shapes(setting) for case in _diversity_pair(setting, *shape)]


def _diversity_pair(setting: Setting, label: str, blocks: int, width: int, batch: int, dtype: str) -> list[Case]:
    shape = {"blocks": blocks, "batch": batch, "tokens": TOKENS, "width": width}
    pairs, every = select_pairs("release", blocks), blocks * (blocks - 1) // 2
    elements = blocks * batch * TOKENS * width
    size = DTYPES[dtype].itemsize

    def inputs(generator: torch.Generator) -> Inputs:
        # A residual stream: what is common to all blocks, and what each adds.
        common = normal(generator, (batch, TOKENS, width), dtype)
        own = (normal(generator, (batch, TOKENS, width), dtype) for _ in range(blocks))
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
        without_checks = compiled(lambda features: published(features, checks=False))
        sides.append(Side("published, without checks, torch.compile", without_checks, may_fail=True))
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


_SAME, _ALL = "dit_fast, same 10 pairs", "dit_fast, all {} pairs"
BENCHMARK = Benchmark(
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
)
