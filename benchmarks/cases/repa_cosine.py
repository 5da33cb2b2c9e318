"""REPA's token cosine loss against the released loop over samples."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fast import ops
from dit_fast.benchmarks.cases.case import (
    TOKENS,
    Benchmark,
    Case,
    Inputs,
    Setting,
    Side,
    Work,
    normal,
    ours_and_eager,
    row_shapes,
)
from dit_fast.benchmarks.ceilings import DTYPES

WIDTH = 768  # of the encoder's features (DINOv2-B, as published)


def _published(inputs: Inputs) -> Inputs:
    prediction, target = inputs
    losses: list[Tensor] = []
    for ours, theirs in zip(prediction, target, strict=True):
        cosines = (F.normalize(ours, dim=-1) * F.normalize(theirs, dim=-1)).sum(-1)
        losses.append(-cosines.mean())
    return (torch.stack(losses).mean(),)


def _cases(setting: Setting) -> list[Case]:
    cases = []
    for label, _, batch, dtype in row_shapes(setting):
        if setting.device.type == "cuda" and not label.startswith("XL"):
            continue  # the model's width plays no part
        elements, size = batch * TOKENS * WIDTH, DTYPES[dtype].itemsize

        def inputs(
            generator: torch.Generator, shape: tuple[int, ...] = (batch, TOKENS, WIDTH), dtype: str = dtype
        ) -> Inputs:
            # Alike, as after training: of independent ones the mean cosine is 0, and no error is small beside it.
            prediction, other = (normal(generator, shape, dtype) for _ in range(2))
            return prediction.requires_grad_(), prediction.detach() + 0.7 * other

        sides = ours_and_eager(setting, "repa_cosine", lambda x, backend: ops.repa_cosine(x[0], x[1], backend=backend))
        forward, backward = Work(2 * elements * size, 6 * elements), Work(3 * elements * size, 6 * elements)
        shape = {"batch": batch, "tokens": TOKENS, "width": WIDTH}
        tolerance = (1e-5, 1e-4) if dtype == "fp32" else (1e-2, 2e-2)
        everyone = (Side("published", _published), *sides)
        cases.append(Case(f"b{batch} {dtype}", dtype, shape, inputs, everyone, forward, backward, tolerance))
    return cases


BENCHMARK = Benchmark("repa_cosine", ("tests/ops/test_repa_cosine*.py",), _cases)
