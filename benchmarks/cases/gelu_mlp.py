"""The block's MLP: two linear maps with a tanh-approximated GELU between them."""

import torch
from torch import Tensor

from dit_fast import ops
from dit_fast.benchmarks.cases.case import (
    TOKENS,
    Benchmark,
    Case,
    Inputs,
    Setting,
    Work,
    autocast,
    normal,
    ours_and_eager,
    row_shapes,
)
from dit_fast.benchmarks.ceilings import DTYPES

RATIO = 4


def _cases(setting: Setting) -> list[Case]:
    cases = []
    for label, width, batch, dtype in row_shapes(setting):
        rows, size = batch * TOKENS, DTYPES[dtype].itemsize

        def inputs(generator: torch.Generator, width: int = width, batch: int = batch, dtype: str = dtype) -> Inputs:
            hidden = RATIO * width
            shapes = [(hidden, width), (hidden,), (width, hidden), (width,)]
            scales = (width**-0.5, 1.0, hidden**-0.5, 1.0)
            parameters = [s * normal(generator, shape, "fp32") for shape, s in zip(shapes, scales, strict=True)]
            return tuple(x.requires_grad_() for x in (normal(generator, (batch, TOKENS, width), dtype), *parameters))

        def call(inputs: Inputs, backend: str, dtype: str = dtype) -> Tensor:
            x, weight_in, bias_in, weight_out, bias_out = inputs
            with autocast(x, dtype):
                return ops.gelu_mlp(x, weight_in, bias_in, weight_out, bias_out, backend=backend)

        weights, products = 2 * RATIO * width**2 * 4, 4 * RATIO * rows * width**2
        # The backward needs what stands before the GELU, [rows, 4 D]; computing it again would cost a product.
        between = RATIO * rows * width * size
        forward = Work(2 * rows * width * size + between + weights, products)
        backward = Work(3 * rows * width * size + between + 2 * weights, 2 * products)
        shape = {"batch": batch, "tokens": TOKENS, "width": width, "hidden": RATIO * width}
        tolerance = (1e-5, 1e-4) if dtype == "fp32" else (1e-2, 2e-2)
        sides = ours_and_eager(setting, "gelu_mlp", call)
        cases.append(Case(f"{label} {dtype}", dtype, shape, inputs, sides, forward, backward, tolerance))
    return cases


BENCHMARK = Benchmark("gelu_mlp", ("tests/ops/test_gelu_mlp*.py",), _cases)
