"""Flow matching around the model: noise, interpolant, velocity target, error, and the error's gradient."""

from dataclasses import replace

import torch

from dit_fast import ops
from dit_fast.benchmarks.cases.case import (
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

CHANNELS, SIZE, SEED = 4, 32, 1  # latents of 256 pixels


def _published(inputs: Inputs) -> Inputs:
    """Noise of torch's own generator, so the numbers are others."""
    prediction, latents, t, _ = inputs
    noise, time = torch.randn_like(latents), t.view(-1, 1, 1, 1)
    noised, target = (1 - time) * latents + time * noise, noise - latents
    return ((prediction - target).square().flatten(1).mean(1), noised)


def _ours(inputs: Inputs, backend: str) -> Inputs:
    prediction, latents, t, positions = inputs
    noised = ops.flow_noised(latents, t, positions, SEED, backend=backend)
    return ops.flow_error(prediction, latents, t, positions, SEED, backend=backend), noised


def _cases(setting: Setting) -> list[Case]:
    cases = []
    for batch in sorted({batch for _, _, batch, _ in row_shapes(setting)}):
        elements = batch * CHANNELS * SIZE**2

        def inputs(generator: torch.Generator, batch: int = batch) -> Inputs:
            prediction, latents = (normal(generator, (batch, CHANNELS, SIZE, SIZE), "fp32") for _ in range(2))
            t = torch.rand(batch, generator=generator, device=generator.device)
            return prediction.requires_grad_(), latents, t, torch.arange(batch, device=generator.device)

        sides = ours_and_eager(setting, "flow_error", _ours)
        # No other side draws torch's numbers; ours must equal our reference.
        checked = (replace(side, expected=sides[0].compute) for side in sides)
        everyone = (Side("published", _published), *checked)
        forward, backward = Work(4 * elements * 4, 8 * elements), Work(3 * elements * 4, 4 * elements)
        shape = {"batch": batch, "channels": CHANNELS, "size": SIZE}
        cases.append(Case(f"b{batch} fp32", "fp32", shape, inputs, everyone, forward, backward, (1e-5, 1e-4)))
    return cases


BENCHMARK = Benchmark("flow", ("tests/ops/test_flow*.py",), _cases)
