"""The flow-matching ops as torch ops over rows [N, E]; `flow_reference.py` has the formulas.

d error_n / d prediction = (2/E) (prediction - v),     d error_n / d latents = -alpha'(t) times that,
d noised / d latents = alpha(t).
"""

from typing import Any

import torch
from torch import Tensor

from dit_fast import kernels
from dit_fast.backend import Implementation, choose, register
from dit_fast.errors import UserError
from dit_fast.ops import _library, flow_reference
from dit_fast.ops.flow_reference import path_coefficients, per_sample, velocity, wide
from dit_fast.philox import Stream

for _op in ("flow_noised", "flow_error"):
    register(_op, Implementation("triton", kernels.devices(), kernels.unavailable))


def supports(backend: str = "triton", **tensors: Tensor) -> list[str]:
    """Reasons why the fused implementation cannot take latents=... and prediction=...; empty if it can."""
    from dit_fast.kernels import flow as kernel

    return kernel.supports(**tensors)


def choose_for(op: str, backend: str, **tensors: Tensor) -> str:
    """The implementation that runs `op` on these tensors, named as for `supports`."""
    return choose(op, backend, tensors["latents"].device.type, lambda name: supports(name, **tensors))


def _unsigned(seed: int) -> int:
    """A torch op takes signed 64-bit integers."""
    return seed + (1 << 64) if seed < 0 else seed


def _signed(seed: int) -> int:
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _noised(latents: Tensor, t: Tensor, positions: Tensor, seed: int, path: str, backend: str) -> Tensor:
    if choose_for("flow_noised", backend, latents=latents) == "triton":
        from dit_fast.kernels import flow as kernel

        return kernel.noised(_rows(latents), t, positions, _unsigned(seed), Stream.NOISE, path)
    return flow_reference.noised(latents, t, positions, _unsigned(seed), path)


def _error(
    prediction: Tensor, latents: Tensor, t: Tensor, positions: Tensor, seed: int, path: str, backend: str
) -> Tensor:
    if choose_for("flow_error", backend, prediction=prediction, latents=latents) == "triton":
        from dit_fast.kernels import flow as kernel

        rows = _rows(prediction), _rows(latents)
        return kernel.error(*rows, t, positions, _unsigned(seed), Stream.NOISE, path)
    return flow_reference.error(prediction, latents, t, positions, _unsigned(seed), path)


def _error_backward(
    upstream: Tensor,
    prediction: Tensor,
    latents: Tensor,
    t: Tensor,
    positions: Tensor,
    seed: int,
    path: str,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    if choose_for("flow_error", backend, prediction=prediction, latents=latents) == "triton":
        from dit_fast.kernels import flow as kernel

        rows, key = (_rows(prediction), _rows(latents)), (_unsigned(seed), Stream.NOISE, path)
        grads = kernel.backward(upstream, *rows, t, positions, *key, (needs[0], needs[1]))
        return [grad for grad in grads if grad is not None]
    x = latents.to(upstream.dtype)
    target = velocity(x, t, positions, _unsigned(seed), path)
    grad = (2 / x.shape[1]) * upstream[:, None] * (prediction.to(x.dtype) - target)
    along = -path_coefficients(path, per_sample(t, x)).d_alpha * grad
    pairs = zip((grad, along), (prediction, latents), needs, strict=True)
    return [each.to(like.dtype) for each, like, needed in pairs if needed]


def _fake_backward(upstream: Tensor, prediction: Tensor, latents: Tensor, *rest: Any) -> list[Tensor]:
    pairs = zip((prediction, latents), rest[4], strict=True)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x, needed in pairs if needed]


_KEY = "Tensor t, Tensor positions, int seed, str path"
noised_op = _library.define(
    f"flow_noised(Tensor latents, {_KEY}, str backend) -> Tensor",
    _noised,
    lambda latents, *rest: latents.new_empty(latents.shape, dtype=wide(latents)),
)
error_op = _library.define(
    f"flow_error(Tensor prediction, Tensor latents, {_KEY}, str backend) -> Tensor",
    _error,
    lambda prediction, latents, *rest: latents.new_empty(len(latents), dtype=wide(prediction, latents)),
)
error_backward_op = _library.define(
    f"flow_error_backward(Tensor upstream, Tensor prediction, Tensor latents, {_KEY}, bool[] needs, str backend)"
    " -> Tensor[]",
    _error_backward,
    _fake_backward,
)


