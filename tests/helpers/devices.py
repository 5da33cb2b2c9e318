"""An op on any device: values and gradients of what "auto" picks there against fp64 on the CPU, and no waiting.

Inputs are rounded to their dtype first, so that only the op's own error is seen; sizes are odd.
"""

import functools

import pytest
import torch

from tests.helpers.golden import assert_close

N, T, D = 3, 37, 84
STREAM, VECTOR = (N, T, D), (N, D)


def several(op):
    """The op with a tuple of outputs."""
    return lambda *inputs: out if isinstance(out := op(*inputs), tuple) else (out,)


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


def check_values_and_gradients(op, shapes, dtype, device):
    inputs = make(shapes, dtype)
    outputs, gradients, seeds = with_gradients(op, [x.to(device) for x in inputs])
    expected, expected_gradients, _ = with_gradients(op, [x.double() for x in inputs], seeds)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert_close(ours.cpu(), theirs, TOLERANCE[dtype][0])
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert ours.dtype == dtype
        assert ours.device.type == device.type
        assert_close(ours.cpu(), theirs, TOLERANCE[dtype][1])


def check_no_wait(op, shapes, device):
    """CUDA itself raises where the host waits for it."""
    if device.type != "cuda":
        pytest.skip("only CUDA counts waits")
    inputs = [x.to(device) for x in make(shapes, torch.bfloat16)]
    with_gradients(op, inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = op(*leaves)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    finally:
        torch.cuda.set_sync_debug_mode("default")
