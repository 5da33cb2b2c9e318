"""QK-norm with the head split, and rotary positions after it: one pass over the fused projection, and one back.

Queries and keys of every head pass a norm over the head's channels and turn; values stay where they are. The gradient
of the projection is written once, values included: split by autograd, it would be assembled from zeros. Nothing is
saved besides the projection, the weights and the tables; statistics are taken again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fast.errors import UserError
from dit_fast.ops._op import Op, check_norm, differentiable, rows, triton, wide
from dit_fast.ops._register import define
from dit_fast.ops.layer_norm import layer_norm, rms_norm


def _refuses(qkv: Tensor, num_heads: int, norm: str, rotary: bool) -> Sequence[str]:
    from dit_fast.kernels import qk_norm as kernel

    if norm == "none" and not rotary:
        return ["without norm and rotary positions only views are taken"]
    return kernel.supports(qkv, num_heads, rotary)


# C: the width of a head
OP = Op("qk_norm", "qkv[N, T, 3HC] q_weight[C] q_bias[C] k_weight[C] k_bias[C] cos[T, C] sin[T, C]", triton(_refuses))


def qk_norm(
    qkv: Tensor,
    num_heads: int,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: float = 1e-5,
    backend: str = "auto",
    norm: str = "layer",
    rotary: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value [N, H, T, d] from qkv [N, T, 3 * H * d], the first two normalised per head, then turned.

    norm: "layer", LayerNorm, "rms", `x / sqrt(mean(x^2) + eps)` (arXiv 1910.07467), or "none". q_weight, q_bias,
    k_weight, k_bias: [d], of any floating dtype; both weights, both biases or neither; no bias with "rms", nothing with
    "none". rotary: cos and sin [T, d], without gradient; neighbours turn (arXiv 2104.09864),

        out[2i] = x[2i] cos[2i] - x[2i + 1] sin[2i]        out[2i + 1] = x[2i + 1] cos[2i + 1] + x[2i] sin[2i + 1]

    The arithmetic is fp32 (fp64 for fp64) and rounded once, to qkv's dtype, under autocast too. The three are
    transposed from [N, T, H, d] with contiguous heads, and value is a view of qkv (do not write into it).
    Differentiable in forward mode and, once, in reverse mode, of the result or of its forward-mode derivative;
    backend="torch", the reference, twice in any combination of the modes.
    Raises UserError for shapes, dtypes or devices that do not fit, ConfigError for a backend that is unknown or cannot
    take these tensors.
    """
    if not isinstance(num_heads, int) or isinstance(num_heads, bool) or num_heads < 1:
        raise UserError(f"qk_norm: num_heads must be an integer of at least 1, not {num_heads!r}")
    check_norm(OP.name, norm, "layer", "rms", "none")
    tensors = _given(norm, q_weight, q_bias, k_weight, k_bias, rotary)
    given = OP.check(backend, eps, {"H": num_heads}, qkv=qkv, **tensors)
    cos, sin = tensors.get("cos"), tensors.get("sin")
    if cos is not None and cos.shape[1] % 2:
        raise UserError(f"qk_norm: heads of width {cos.shape[1]} have no pairs to turn; rotary needs an even width")
    qkv = rows(qkv)
    chosen = OP.choose(backend, qkv.device, qkv, num_heads, norm, cos is not None, given=given)
    parameters = (q_weight, q_bias, k_weight, k_bias, cos, sin, eps, norm)
    if chosen == "torch":
        query, key, value = _reference(qkv, num_heads, *parameters)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return _fused(qkv, num_heads, *parameters, chosen)


def _given(norm: str, q_weight: Any, q_bias: Any, k_weight: Any, k_bias: Any, rotary: Any) -> dict[str, Any]:
    """The tensors beside qkv that are given, by name; UserError where they do not go together."""
    tensors: dict[str, Any] = {}
    for weights, kinds in (
        ({"q_weight": q_weight, "k_weight": k_weight}, ("layer", "rms")),
        ({"q_bias": q_bias, "k_bias": k_bias}, ("layer",)),
    ):
        if any(each is not None for each in weights.values()):
            if norm not in kinds:
                name = next(name for name, each in weights.items() if each is not None)
                raise UserError(f'qk_norm: {name} must be None, as norm "{norm}" has none')
            tensors |= weights
    if rotary is not None:
        if not isinstance(rotary, tuple | list) or len(rotary) != 2:
            raise UserError(f"qk_norm: rotary must be a pair (cos, sin), not {type(rotary).__name__}")
        tensors["cos"], tensors["sin"] = (x.detach() if isinstance(x, Tensor) else x for x in rotary)
    return tensors


