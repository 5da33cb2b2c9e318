"""Products of many rows with a weight in float32 by csrc/product_cpu.cpp, where a processor has AVX2 and no AVX-512.

GFLOP/s of `product` / of oneDNN's, forward, and of the gradient of x, 2048 rows, one busy core of a Zen 3, medians of
pairs: 160 x 480 70 / 51, 66 / 60; 160 x 640 70 / 57, 73 / 67; 640 x 160 74 / 61, 62 / 52; 384 x 1152 74 / 62, 68 / 53;
1536 x 384 59 / 57, 61 / 55. oneDNN's own kernels for AVX-512 are near that instruction set's rate.
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


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `product(x, weight.t())` is to be preferred to oneDNN's, which has looked at what surrounds them."""
    fits = x.dtype is torch.float32 and x.stride(1) == 1 and weight.shape[0] % _LANES == 0 and weight.shape[1] > 0
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
"""`a b + bias`: a [M, K] with contiguous rows, b [K, N], N a multiple of 16, bias [N] contiguous -> [M, N]."""


@register_flop_formula(torch.ops.dit_fast.product)
def _flops(a: torch.Size, b: torch.Size, *rest: Any, **options: Any) -> int:
    """Multiply-add = 2."""
    return 2 * a[0] * a[1] * b[1]
