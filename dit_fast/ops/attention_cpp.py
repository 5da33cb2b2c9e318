"""Self-attention on the CPU in C++ (csrc/attention_cpu.cpp), over queries, keys and values as their projection leaves
them: nothing is copied into heads, and their gradient is one buffer.

ms forward + backward of `attention` / torch's SDPA / plain products, [N, H, T, d] on one core of a Zen 4, median of 8:
fp32 [32, 5, 64, 32] 6.6 / 9.5 / 10.4, [8, 6, 256, 64] 38 / 49 / 58, [2, 6, 1024, 64] 146 / 198 / 207; bf16 6.4 / 35 /
7.2, 41 / 65 / 31, 147 / 177 / 98.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dit_fast import _C, backend
from dit_fast.ops._op import differentiable, odd_dtypes
from dit_fast.ops._register import define
from dit_fast.ops.linear import transformed

_LANES = 16
_BEST_LEVEL = -1
_LONGEST = {torch.bfloat16: 64}  # tokens; beyond, products by instructions that read bf16 are faster than ours in fp32


def takes(qkv: Tensor, num_heads: int) -> bool:
    """Whether `attention` is for this packed projection; never in a graph that is compiled, nor where an implementation
    is forced on every op."""
    if torch.compiler.is_compiling() or qkv.device.type != "cpu" or backend.forced() is not None or transformed():
        return False
    fits = qkv.shape[-1] % (3 * num_heads * _LANES) == 0 and qkv.numel() > 0 and not odd_dtypes(qkv)
    return fits and qkv.shape[1] <= _LONGEST.get(qkv.dtype, qkv.shape[1]) and _C.unavailable() is None


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head.

    qkv: [N, T, 3 H d], three parts of H heads d wide, d a multiple of 16; float32, bfloat16 or float16. Returns
    [N, T, H d] in its dtype; arithmetic is in float32, every result is rounded once. Differentiates once.
    """
    mixed: Tensor = _attention(qkv, num_heads)[0]
    return mixed


def _forward(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    mixed, log_sums = _empty(qkv, heads)
    torch.ops.dit_fast_native.attention_forward(qkv.contiguous(), mixed, log_sums, heads, _BEST_LEVEL)
    return mixed, log_sums


def _empty(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    samples, tokens, width = qkv.shape
    return qkv.new_empty(samples, tokens, width // 3), qkv.new_empty(samples, heads, tokens, dtype=torch.float32)


def _backward(grad: Tensor, qkv: Tensor, mixed: Tensor, log_sums: Tensor, heads: int) -> Tensor:
    result = torch.empty(qkv.shape, dtype=qkv.dtype)
    torch.ops.dit_fast_native.attention_backward(
        grad.contiguous(), qkv.contiguous(), mixed, log_sums, result, heads, _BEST_LEVEL
    )
    return result


forward_op = define("attention_forward(Tensor qkv, int heads) -> (Tensor, Tensor)", _forward, _empty)
backward_op = define(
    "attention_backward(Tensor grad, Tensor qkv, Tensor mixed, Tensor log_sums, int heads) -> Tensor",
    _backward,
    lambda grad, qkv, *rest: qkv.new_empty(qkv.shape),
)


@register_flop_formula(torch.ops.dit_fast.attention_forward)
def _forward_flops(qkv: torch.Size, *rest: Any, **options: Any) -> int:
    """Of the two products, multiply-add = 2, as torch's counter counts an SDPA."""
    return 4 * qkv[0] * qkv[1] ** 2 * qkv[2] // 3


@register_flop_formula(torch.ops.dit_fast.attention_backward)
def _backward_flops(grad: torch.Size, qkv: torch.Size, *rest: Any, **options: Any) -> int:
    return 10 * qkv[0] * qkv[1] ** 2 * qkv[2] // 3


class _Attention(torch.autograd.Function):
    """(qkv, heads) -> the mixed values [N, T, H d] and the logarithms of the weights' sums [N, H, T]."""

    @staticmethod
    def forward(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        return forward_op(qkv, heads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.heads = inputs[1]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        return (None if grad is None else backward_op(grad, *ctx.saved_tensors, ctx.heads)), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise AssertionError("takes() leaves forward mode to others")


_attention = differentiable(_Attention, "attention", 'attention="math"')
