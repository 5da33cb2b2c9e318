r"""Flow matching's noise, interpolant, target and error, with nothing of it stored.

Sample n has latents x, time t and position; its noise e is the draw of its position from the counter-based generator
(philox.py), so any kernel can make it again in registers. On a path with coefficients a(t), b(t),

    x_t = a x + b e,      v = a' x + b' e,      error_n = (1/E) sum over its E elements of (prediction - v)^2.

Forward before the model: `interpolants` reads x, writes x_t. After it: `errors` reads prediction and x and writes one
number per sample. Backward: `gradients` reads both once more and writes

    dprediction = (2 g_n / E) (prediction - v),      dx = -a' dprediction before rounding, if someone needs it.

Paths: "linear" a = 1 - t, b = t; "cosine" a = cos(pi t/2), b = sin(pi t/2).

Bits. One program adds up a sample, ERROR_BLOCK blocks of four elements at a time: that and ERROR_WARPS fix the order.
Like the generator's own kernel these are compiled without fused multiply-add, and so draw the same normals.

Source: SiT (arXiv 2401.08740), Sec. 2; time runs from data (0) to noise (1).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.launch import Kept, launcher, signature
from dit_fast.kernels.philox import interleave, normal_pair, words
from dit_fast.kernels.rows import MAX_CHUNKS, store_rounded

BLOCK = 256  # counters per program, four elements each, where elements are independent
WARPS = 4
ERROR_BLOCK = 512
ERROR_WARPS = 8
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

_NOISED, _ERROR, _BACKWARD = Kept(), Kept(), Kept()


@triton.jit
def _noise(seed, position, stream, start, BLOCK: tl.constexpr):
    """Normals [4 * BLOCK]: elements from `start`, a multiple of four, of the draw of `position`."""
    block = (start // 4 + tl.arange(0, BLOCK)).to(tl.int32)
    a, b, c, d = words(seed, position, stream.to(tl.int32), block)
    a, b = normal_pair(tl.random.uint_to_uniform_float(a), tl.random.uint_to_uniform_float(b))
    c, d = normal_pair(tl.random.uint_to_uniform_float(c), tl.random.uint_to_uniform_float(d))
    return interleave(a, b, c, d)


@triton.jit
def _quarter_circle(t):
    """cos(pi t/2), sin(pi t/2) for t in [0, 1], to 3e-8; tl.cos would bring a stack frame.

    Beyond t = 1/2 the two change places at 1 - t, which is exact there; Taylor's series does the rest.
    """
    beyond = t > 0.5
    x = tl.where(beyond, 1.0 - t, t) * 1.5707963267948966
    z = x * x
    sine = x + x * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z / 362880)))
    cosine = 1.0 + z * (-0.5 + z * (1 / 24 + z * (-1 / 720 + z / 40320)))
    return tl.where(beyond, sine, cosine), tl.where(beyond, cosine, sine)


@triton.jit
def _target(x, noise, t, PATH: tl.constexpr):
    if PATH == "linear":
        v = noise - x
    else:
        cosine, sine = _quarter_circle(t)
        v = 1.5707963267948966 * (cosine * noise - sine * x)
    return v


@triton.jit(do_not_specialize=("seed", "stream"))
def interpolants(latents, t, positions, out, seed, stream, count, latents_stride,
                 PATH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out [N, count]: x_t; one program per sample and 4 * BLOCK elements."""
    sample = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * 4 * BLOCK
    element = start + tl.arange(0, 4 * BLOCK)
    x = tl.load(latents + sample * latents_stride + element, mask=element < count, other=0.0).to(tl.float32)
    time = tl.load(t + sample).to(tl.float32)
    noise = _noise(seed, tl.load(positions + sample), stream, start, BLOCK)
    if PATH == "linear":
        noised = (1.0 - time) * x + time * noise
    else:
        cosine, sine = _quarter_circle(time)
        noised = cosine * x + sine * noise
    tl.store(out + sample * count + element, noised, mask=element < count)


