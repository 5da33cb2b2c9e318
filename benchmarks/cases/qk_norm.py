"""QK-norm with the head split: LayerNorm, and RMSNorm with rotary positions."""

import torch

from dit_fast import ops
from dit_fast.benchmarks.cases.case import (
    TOKENS,
    Benchmark,
    Case,
    Inputs,
    Setting,
    Work,
    normal,
    ours_and_eager,
    row_shapes,
)
from dit_fast.benchmarks.ceilings import DTYPES
from dit_fast.models.registry import PRESETS


def _cases(setting: Setting) -> list[Case]:
    cases = []
    for label, width, batch, dtype in row_shapes(setting):
        heads = PRESETS[f"SiT-{label.split('/')[0]}/2"]["num_heads"]
        head_width, elements, size = width // heads, batch * TOKENS * width, DTYPES[dtype].itemsize

        def inputs(
            generator: torch.Generator,
            shape: tuple[int, ...] = (batch, TOKENS, 3 * width),
            head_width: int = head_width,
            dtype: str = dtype,
        ) -> Inputs:
            parameters = (normal(generator, (head_width,), "fp32") for _ in range(4))
            return tuple(x.requires_grad_() for x in (normal(generator, shape, dtype), *parameters))

        def call(inputs: Inputs, backend: str, heads: int = heads) -> Inputs:
            qkv, q_weight, q_bias, k_weight, k_bias = inputs
            return ops.qk_norm(qkv, heads, q_weight, q_bias, k_weight, k_bias, backend=backend)

        def modern(inputs: Inputs, backend: str, heads: int = heads) -> Inputs:
            qkv, q_weight, cos, k_weight, sin = inputs
            weights = (q_weight, None, k_weight, None)
            return ops.qk_norm(qkv, heads, *weights, 1e-6, backend, "rms", (cos, sin))

        def modern_inputs(
            generator: torch.Generator,
            shape: tuple[int, ...] = (batch, TOKENS, 3 * width),
            head_width: int = head_width,
            dtype: str = dtype,
        ) -> Inputs:
            cos, sin = (normal(generator, (TOKENS, head_width), "fp32") for _ in range(2))
            qkv, q_weight, k_weight = (
                normal(generator, size, kind).requires_grad_()
                for size, kind in ((shape, dtype), ((head_width,), "fp32"), ((head_width,), "fp32"))
            )
            return qkv, q_weight, cos, k_weight, sin

        # Queries and keys are read and written; values stay where they are. Back: all gradients in, all out.
        forward, backward = Work(4 * elements * size, 16 * elements), Work(8 * elements * size, 32 * elements)
        shape = {"batch": batch, "tokens": TOKENS, "heads": heads, "head_width": head_width}
        tolerance = (1e-5, 1e-4) if dtype == "fp32" else (1e-2, 2e-2)
        for form, compute, make in (("", call, inputs), ("rms rotary, ", modern, modern_inputs)):
            sides = ours_and_eager(setting, "qk_norm", compute)
            cases.append(Case(f"{form}{label} {dtype}", dtype, shape, make, sides, forward, backward, tolerance))
    return cases


BENCHMARK = Benchmark("qk_norm", ("tests/ops/test_qk_norm*.py",), _cases)
