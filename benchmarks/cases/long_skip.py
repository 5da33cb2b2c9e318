"""The long skip against the released formulation, torch.compile and other libraries' LayerNorm before a linear map."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fast import ops
from dit_fast.benchmarks.baselines.layer_norms import NAMES, layer_norms
from dit_fast.benchmarks.cases.case import (
    TOKENS,
    Benchmark,
    Case,
    Inputs,
    Setting,
    Side,
    Target,
    Work,
    autocast,
    compiled,
    normal,
    ours_and_eager,
    row_shapes,
    speedup_of,
)
from dit_fast.benchmarks.ceilings import DTYPES

MAX_AUTOTUNE = "torch.compile, max-autotune"
SEARCHED = ("XL/2 b256 bf16", "B/2 b256 bf16")  # searching takes the compiler long


def _long_skip(dtype: str) -> Callable[[Inputs, str], Tensor]:
    def call(inputs: Inputs, backend: str) -> Tensor:
        x, skip, norm_weight, norm_bias, weight, bias = inputs
        with autocast(x, dtype):
            return ops.long_skip(x, skip, norm_weight, norm_bias, weight, bias, backend=backend)

    return call


def _with_library(norm: Callable[[Tensor, Tensor, Tensor, float], Tensor], dtype: str) -> Callable[[Inputs], Inputs]:
    def compute(inputs: Inputs) -> Inputs:
        x, skip, norm_weight, norm_bias, weight, bias = inputs
        with autocast(x, dtype):
            joined = torch.cat([x, skip], dim=-1)
            return (F.linear(norm(joined, norm_weight.to(x.dtype), norm_bias.to(x.dtype), 1e-6), weight, bias),)

    return compute


def _cases(setting: Setting) -> list[Case]:
    cases = []
    for label, width, batch, dtype in row_shapes(setting):
        rows, size, name = batch * TOKENS, DTYPES[dtype].itemsize, f"{label} {dtype}"

        def inputs(generator: torch.Generator, width: int = width, batch: int = batch, dtype: str = dtype) -> Inputs:
            streams = [normal(generator, (batch, TOKENS, width), dtype) for _ in range(2)]
            shapes = [(2 * width,), (2 * width,), (width, 2 * width), (width,)]
            scales = (1.0, 1.0, width**-0.5, 1.0)
            parameters = [s * normal(generator, shape, "fp32") for shape, s in zip(shapes, scales, strict=True)]
            return tuple(x.requires_grad_() for x in (*streams, *parameters))

        call = _long_skip(dtype)
        sides = list(ours_and_eager(setting, "long_skip", call))
        if setting.device.type == "cuda":
            if name in SEARCHED:
                searched: Any = compiled(lambda x, call=call: (call(x, "torch"),), mode="max-autotune-no-cudagraphs")
                sides.append(Side(MAX_AUTOTUNE, searched, may_fail=True))
            libraries = layer_norms().items()
            sides += [
                Side(f"{library} + linear", _with_library(norm, dtype), may_fail=True) for library, norm in libraries
            ]
        weights = 2 * width**2 * 4
        forward = Work(3 * rows * width * size + weights, 4 * rows * width**2)
        backward = Work(6 * rows * width * size + 2 * weights, 8 * rows * width**2)
        shape = {"batch": batch, "tokens": TOKENS, "width": width}
        tolerance = (1e-5, 1e-4) if dtype == "fp32" else (1e-2, 2e-2)
        cases.append(Case(name, dtype, shape, inputs, tuple(sides), forward, backward, tolerance))
    return cases


BENCHMARK = Benchmark(
    "long_skip",
    ("tests/ops/test_long_skip*.py",),
    _cases,
    {
        "cuda": (
            Target("XL/2 b256, forward + backward: 2x eager", 2, speedup_of(SEARCHED[0], "dit_fast")),
            *(
                Target(f"{case}: {wanted}x torch.compile max-autotune", wanted,
                       speedup_of(case, "dit_fast", over=(MAX_AUTOTUNE,)))
                for case, wanted in zip(SEARCHED, (1.1, 1.2), strict=True)
            ),
            Target("XL/2 b256: 1.1x the fastest library's LayerNorm + linear", 1.1,
                   speedup_of(SEARCHED[0], "dit_fast", over=[f"{library} + linear" for library in NAMES])),
        )
    },
)  # fmt: skip