def _heads(qkv: Tensor, num_heads: int) -> Tensor:
    """[N, T, 3, H, d]."""
    return qkv.unflatten(-1, (3, num_heads, qkv.shape[-1] // (3 * num_heads)))


def _turn(x: Tensor) -> Tensor:
    """(x[2i], x[2i + 1]) -> (-x[2i + 1], x[2i])."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-second, first], dim=-1).flatten(-2)


def _of_tokens(table: Tensor, dtype: torch.dtype) -> Tensor:
    return table.to(dtype).unsqueeze(1)


def _reference(
    qkv: Tensor, num_heads: int, q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None,
    k_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, norm: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query, key, value = _heads(qkv, num_heads).unbind(2)
    dtype = wide(qkv)

    def transform(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        x = x.to(dtype)
        weight, bias = (None if each is None else each.to(dtype) for each in (weight, bias))
        if norm == "layer":
            x = layer_norm(x, eps, weight, bias)
        elif norm == "rms":
            x = rms_norm(x, eps, weight)
        if cos is not None and sin is not None:
            x = x * _of_tokens(cos, dtype) + _turn(x) * _of_tokens(sin, dtype)
        return x.to(qkv.dtype)

    return transform(query, q_weight, q_bias), transform(key, k_weight, k_bias), value


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _forward(
    qkv: Tensor, q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, num_heads: int, eps: float, norm: str, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if backend == "triton" and qkv.numel():
        from dit_fast.kernels import qk_norm as kernel

        query = _contiguous(q_weight), _contiguous(q_bias)
        key, tables = (_contiguous(k_weight), _contiguous(k_bias)), (_contiguous(cos), _contiguous(sin))
        return kernel.forward(qkv, num_heads, *query, *key, *tables, eps, norm)
    outputs = _reference(qkv, num_heads, q_weight, q_bias, k_weight, k_bias, cos, sin, eps, norm)
    return outputs[0].contiguous(), outputs[1].contiguous()


def _backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, qkv: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, norm: str, biased: bool,
    need_input: bool, need_parameters: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heads = grad_query.shape[2]
    if backend == "triton" and qkv.numel():
        from dit_fast.kernels import qk_norm as kernel

        grads = rows(grad_query), rows(grad_key), rows(grad_value)
        weights, tables = (_contiguous(q_weight), _contiguous(k_weight)), (_contiguous(cos), _contiguous(sin))
        found = kernel.backward(*grads, qkv, *weights, *tables, eps, norm, biased, need_input, need_parameters)
        empty = qkv.new_empty(0)
        return empty if found[0] is None else found[0], empty.float() if found[1] is None else found[1]
    grad_qkv, grad_parameters = _empty_gradients(qkv, heads, q_weight, biased, need_input, need_parameters)
    parts, dtype, places = _heads(qkv, heads).unbind(2), wide(qkv), iter(grad_parameters)
    for part, (grad, weight) in enumerate(((grad_query, q_weight), (grad_key, k_weight))):
        x, grad = parts[part].to(dtype), grad.to(dtype)
        if cos is not None and sin is not None:
            grad = grad * _of_tokens(cos, dtype) - _turn(grad * _of_tokens(sin, dtype))
        scale = None if weight is None else weight.to(dtype)
        grad_x, grad_weight = grad, None
        if norm == "layer":
            _, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
            scale = x.new_ones(x.shape[-1]) if scale is None else scale
            needs = [need_input, need_parameters, False]
            grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
                grad, x, x.shape[-1:], mean, rstd, scale, scale, needs
            )
        elif norm == "rms":
            rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            unit, along = x * rstd, grad if scale is None else grad * scale
            grad_x = rstd * (along - unit * (along * unit).mean(-1, keepdim=True))
            grad_weight = (grad * unit).sum((0, 1, 2))
        if need_input:
            _heads(grad_qkv, heads)[:, :, part] = grad_x
        if need_parameters and weight is not None and grad_weight is not None:
            next(places).copy_(grad_weight)
        if need_parameters and biased:
            next(places).copy_(grad.sum((0, 1, 2)))
    if need_input:
        _heads(grad_qkv, heads)[:, :, 2] = grad_value
    return grad_qkv, grad_parameters


def _empty_gradients(
    qkv: Tensor, heads: int, q_weight: Tensor | None, biased: bool, need_input: bool, need_parameters: bool
) -> tuple[Tensor, Tensor]:
    parts = 2 * ((q_weight is not None) + biased)
    return (
        qkv.new_empty(qkv.shape if need_input else (0,)),
        qkv.new_empty((parts, qkv.shape[-1] // (3 * heads)) if need_parameters else (0,), dtype=wide(qkv)),
    )


def _fake_forward(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    num_heads = rest[-4]
    shape = (*qkv.shape[:2], num_heads, qkv.shape[2] // (3 * num_heads))
    return qkv.new_empty(shape), qkv.new_empty(shape)


def _fake_backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, qkv: Tensor, q_weight: Tensor | None,
    k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, norm: str, biased: bool,
    need_input: bool, need_parameters: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty_gradients(qkv, grad_query.shape[2], q_weight, biased, need_input, need_parameters)


forward_op = define(
    "qk_norm_forward(Tensor qkv, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, Tensor? cos, "
    "Tensor? sin, int num_heads, float eps, str norm, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
backward_op = define(
    "qk_norm_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor qkv, Tensor? q_weight, "
    "Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, str norm, bool biased, bool need_input, "
    "bool need_parameters, str backend) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)


class _QkNorm(torch.autograd.Function):
    """(qkv, H, q_weight, q_bias, k_weight, k_bias, cos, sin, eps, norm, backend) -> query, key, value [N, H, T, d]."""

    @staticmethod
    def forward(
        qkv: Tensor, num_heads: int, q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None,
        k_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, norm: str, backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        query, key = forward_op(qkv, q_weight, q_bias, k_weight, k_bias, cos, sin, num_heads, eps, norm, backend)
        return query.transpose(1, 2), key.transpose(1, 2), _heads(qkv, num_heads).select(2, 2).transpose(1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        qkv, ctx.num_heads, q_weight, q_bias, k_weight, _, cos, sin, ctx.eps, ctx.norm, ctx.backend = inputs
        ctx.places = [place for place in range(2, 6) if inputs[place] is not None]
        ctx.dtypes = [inputs[place].dtype for place in ctx.places]
        ctx.biased = q_bias is not None
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        ctx.save_for_forward(qkv, q_weight, k_weight, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * 11
        forms = (ctx.eps, ctx.norm, ctx.biased, needs[0], any(needs[2:6]))
        above = grad_query.transpose(1, 2), grad_key.transpose(1, 2), grad_value.transpose(1, 2)
        grad_qkv, grad_parameters = backward_op(*above, *ctx.saved_tensors, *forms, ctx.backend)
        grads[0] = grad_qkv if needs[0] else None
        for row, (place, dtype) in enumerate(zip(ctx.places, ctx.dtypes, strict=True)):
            grads[place] = grad_parameters[row].to(dtype) if needs[place] else None
        return tuple(grads)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, _: None, *tangents: Any) -> tuple[Tensor, Tensor, Tensor]:
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        tangent = torch.zeros_like(qkv) if tangent is None else tangent
        parts, dtype = _heads(qkv, ctx.num_heads).unbind(2), wide(qkv)
        changes = _heads(tangent, ctx.num_heads).unbind(2)
        results = []
        for part, weight in enumerate((q_weight, k_weight)):
            x, result = parts[part].to(dtype), changes[part].to(dtype)
            unit = x
            if ctx.norm != "none":
                x = x if ctx.norm == "rms" else x - x.mean(-1, keepdim=True)
                result = result if ctx.norm == "rms" else result - result.mean(-1, keepdim=True)
                rstd = (x.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
                unit = x * rstd
                result = (result - unit * (result * unit).mean(-1, keepdim=True)) * rstd
            result = result if weight is None else result * weight.to(dtype)
            if tangents[2 * part] is not None:
                result = result + unit * tangents[2 * part].to(dtype)
            if tangents[2 * part + 1] is not None:
                result = result + tangents[2 * part + 1].to(dtype)
            if cos is not None:
                result = result * _of_tokens(cos, dtype) + _turn(result) * _of_tokens(sin, dtype)
            results.append(result.to(qkv.dtype))
        return results[0].transpose(1, 2), results[1].transpose(1, 2), changes[2].transpose(1, 2)


_fused = differentiable(_QkNorm, "qk_norm")