@triton.jit(do_not_specialize=("seed", "stream"))
def errors(prediction, latents, t, positions, out, seed, stream, count, prediction_stride, latents_stride,
           PATH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out [N]: mean squared error of the velocity; one program per sample."""
    sample = tl.program_id(0).to(tl.int64)
    time = tl.load(t + sample).to(tl.float32)
    position = tl.load(positions + sample)
    total = tl.zeros([4 * BLOCK], tl.float32)
    for start in range(0, count, 4 * BLOCK):
        element = start + tl.arange(0, 4 * BLOCK)
        inside = element < count
        x = tl.load(latents + sample * latents_stride + element, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(prediction + sample * prediction_stride + element, mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, p - _target(x, _noise(seed, position, stream, start, BLOCK), time, PATH), 0.0)
        total += difference * difference
    tl.store(out + sample, tl.sum(total, axis=0) / count)


@triton.jit(do_not_specialize=("seed", "stream"))
def gradients(upstream, prediction, latents, t, positions, prediction_grad, latents_grad, seed, stream, count,
              upstream_stride, prediction_stride, latents_stride, PATH: tl.constexpr, BLOCK: tl.constexpr,
              PREDICTION: tl.constexpr, LATENTS: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """prediction_grad, latents_grad [N, count], each if asked for; one program per sample and 4 * BLOCK elements."""
    sample = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * 4 * BLOCK
    element = start + tl.arange(0, 4 * BLOCK)
    inside = element < count
    x = tl.load(latents + sample * latents_stride + element, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(prediction + sample * prediction_stride + element, mask=inside, other=0.0).to(tl.float32)
    time = tl.load(t + sample).to(tl.float32)
    noise = _noise(seed, tl.load(positions + sample), stream, start, BLOCK)
    scale = 2.0 * tl.load(upstream + sample * upstream_stride) / count
    grad = scale * (p - _target(x, noise, time, PATH))
    if PREDICTION:
        store_rounded(prediction_grad + sample * count + element, grad, inside, UPCAST)
    if LATENTS:
        if PATH == "cosine":
            _, sine = _quarter_circle(time)
            grad = grad * (1.5707963267948966 * sine)
        store_rounded(latents_grad + sample * count + element, grad, inside, UPCAST)


def supports(**tensors: Tensor) -> list[str]:
    """Why these rows [N, E], under the caller's names, cannot go through the kernels; empty if they can."""
    reasons = [
        f"{name} is {x.dtype}, not float32, bfloat16 or float16" for name, x in tensors.items() if x.dtype not in _TYPES
    ]
    count, most = next(iter(tensors.values())).shape[1:].numel(), 4 * BLOCK * MAX_CHUNKS
    return [*reasons, f"{count} elements of a sample are more than {most}"] if count > most else reasons


def _draw(seed: int, stream: int) -> tuple[int, int]:
    return seed - (1 << 64) if seed >> 63 else seed, int(stream)  # one argument type for every seed


def _options(path: str, warps: int, block: int) -> dict[str, Any]:
    return {"PATH": path, "BLOCK": block, "num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}


def noised(latents: Tensor, t: Tensor, positions: Tensor, seed: int, stream: int, path: str) -> Tensor:
    """x_t, float32 [N, E], for latents [N, E] with contiguous rows, t [N], positions int64 [N], 0 <= seed < 2^64."""
    samples, count = latents.shape
    out = torch.empty(samples, count, dtype=torch.float32, device=latents.device)
    tensors = (latents, t.contiguous(), positions.contiguous())
    key = (seed, stream, path, *signature(*tensors))
    launch = _NOISED.get(key)
    if launch is None:
        numbers = (*_draw(seed, stream), count, latents.stride(0))
        grid = (samples, triton.cdiv(count, 4 * BLOCK))
        launch = _NOISED.keep(key, launcher(interpolants, grid, numbers, _options(path, WARPS, BLOCK)))
    launch(*tensors, out)
    return out


def error(
    prediction: Tensor, latents: Tensor, t: Tensor, positions: Tensor, seed: int, stream: int, path: str
) -> Tensor:
    """Mean squared error of the velocity per sample, float32 [N]; prediction like latents, the rest as for `noised`."""
    samples, count = latents.shape
    out = torch.empty(samples, dtype=torch.float32, device=latents.device)
    tensors = (prediction, latents, t.contiguous(), positions.contiguous())
    key = (seed, stream, path, *signature(*tensors))
    launch = _ERROR.get(key)
    if launch is None:
        numbers = (*_draw(seed, stream), count, prediction.stride(0), latents.stride(0))
        made = launcher(errors, (samples,), numbers, _options(path, ERROR_WARPS, ERROR_BLOCK))
        launch = _ERROR.keep(key, made)
    launch(*tensors, out)
    return out


def backward(
    upstream: Tensor,
    prediction: Tensor,
    latents: Tensor,
    t: Tensor,
    positions: Tensor,
    seed: int,
    stream: int,
    path: str,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of prediction and latents [N, E], contiguous, in their dtypes; None where `needs` is False.

    upstream: float32 [N], any stride. The rest as for `error`.
    """
    samples, count = latents.shape
    grads = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed else None
        for x, needed in zip((prediction, latents), needs, strict=True)
    ]
    # A gradient that is not needed is not written; any pointer of the type stands in.
    places = [x if grad is None else grad for x, grad in zip((prediction, latents), grads, strict=True)]
    tensors = (upstream, prediction, latents, t.contiguous(), positions.contiguous())
    key = (seed, stream, path, needs, *signature(*tensors))
    launch = _BACKWARD.get(key)
    if launch is None:
        numbers = (*_draw(seed, stream), count, upstream.stride(0), prediction.stride(0), latents.stride(0))
        asked = {"PREDICTION": needs[0], "LATENTS": needs[1], "UPCAST": triton.knobs.runtime.interpret}
        grid = (samples, triton.cdiv(count, 4 * BLOCK))
        launch = _BACKWARD.keep(key, launcher(gradients, grid, numbers, _options(path, WARPS, BLOCK) | asked))
    launch(*tensors, *places)
    return grads[0], grads[1]


def aot_cases(arch: int) -> list[AotCase]:
    """Both paths; latents float32 as the trainer draws them, predictions in every type."""
    cases = [_case(interpolants, path, "fp32", {}, {"wide_stores": True}) for path in ("linear", "cosine")]
    for path, kind in (("linear", "bf16"), ("cosine", "bf16"), ("linear", "fp16"), ("linear", "fp32")):
        cases.append(_case(errors, path, kind, {}, {}))
        needs = {"PREDICTION": True, "LATENTS": False, "UPCAST": False}
        cases.append(_case(gradients, path, kind, needs, {"wide_stores": True}))
    needs = {"PREDICTION": True, "LATENTS": True, "UPCAST": False}
    cases.append(_case(gradients, "cosine", "bf16", needs, {"wide_stores": True}))
    return cases


def _case(kernel: Any, path: str, kind: str, needs: dict[str, bool], expected: dict[str, bool]) -> AotCase:
    warps, block = (ERROR_WARPS, ERROR_BLOCK) if kernel is errors else (WARPS, BLOCK)
    options = _options(path, warps, block)
    launch = {name: value for name, value in options.items() if name.islower()}
    constants = {name: value for name, value in options.items() if name.isupper()} | needs
    types = dict.fromkeys(("stream", "count", "upstream_stride", "prediction_stride", "latents_stride"), "i32")
    types |= {"prediction": f"*{kind}", "prediction_grad": f"*{kind}", "positions": "*i64", "seed": "i32"}
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
    name = f"{path} {kind}{' latents' if needs.get('LATENTS') else ''}"
    unaligned = tuple(name for name in ("seed", "stream", "upstream_stride") if name in signature)
    return AotCase(kernel, name, signature, constants, launch, unaligned=unaligned, **expected)
