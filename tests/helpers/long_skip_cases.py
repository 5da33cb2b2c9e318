"""Inputs and comparisons for the tests of the long skip, and the implementation that they run."""

import contextlib
import os

import pytest
import torch

from dit_fast.ops import long_skip

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = ("y", "x", "skip", "norm_weight", "norm_bias", "weight", "bias")


@pytest.fixture(params=["triton" if INTERPRETED else "gemm"])
def backend(request):
    """The kernels where they are interpreted, in the process that test_interpreter.py starts; here "gemm"."""
    return request.param


def inputs(rows=(2, 5), width=6, dtype=torch.float64, seed=0):
    """x, skip, norm_weight, norm_bias, weight, bias; a normalised row comes out at about unit scale."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*rows, width), (*rows, width), (2 * width,), (2 * width,), (width, 2 * width), (width,)]
    scales, shifts = (1, 1, 0.3, 0.3, (2 * width) ** -0.5, 0.5), (0, 0, 1, 0, 0, 0)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [(a * draw(shape) + b).to(dtype) for shape, a, b in zip(shapes, scales, shifts, strict=True)]


def stressed(kind, tensors):
    """The same with x and skip far from zero (mean = 100 deviations), or with a few channels 1000 times larger."""
    x, skip, *parameters = tensors
    if kind == "mean 100":
        x, skip = x + 100, skip + 100
    elif kind == "massive":
        x, skip = x.clone(), skip.clone()
        for half in (x, skip):
            half[..., 1::16] *= 1000
    return [x, skip, *parameters]


def upstream_like(shape, dtype=torch.float64, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def autocast(dtype):
    return torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()


def everything(tensors, upstream, cast=None, **options):
    """y and the six gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    with autocast(cast):
        y = long_skip(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def errors(ours, exact):
    """Norm of the error of y and of each gradient, relative to the exact one."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True)]
