r"""REPA's alignment loss: minus the mean cosine of tokens p_i, q_i [M, Z], in one launch, its gradient in another.

Forward, with r = 1 / max(|p|, 1e-12) and s = 1 / max(|q|, 1e-12) per token (F.normalize's floor):

    c_i = (p_i . q_i) r_i s_i,        value = -(1/M) sum_i c_i.

A program owns CHUNK tokens and writes the sum of their cosines; r, s, c (12 bytes per token) are kept. The program that
finishes last, found by a ticket, adds the partial sums in index order.

Backward, for an upstream g (read on the device), from r, s, c alone, without a reduction:

    dp_i = -(g/M) r_i (s_i q_i - c_i r_i p_i),     dq_i = -(g/M) s_i (r_i p_i - c_i s_i q_i),

where the second term is absent if the norm is at its floor, a constant.

Bits. CHUNK, STEP, SUMMANDS, and the width with its warp count fix the order of every sum: they are part of the
definition, and there is nothing left to configure. Which program comes last does not matter: it reads all partial sums
from memory, its own too.

Source: REPA (arXiv 2410.06940), Eq. 8; gradient derived here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.launch import Kept, launcher, signature
from dit_fast.kernels.rows import inverse_or_floor, store_rounded

MAX_WIDTH = 4096
CHUNK = 16  # tokens per partial sum
STEP = 2  # tokens whose rows are in flight together
SUMMANDS = 1024  # partial sums that the last program adds at once
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_tickets: dict[tuple[int, int], Tensor] = {}
_FORWARD, _BACKWARD = Kept(), Kept()


@triton.jit
def _inverse(square_sum):
    return inverse_or_floor(tl.sqrt(square_sum), 1e-12)


@triton.jit
def _unless_floored(cosine, inverse):
    return tl.where(inverse < 1e12, cosine, 0.0)


@triton.jit(do_not_specialize=("tokens",))
def cosines(prediction, target, saved, partials, value, ticket, tokens, prediction_stride, target_stride,
            WIDTH: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
            SUMMANDS: tl.constexpr):  # fmt: skip
    """saved [3, tokens]: r, s, c. partials [programs]: sums of c. value: minus the mean of c, from the last program."""
    program = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, PADDED)
    total = tl.zeros([STEP], tl.float32)
    for first in range(0, CHUNK, STEP):
        token = program * CHUNK + first + tl.arange(0, STEP)
        present = token < tokens
        inside = present[:, None] & (channel < WIDTH)[None, :]
        p = tl.load(prediction + token[:, None] * prediction_stride + channel[None, :], mask=inside, other=0.0)
        q = tl.load(target + token[:, None] * target_stride + channel[None, :], mask=inside, other=0.0)
        p, q = p.to(tl.float32), q.to(tl.float32)
        r, s = _inverse(tl.sum(p * p, axis=1)), _inverse(tl.sum(q * q, axis=1))
        # One factor after the other: r * s alone can leave the range of float32.
        cosine = tl.sum(p * q, axis=1) * r * s
        tl.store(saved + token, r, mask=present)
        tl.store(saved + tokens + token, s, mask=present)
        tl.store(saved + 2 * tokens.to(tl.int64) + token, cosine, mask=present)
        total += cosine
    tl.store(partials + program, tl.sum(total, axis=0))

    # Order of memory. The barrier puts this program's store, whichever thread made it, before the ticket. The ticket's
    # release makes the store visible to programs that draw a later one, and its acquire, which the compiler spreads to
    # all threads with the ticket's value, puts the loads below after every release that came before. Tickets are
    # read-modify-writes of one word, so the last of them has all the others before it, directly or through one another.
    tl.debug_barrier()
    programs = tl.num_programs(0).to(tl.int64)
    if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1:
        sums = tl.zeros([SUMMANDS], tl.float64)
        for start in range(0, programs, SUMMANDS):
            index = start + tl.arange(0, SUMMANDS)
            # From L2, where the stores of other multiprocessors are.
            part = tl.load(partials + index, mask=index < programs, other=0.0, cache_modifier=".cg")
            sums += part.to(tl.float64)
        tl.store(value, (-tl.sum(sums, axis=0) / tokens.to(tl.float64)).to(tl.float32))
        # The next launch on this stream begins after this one's end, and finds zero.
        tl.store(ticket, 0)


@triton.jit(do_not_specialize=("tokens",))
def gradients(upstream, prediction, target, saved, prediction_grad, target_grad, tokens, prediction_stride,
              target_stride, WIDTH: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr,
              PREDICTION: tl.constexpr, TARGET: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """prediction_grad, target_grad [tokens, WIDTH], each if asked for; one program per STEP tokens."""
    token = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)
    channel = tl.arange(0, PADDED)
    present = token < tokens
    inside = present[:, None] & (channel < WIDTH)[None, :]
    scale = -tl.load(upstream) / tokens.to(tl.float32)
    r = tl.load(saved + token, mask=present, other=0.0)
    s = tl.load(saved + tokens + token, mask=present, other=0.0)
    cosine = tl.load(saved + 2 * tokens.to(tl.int64) + token, mask=present, other=0.0)
    p = tl.load(prediction + token[:, None] * prediction_stride + channel[None, :], mask=inside, other=0.0)
    q = tl.load(target + token[:, None] * target_stride + channel[None, :], mask=inside, other=0.0)
    p, q = p.to(tl.float32) * r[:, None], q.to(tl.float32) * s[:, None]
    out = token[:, None] * WIDTH + channel[None, :]
    if PREDICTION:
        turn = q - _unless_floored(cosine, r)[:, None] * p
        store_rounded(prediction_grad + out, turn * (scale * r)[:, None], inside, UPCAST)
    if TARGET:
        turn = p - _unless_floored(cosine, s)[:, None] * q
        store_rounded(target_grad + out, turn * (scale * s)[:, None], inside, UPCAST)


def supports(prediction: Tensor, target: Tensor) -> list[str]:
    """Why these rows [M, Z] cannot go through the kernels; empty if they can."""
    reasons = []
    if prediction.shape[-1] > MAX_WIDTH:
        reasons.append(f"width {prediction.shape[-1]} is more than {MAX_WIDTH}")
    for name, x in (("prediction", prediction), ("target", target)):
        if x.dtype not in _TYPES:
            reasons.append(f"{name} is {x.dtype}, not float32, bfloat16 or float16")
    return reasons


def _row(width: int) -> dict[str, int]:
    """Padded row and warps: functions of the width alone, because they order the sum over a row."""
    padded = max(128, triton.next_power_of_2(width))
    return {"WIDTH": width, "PADDED": padded, "num_warps": max(1, padded // 256), "num_stages": 1}


def _ticket(device: torch.device) -> Tensor:
    """A zero that launches which may overlap never share.

    Launches of one stream follow each other and leave the zero behind, so they share one. A captured graph may be
    replayed on any stream, and gets a zero of its own that is part of the graph.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _tickets:
        _tickets.setdefault(key, torch.zeros(1, dtype=torch.int32, device=device))
    return _tickets[key]