class _Noised(torch.autograd.Function):
    """(latents [N, E], t, positions, signed seed, path, backend) -> x_t [N, E]."""

    @staticmethod
    def forward(latents: Tensor, t: Tensor, positions: Tensor, seed: int, path: str, backend: str) -> Tensor:
        return noised_op(latents, t, positions, seed, path, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        latents, t, _, _, ctx.path, _ = inputs
        ctx.dtype, ctx.wide = latents.dtype, output.dtype
        ctx.set_materialize_grads(False)  # no tangent is None, which tells a fixed t from one that has a tangent
        ctx.save_for_backward(t)
        ctx.save_for_forward(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None, None, None]:
        if grad is None:
            return None, None, None, None, None, None
        alpha = path_coefficients(ctx.path, per_sample(ctx.saved_tensors[0], grad)).alpha
        return (alpha * grad).to(ctx.dtype), None, None, None, None, None


class _NoisedWithTangent(_Noised):
    """The same with a forward-mode rule in plain tensor operations; the compiler refuses functions that have one."""

    @staticmethod
    def jvp(ctx: Any, latents: Tensor, t: Tensor | None, *_: None) -> Tensor:
        _library.once_in_forward_mode("flow_noised")
        _refuse(t, "flow_noised")
        change = latents.to(ctx.wide)
        return path_coefficients(ctx.path, per_sample(ctx.saved_tensors[0], change)).alpha * change


class _Error(torch.autograd.Function):
    """(prediction [N, E], latents [N, E], t, positions, signed seed, path, backend) -> mean squared error [N]."""

    @staticmethod
    def forward(
        prediction: Tensor, latents: Tensor, t: Tensor, positions: Tensor, seed: int, path: str, backend: str
    ) -> Tensor:
        return error_op(prediction, latents, t, positions, seed, path, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.seed, ctx.path, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    @_library.once_differentiable("flow_error")
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        needs = list(ctx.needs_input_grad[:2])
        grads = iter(error_backward_op(upstream, *ctx.saved_tensors, ctx.seed, ctx.path, needs, ctx.backend))
        return *(next(grads) if needed else None for needed in needs), None, None, None, None, None


class _ErrorWithTangent(_Error):
    """The same with a forward-mode rule in plain tensor operations; the compiler refuses functions that have one."""

    @staticmethod
    def jvp(ctx: Any, prediction: Tensor | None, latents: Tensor | None, t: Tensor | None, *_: None) -> Tensor:
        _library.once_in_forward_mode("flow_error")
        _refuse(t, "flow_error")
        p, x, times, positions = ctx.saved_tensors
        dtype = wide(p, x)
        x = x.to(dtype)
        change = torch.zeros_like(x) if prediction is None else prediction.to(dtype)
        if latents is not None:
            d_alpha = path_coefficients(ctx.path, per_sample(times, x)).d_alpha
            change = change - d_alpha * latents.to(dtype)
        difference = p.to(dtype) - velocity(x, times, positions, _unsigned(ctx.seed), ctx.path)
        return 2 * (difference * change).mean(1)


def _refuse(t: Tensor | None, op: str) -> None:
    if t is not None:
        raise UserError(f'{op}: t has no tangent here; use backend="torch"')


def noised(latents: Tensor, t: Tensor, positions: Tensor, seed: int, path: str, backend: str) -> Tensor:
    """x_t [N, E] of latents [N, E], differentiable in latents in both modes."""
    function = _Noised if torch.compiler.is_compiling() else _NoisedWithTangent
    return function.apply(latents, t, positions, _signed(seed), path, backend)


def error(
    prediction: Tensor, latents: Tensor, t: Tensor, positions: Tensor, seed: int, path: str, backend: str
) -> Tensor:
    """Mean squared error of the velocity [N], differentiable in prediction and latents [N, E] in both modes."""
    function = _Error if torch.compiler.is_compiling() else _ErrorWithTangent
    return function.apply(prediction, latents, t, positions, _signed(seed), path, backend)
