"""Flow matching with noise that is drawn where it is needed: the interpolant, and the error of the velocity.

The noise of a sample is a function of its position, so no tensor has to carry it; flow_reference.py has the formulas.
The fused implementation makes it again in registers wherever it is used: one launch before the model, one after, one
backward, and neither noise nor target is ever stored. From the same integers its normals equal those of
dit_fast/philox.py to 1e-5 relative, 1e-6 absolute. With E elements in a sample,

    d error_n / d prediction = (2/E) (prediction - v),     d error_n / d latents = -alpha'(t) times that,
    d noised / d latents = alpha(t).

Source: SiT (arXiv 2401.08740), Sec. 2.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fast.errors import UserError
from dit_fast.ops import flow_reference
from dit_fast.ops._op import Op, differentiable, rows, spread, triton, wide
from dit_fast.ops._register import define
from dit_fast.ops.flow_reference import PATHS, path_coefficients, per_sample, velocity
from dit_fast.philox import Stream


def _refuses(latents: Tensor, prediction: Tensor | None = None) -> Sequence[str]:
    from dit_fast.kernels import flow as kernel

    return kernel.supports(**({} if prediction is None else {"prediction": prediction}), latents=latents)


_TENSORS = "latents[N, ...] t[N] int64 positions[N]"
NOISED = Op("flow_noised", _TENSORS, triton(_refuses), nonempty=True)
ERROR = Op("flow_error", f"{_TENSORS} prediction[N, ...]", triton(_refuses), nonempty=True)


def flow_noised(
    latents: Tensor, t: Tensor, positions: Tensor, seed: int, path: str = "linear", backend: str = "auto"
) -> Tensor:
    """x_t = alpha(t) latents + sigma(t) noise, [N, ...] in at least float32.

    latents: [N, ...]; t: [N] in [0, 1]; positions: int64 [N], each sample's position in the run; seed: of the run, 0 <=
    seed < 2^64; path: "linear" or "cosine". Latents may need a gradient (training through the autoencoder, as REPA-E
    does); t may not. Raises UserError for shapes, dtypes, devices, seeds or paths that do not fit, ConfigError for a
    backend that is unknown or cannot run.
    """
    given = NOISED.check(backend, latents=latents, t=t, positions=positions)
    _check_key(NOISED, latents, t, seed, path)
    chosen = NOISED.choose(backend, latents.device, latents, given=given)
    if chosen == "torch" and not torch.compiler.is_compiling():  # inductor's 64-bit products give other noise
        return flow_reference.noised(latents, t, positions, seed, path)
    return _fused_noised(latents.flatten(1), t, positions, _signed(seed), path, chosen).view(latents.shape)


def flow_error(
    prediction: Tensor,
    latents: Tensor,
    t: Tensor,
    positions: Tensor,
    seed: int,
    path: str = "linear",
    backend: str = "auto",
) -> Tensor:
    """Mean over all but the first dimension of (prediction - v)^2, [N] in at least float32.

    v is the velocity at t of the path from latents to the noise of `flow_noised` with the same arguments. prediction:
    shape of latents, dtypes may differ. Arithmetic is float32, or float64 where an input is; autocast changes nothing.
    Prediction and latents may need a gradient; one that does not costs nothing. "torch" is plain autograd; "triton"
    differentiates in forward mode and, once, in reverse mode, of the error or of its forward-mode derivative. Raises as
    `flow_noised`.
    """
    given = ERROR.check(backend, latents=latents, t=t, positions=positions, prediction=prediction)
    _check_key(ERROR, latents, t, seed, path)
    chosen = ERROR.choose(backend, latents.device, latents, prediction, given=given)
    if chosen == "torch" and not torch.compiler.is_compiling():
        return flow_reference.error(prediction, latents, t, positions, seed, path)
    return _fused_error(prediction.flatten(1), latents.flatten(1), t, positions, _signed(seed), path, chosen)


def draws_noise_in_registers(latents: Tensor) -> bool:
    """Whether "auto" is a fused implementation for these latents, so that drawing noise twice costs next to nothing."""
    return ERROR.choose("auto", latents.device, latents) != "torch"


def _check_key(op: Op, latents: Tensor, t: Tensor, seed: int, path: str) -> None:
    if path not in PATHS:
        raise UserError(f"{op.name}: unknown path '{path}'; valid: {', '.join(PATHS)}")
    if not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise UserError(f"{op.name}: seed must be an integer, 0 <= seed < 2^64, not {seed!r}")
    if latents.dim() < 2:
        raise UserError(f"{op.name}: latents must be [N, ...] with at least two dimensions, not {list(latents.shape)}")
    if t.requires_grad:
        raise UserError(f"{op.name}: t gets no gradient; pass t.detach()")


def _unsigned(seed: int) -> int:
    """A torch op takes signed 64-bit integers."""
    return seed + (1 << 64) if seed < 0 else seed


def _signed(seed: int) -> int:
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _noised(latents: Tensor, t: Tensor, positions: Tensor, seed: int, path: str, backend: str) -> Tensor:
    if backend == "triton":
        from dit_fast.kernels import flow as kernel

        return kernel.noised(rows(latents), t, positions, _unsigned(seed), Stream.NOISE, path)
    return flow_reference.noised(latents, t, positions, _unsigned(seed), path)


def _error(
    prediction: Tensor, latents: Tensor, t: Tensor, positions: Tensor, seed: int, path: str, backend: str
) -> Tensor:
    if backend == "triton":
        from dit_fast.kernels import flow as kernel

        return kernel.error(rows(prediction), rows(latents), t, positions, _unsigned(seed), Stream.NOISE, path)
    return flow_reference.error(prediction, latents, t, positions, _unsigned(seed), path)


def _error_backward(
    upstream: Tensor,
    prediction: Tensor,
    latents: Tensor,
    t: Tensor,
    positions: Tensor,
    seed: int,
    path: str,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    if backend == "triton":
        from dit_fast.kernels import flow as kernel

        inputs, wanted = (rows(prediction), rows(latents)), (needs[0], needs[1])
        grads = kernel.backward(upstream, *inputs, t, positions, _unsigned(seed), Stream.NOISE, path, wanted)
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
noised_op = define(
    f"flow_noised(Tensor latents, {_KEY}, str backend) -> Tensor",
    _noised,
    lambda latents, *rest: latents.new_empty(latents.shape, dtype=wide(latents)),
)
error_op = define(
    f"flow_error(Tensor prediction, Tensor latents, {_KEY}, str backend) -> Tensor",
    _error,
    lambda prediction, latents, *rest: latents.new_empty(len(latents), dtype=wide(prediction, latents)),
)
error_backward_op = define(
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

    @staticmethod
    def jvp(ctx: Any, latents: Tensor, t: Tensor | None, *_: None) -> Tensor:
        _refuse(t, "flow_noised")
        change = latents.to(ctx.wide)
        return path_coefficients(ctx.path, per_sample(ctx.saved_tensors[0], change)).alpha * change


_fused_noised = differentiable(_Noised, "flow_noised")


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
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        needs = ctx.needs_input_grad[:2]
        return spread(error_backward_op(upstream, *ctx.saved_tensors, ctx.seed, ctx.path, needs, ctx.backend), needs, 7)

    @staticmethod
    def jvp(ctx: Any, prediction: Tensor | None, latents: Tensor | None, t: Tensor | None, *_: None) -> Tensor:
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


_fused_error = differentiable(_Error, "flow_error")


def _refuse(t: Tensor | None, op: str) -> None:
    if t is not None:
        raise UserError(f'{op}: t has no tangent here; use backend="torch"')
