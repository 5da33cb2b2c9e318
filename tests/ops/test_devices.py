"""Every op on every device: values and gradients of what "auto" picks there against fp64 on the CPU, and no waiting.

Inputs are rounded to their dtype first, so that only the op's own error is seen; sizes are odd.
"""

import functools

import pytest
import torch
from golden import assert_close

from dit_fast import ops

N, T, D, K = 3, 37, 84, 5


def diversity(pairs, variant):
    return lambda *features: (ops.diversity_loss(features, pairs, variant).total,)


def tapped(*features):
    taps = ops.DiversityTaps()
    onward = [taps.tap(x) for x in features]
    return (taps.loss("all").total, *onward)


def several(op):
    return lambda *inputs: out if isinstance(out := op(*inputs), tuple) else (out,)


STREAM, VECTOR = (N, T, D), (N, D)
CASES = {
    "diversity all": (diversity("all", "release"), [STREAM] * K),
    "diversity paper": (diversity([(0, 1), (4, 2)], "paper"), [STREAM] * K),
    "diversity all, XL": (diversity("all", "release"), [(1, 67, 1152)] * 28),
    "diversity taps": (tapped, [STREAM] * K),
    "long_skip": (several(ops.long_skip), [STREAM, STREAM, (2 * D,), (2 * D,), (D, 2 * D), (D,)]),
    "layer_norm_modulate": (several(ops.layer_norm_modulate), [STREAM, VECTOR, VECTOR]),
    "gate_residual": (several(ops.gate_residual), [STREAM, STREAM, VECTOR]),
    "gate_residual_modulate": (several(ops.gate_residual_modulate), [STREAM, STREAM, VECTOR, VECTOR, VECTOR]),
}
# outputs, gradients: fp32 arithmetic; in bf16 the roundings of results, of GEMM operands and of a normalised row
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (8e-3, 1.2e-2)}


def make(shapes, dtype):
    generator = torch.Generator().manual_seed(7)
    common = torch.randn(N, T, D, generator=generator)
    draw = functools.partial(torch.randn, generator=generator)
    return [(draw(*shape) + (common if shape == STREAM else 0)).to(dtype) for shape in shapes]


def with_gradients(op, inputs, seeds=None):
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = op(*leaves)
    generator = torch.Generator().manual_seed(9)
    seeds = seeds or [torch.randn(y.shape, generator=generator).to(inputs[0].dtype) for y in outputs]
    upstream = [seed.to(y.device, y.dtype) for seed, y in zip(seeds, outputs, strict=True)]
    return outputs, torch.autograd.grad(outputs, leaves, upstream), seeds


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_values_and_gradients(name, dtype, device):
    op, shapes = CASES[name]
    inputs = make(shapes, dtype)
    outputs, gradients, seeds = with_gradients(op, [x.to(device) for x in inputs])
    expected, expected_gradients, _ = with_gradients(op, [x.double() for x in inputs], seeds)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert_close(ours.cpu(), theirs, TOLERANCE[dtype][0])
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert ours.dtype == dtype
        assert ours.device.type == device.type
        assert_close(ours.cpu(), theirs, TOLERANCE[dtype][1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", list(CASES))
def test_no_wait_for_the_device(name):
    op, shapes = CASES[name]
    inputs = [x.cuda() for x in make(shapes, torch.bfloat16)]
    with_gradients(op, inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = op(*leaves)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    finally:
        torch.cuda.set_sync_debug_mode("default")
