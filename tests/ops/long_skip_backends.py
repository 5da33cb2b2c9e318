"""The analytic backends of the long skip as a fixture: "gemm", a stand-in for the kernels, and the kernels."""

import os
import sys
import types

import pytest
import torch

from dit_fast import kernels
from dit_fast.ops import long_skip_op

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or kernels.unavailable() is not None,
    reason="runs where Triton is installed, with TRITON_INTERPRET=1",
)
# What `_choose` may return. The stand-in follows the kernels' interface in plain torch.
BACKENDS = ["gemm", "stand-in", pytest.param("triton", marks=interpreted)]


def _fold(norm_weight, norm_bias, weight, bias, dtype):
    folded = (norm_weight.float() * weight.float()).to(dtype)
    return folded, folded.float().sum(1), bias.float() + weight.float() @ norm_bias.float()


def _kernel_forward(x, skip, mean, rstd, folded, row_sums, folded_bias, out_dtype):
    centred = torch.cat([x, skip], 1).double() - mean.double()[:, None]
    return (centred @ folded.double().T * rstd[:, None] + folded_bias).to(out_dtype)


def _prepare_backward(grad, y, rstd, row_sums, folded_bias):
    assert grad.is_contiguous()
    width = 2 * grad.shape[1]
    wide = grad.double()
    c1, c2 = (wide * (y.double() - folded_bias)).sum(1) / width, wide @ row_sums.double() / width
    return (rstd[:, None] * grad).to(grad.dtype), c1.float(), c2.float(), grad.float().sum(0)


def _backward_input(grad, x, skip, mean, rstd, folded, c1, c2, needs=(True, True)):
    normalised = (torch.cat([x, skip], 1).double() - mean[:, None]) * rstd[:, None]
    both = rstd[:, None] * (grad.double() @ folded.double() - c2[:, None] - normalised * c1[:, None])
    halves = both.chunk(2, 1)
    return tuple(h.to(like.dtype) if need else None for h, like, need in zip(halves, (x, skip), needs, strict=True))


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param != "stand-in":
        return request.param
    kernel = types.ModuleType("dit_fast.kernels.long_skip")
    kernel.fold, kernel.forward = _fold, _kernel_forward
    kernel.prepare_backward, kernel.backward_input = _prepare_backward, _backward_input
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    monkeypatch.setattr(kernels, "long_skip", kernel, raising=False)
    monkeypatch.setattr(long_skip_op, "_choose", lambda *arguments: "triton")
    return "gemm"
