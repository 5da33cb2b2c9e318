"""A norm with modulation and gated residual, apart and in one."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from dit_fast import ops
from dit_fast.benchmarks.cases.case import (
    BACKWARD,
    FORWARD,
    TOKENS,
    Benchmark,
    Case,
    Inputs,
    Setting,
    Target,
    Work,
    copy_share_of,
    normal,
    ours_and_eager,
    row_shapes,
)
from dit_fast.benchmarks.ceilings import DTYPES

# op: (streams [N, T, D], vectors [N, D], call, stream-sized reads and writes forward and backward, FLOPs per element)
_OPS: dict[str, tuple[int, int, Callable[..., Any], tuple[int, int], tuple[int, int]]] = {
    "layer_norm_modulate": (1, 2, ops.layer_norm_modulate, (2, 3), (9, 16)),
    "gate_residual": (2, 1, ops.gate_residual, (3, 3), (2, 3)),
    "gate_residual_modulate": (2, 3, ops.gate_residual_modulate, (4, 6), (11, 20)),
    "gate_residual_modulate rms": (2, 3, functools.partial(ops.gate_residual_modulate, norm="rms"), (4, 6), (10, 18)),
}
_PROMISED = "gate_residual_modulate, XL/2 b256 bf16"


def _cases(setting: Setting) -> list[Case]:
    cases = []
    for label, width, batch, dtype in row_shapes(setting):
        for op, (streams, vectors, call, passes, flops) in _OPS.items():
            elements, size = batch * TOKENS * width, DTYPES[dtype].itemsize
            shapes = [(batch, TOKENS, width)] * streams + [(batch, width)] * vectors

            def inputs(generator: torch.Generator, shapes: Any = shapes, dtype: str = dtype) -> Inputs:
                return tuple(normal(generator, shape, dtype).requires_grad_() for shape in shapes)

            sides = ours_and_eager(setting, op.split()[0], lambda x, backend, call=call: call(*x, backend=backend))
            forward, backward = (
                Work(count * elements * size, each * elements) for count, each in zip(passes, flops, strict=True)
            )
            shape = {"batch": batch, "tokens": TOKENS, "width": width}
            tolerance = (1e-5, 1e-4) if dtype == "fp32" else (1e-2, 2e-2)
            cases.append(Case(f"{op}, {label} {dtype}", dtype, shape, inputs, sides, forward, backward, tolerance))
    return cases


BENCHMARK = Benchmark(
    "adaln",
    ("tests/ops/test_adaln*.py",),
    _cases,
    {
        "cuda": tuple(
            Target(f"{_PROMISED}, {part}: {wanted} % of the copy", wanted, copy_share_of(_PROMISED, "dit_fast", part))
            for part, wanted in ((FORWARD, 90), (BACKWARD, 85))
        )
    },
)
