"""Flow matching with noise that is drawn where it is needed: the interpolant, and the error of the velocity.

The noise of a sample is a function of its position, so no tensor has to carry it (flow_reference.py). The fused
implementation makes it again in registers wherever it is used: one launch before the model, one after, one backward,
and neither noise nor target is ever stored. From the same integers its normals equal those of dit_fast/philox.py to
1e-5 relative, 1e-6 absolute.

Source: SiT (arXiv 2401.08740), Sec. 2.
"""

import torch
from torch import Tensor

from dit_fast.errors import UserError
from dit_fast.ops import flow_op, flow_reference
from dit_fast.ops._arguments import require_settings, require_tensors
from dit_fast.ops.flow_op import choose_for
from dit_fast.ops.flow_reference import PATHS


def flow_noised(
    latents: Tensor, t: Tensor, positions: Tensor, seed: int, path: str = "linear", backend: str = "auto"
) -> Tensor:
    """x_t = alpha(t) latents + sigma(t) noise, [N, ...] in at least float32.

    latents: [N, ...]; t: [N] in [0, 1]; positions: int64 [N], each sample's position in the run; seed: of the run, 0 <=
    seed < 2^64; path: "linear" or "cosine". Latents may need a gradient (training through the autoencoder, as REPA-E
    does); t may not. Raises UserError for shapes, dtypes, devices, seeds or paths that do not fit, ConfigError for a
    backend that is unknown or cannot run.
    """
    require_tensors("flow_noised", latents=latents, t=t, positions=positions)
    require_settings("flow_noised", backend)
    _check("flow_noised", latents, t, positions, seed, path)
    if _takes_reference("flow_noised", backend, latents=latents):
        return flow_reference.noised(latents, t, positions, seed, path)
    return flow_op.noised(latents.flatten(1), t, positions, seed, path, backend).view(latents.shape)


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
    require_tensors("flow_error", prediction=prediction, latents=latents, t=t, positions=positions)
    require_settings("flow_error", backend)
    _check("flow_error", latents, t, positions, seed, path, prediction)
    if _takes_reference("flow_error", backend, prediction=prediction, latents=latents):
        return flow_reference.error(prediction, latents, t, positions, seed, path)
    return flow_op.error(prediction.flatten(1), latents.flatten(1), t, positions, seed, path, backend)


def draws_noise_in_registers(latents: Tensor) -> bool:
    """Whether "auto" is a fused implementation for these latents, so that drawing noise twice costs next to nothing."""
    return choose_for("flow_error", "auto", latents=latents) != "torch"


def _takes_reference(op: str, backend: str, **tensors: Tensor) -> bool:
    # Compiled code is tied to no implementation: there the op chooses when it runs.
    if backend == "torch" or torch.compiler.is_compiling():
        return backend == "torch"
    return choose_for(op, backend, **tensors) == "torch"


def _check(
    op: str, latents: Tensor, t: Tensor, positions: Tensor, seed: int, path: str, prediction: Tensor | None = None
) -> None:
    if path not in PATHS:
        raise UserError(f"{op}: unknown path '{path}'; valid: {', '.join(PATHS)}")
    if not isinstance(seed, int):
        raise UserError(f"{op}: seed must be an integer, not {type(seed).__name__}")
    if not 0 <= seed < 1 << 64:
        raise UserError(f"{op}: seed {seed} is out of range; use 0 <= seed < 2^64")
    if latents.dim() < 2 or not latents.numel():
        raise UserError(f"{op}: latents must be [N, ...] with at least one element, not {list(latents.shape)}")
    if prediction is not None and prediction.shape != latents.shape:
        raise UserError(
            f"{op}: prediction {list(prediction.shape)} must have the shape of latents {list(latents.shape)}"
        )
    if t.shape != latents.shape[:1] or positions.shape != t.shape:
        raise UserError(
            f"{op}: t and positions must be [N] = [{latents.shape[0]}], not {list(t.shape)} and {list(positions.shape)}"
        )
    named = {"latents": latents, "t": t} | ({} if prediction is None else {"prediction": prediction})
    for name, x in named.items():
        if not x.is_floating_point():
            raise UserError(f"{op}: {name} must be floating point, not {x.dtype}")
    if positions.dtype != torch.int64:
        raise UserError(f"{op}: positions must be int64, not {positions.dtype}")
    for name, x in (named | {"positions": positions}).items():
        if x.device != latents.device:
            raise UserError(f"{op}: {name} is on {x.device}, latents on {latents.device}; move them to one device")
    if t.requires_grad:
        raise UserError(f"{op}: t gets no gradient; pass t.detach()")
