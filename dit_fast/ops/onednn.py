"""oneDNN's linear maps, called as inductor calls them: on the CPU they are faster than what torch's own calls reach.

GFLOP/s of `linear` / of torch's, forward, and of the gradient of x, 2048 rows, one core of a Zen 4, median of 15: fp32
160 x 480 99 / 92, 100 / 84; 384 x 1152 102 / 94, 107 / 94; 384 x 1536 93 / 90, 101 / 82; bf16 160 x 480 199 / 177,
384 x 1152 205 / 180, forward alone, as its gradient is oneDNN's already.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from dit_fast import backend
from dit_fast.ops import product_cpp

_LEAST_ROWS = 256  # below, what the call costs is more than what it saves


@functools.cache
def _has(dtype: torch.dtype) -> bool:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def takes(x: Tensor) -> bool:
    """Whether `linear` can run rows x [..., D]; not in a graph that is compiled: its compiler chooses."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and _has(x.dtype) and x.numel() > 0


def pays(x: Tensor) -> bool:
    """Whether plain torch gives way to it for rows x [..., D]; never where an implementation is forced on all ops."""
    return takes(x) and x.numel() >= _LEAST_ROWS * x.shape[-1] and backend.forced() is None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias`: x [M, D], weight [F, D], bias [F] -> [M, F]; without derivatives. By csrc where it is faster."""
    if product_cpp.takes(x, weight.t()):
        return product_cpp.product(x, weight.t(), bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """`a b` [M, N], a sum over the rows of b [K, N]; without derivatives where there are many. By csrc where faster."""
    if pays(b) and not torch.is_grad_enabled() and product_cpp.takes(a, b):
        return product_cpp.product(a, b, None)
    return torch.mm(a, b)


# torch's op, so another copy of this file, or torch itself, may have said so already.
if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x: torch.Size, weight: torch.Size, *rest: Any, **options: Any) -> int:
        """Multiply-add = 2."""
        return 2 * x[0] * weight[0] * weight[1]
