"""Matrix products in float32 by csrc/product_cpu.cpp, where a processor has AVX2 and no AVX-512.

What pays: a weight has few rows and is packed whole, at once; the thousands of rows that it meets are read where they
lie. The gradient of a weight is a sum over those thousands of rows: both factors are packed by blocks that stay in a
cache, in the order in which they lie in memory. oneDNN's own kernels for AVX-512 are near that instruction set's rate.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dit_fast import _C
from dit_fast.ops._register import define

_BEST_LEVEL = -1
_LANES = 16


@functools.cache
def _pays() -> bool:
    return _C.unavailable() is None and _C.LEVELS[torch.ops.dit_fast_native.isa_level()] == "avx2"


def takes(a: Tensor, b: Tensor) -> bool:
    """Whether `product(a, b)` is to be preferred to oneDNN's, which has looked at what surrounds them."""
    fits = a.dtype is b.dtype is torch.float32 and 1 in a.stride() and b.shape[1] % _LANES == 0 and b.shape[0] > 0
    return fits and _pays()


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    result = a.new_empty(len(a), b.shape[1])
    torch.ops.dit_fast_native.product(a, b, bias, result, _BEST_LEVEL)
    return result


product = define(
    "product(Tensor a, Tensor b, Tensor? bias) -> Tensor",
    _product,
    lambda a, b, bias: a.new_empty(len(a), b.shape[1]),
)
"""`a b + bias` [M, N]: a [M, K] with contiguous rows or columns, b [K, N], N a multiple of 16, bias [N] contiguous."""


@register_flop_formula(torch.ops.dit_fast.product)
def _flops(a: torch.Size, b: torch.Size, *rest: Any, **options: Any) -> int:
    """Multiply-add = 2."""
    return 2 * a[0] * a[1] * b[1]
