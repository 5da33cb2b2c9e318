"""What backend "cpp" of `gelu_mlp` runs on the CPU: csrc/gelu_cpu.cpp, and oneDNN for products where it is faster.

csrc's arithmetic is in float32, each result rounded once; columns are summed in one fixed order for any number of
threads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_fast.ops import onednn
from dit_fast.ops._op import rows
from dit_fast.ops._register import define

_BEST_LEVEL = -1


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias`: x [M, D], weight [F, D], bias [F] -> [M, F]."""
    return onednn.linear(x, weight, bias) if onednn.takes(x) else F.linear(x, weight, bias)


def _gelu(hidden: Tensor) -> Tensor:
    activation = torch.empty(hidden.shape, dtype=hidden.dtype)
    torch.ops.dit_fast_native.gelu_forward(hidden.contiguous(), activation, _BEST_LEVEL)
    return activation


gelu = define("gelu(Tensor hidden) -> Tensor", _gelu, lambda hidden: hidden.new_empty(hidden.shape))


def backward(
    hidden: Tensor, grad: Tensor, want_activation: bool, want_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Puts the gradient of hidden [M, F] in the place of grad, the activation's. Returns the activation and the sums
    [F] of that gradient's columns in float32. Both inputs are contiguous."""
    activation = torch.empty_like(hidden) if want_activation else None
    grad_bias = torch.empty(hidden.shape[1], dtype=torch.float32) if want_bias else None
    torch.ops.dit_fast_native.gelu_backward(hidden, grad, grad, activation, grad_bias, _BEST_LEVEL)
    return activation, grad_bias


def _column_sums(x: Tensor) -> Tensor:
    if not x.numel():
        return x.sum(0)
    sums = torch.empty(x.shape[1], dtype=torch.float32)
    torch.ops.dit_fast_native.column_sums(rows(x), sums, _BEST_LEVEL)
    return sums.to(x.dtype)


column_sums = define("column_sums(Tensor x) -> Tensor", _column_sums, lambda x: x.new_empty(x.shape[1:]))