def forward(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(value 0-d, saved [3, M]: 1/|p|, 1/|q|, cosine per token), float32.

    prediction, target: [M, Z], M >= 1, rows contiguous with any stride between them; each float32, bfloat16 or float16.
    """
    tokens, width = prediction.shape
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=prediction.device)  # noqa: E731
    value, saved, partials = new(), new(3, tokens), new(triton.cdiv(tokens, CHUNK))
    key = signature(prediction, target)
    launch = _FORWARD.get(key)
    if launch is None:
        numbers = (tokens, prediction.stride(0), target.stride(0))
        constants = {**_row(width), "CHUNK": CHUNK, "STEP": STEP, "SUMMANDS": SUMMANDS, "enable_fp_fusion": True}
        launch = _FORWARD.keep(key, launcher(cosines, (len(partials),), numbers, constants))
    launch(prediction, target, saved, partials, value, _ticket(prediction.device))
    return value, saved


def backward(
    upstream: Tensor, prediction: Tensor, target: Tensor, saved: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients [M, Z], contiguous, in the dtypes of prediction and target; None where `needs` is False.

    upstream: float32, 0-d, on the device. saved: from `forward`.
    """
    tokens, width = prediction.shape
    grads = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed else None
        for x, needed in zip((prediction, target), needs, strict=True)
    ]
    # A gradient that is not needed is not written; any pointer of the type stands in.
    places = [x if grad is None else grad for x, grad in zip((prediction, target), grads, strict=True)]
    key = (needs, *signature(prediction, target))
    launch = _BACKWARD.get(key)
    if launch is None:
        numbers = (tokens, prediction.stride(0), target.stride(0))
        asked = {"PREDICTION": needs[0], "TARGET": needs[1], "UPCAST": triton.knobs.runtime.interpret}
        constants = {**_row(width), "STEP": STEP, **asked, "enable_fp_fusion": True}
        launch = _BACKWARD.keep(key, launcher(gradients, (triton.cdiv(tokens, STEP),), numbers, constants))
    launch(upstream, prediction, target, saved, *places)
    return grads[0], grads[1]


def aot_cases(arch: int) -> list[AotCase]:
    """Widths of DINOv2-B, L and g; under bfloat16 autocast the prediction is bfloat16 and the target as stored."""
    shapes = [(768, "bf16", "fp32"), (768, "bf16", "bf16"), (1024, "fp32", "fp32"), (1536, "fp16", "fp16")]
    return [case for shape in shapes for case in _cases(*shape)]


def _cases(width: int, prediction: str, target: str) -> list[AotCase]:
    row = _row(width)
    launch = {name: value for name, value in row.items() if name.islower()}
    types = {"prediction": f"*{prediction}", "target": f"*{target}", "ticket": "*i32", "tokens": "i32"}
    types |= {"prediction_stride": "i32", "target_stride": "i32"}
    types |= {"prediction_grad": f"*{prediction}", "target_grad": f"*{target}"}
    plans = [
        (cosines, "", {"CHUNK": CHUNK, "STEP": STEP, "SUMMANDS": SUMMANDS}, {"ticket": True}),
        (gradients, " p", {"STEP": STEP, "PREDICTION": True, "TARGET": False}, {"wide_stores": True}),
        (gradients, " pq", {"STEP": STEP, "PREDICTION": True, "TARGET": True}, {"wide_stores": True}),
    ]
    cases = []
    for kernel, suffix, options, expected in plans:
        constants = {name: value for name, value in row.items() if name.isupper()} | options
        if kernel is gradients:
            constants["UPCAST"] = False
        signature = {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
        name = f"Z={width} {prediction} {target}{suffix}"
        cases.append(AotCase(kernel, name, signature, constants, launch, unaligned=("tokens",), **expected))
    return cases
