r"""Norm and rotation of queries and keys per head, straight from the fused projection qkv [N, T, 3 H d], and back.

A head row is the d channels of one token and head; it stays in registers from load to store. For part p of {q, k}

    y = x^ w_p + b_p,   x^ = (x - mean x) r,   r = 1 / sqrt(var x + eps)

and with g = dy w_p

    dx = r (g - mean g - x^ mean(g x^)),   dw_p = sum over rows of dy x^,   db_p = sum over rows of dy.

That is LayerNorm. RMSNorm has r = 1 / sqrt(mean x^2 + eps), x^ = x r and no mean g; without a norm y = x. Weight and
bias may be absent. With J(y)[2i] = -y[2i + 1] and J(y)[2i + 1] = y[2i], tables c and s [T, d] turn a row to

    z = y c + J(y) s,   dy = dz c - J(dz s),

as J transposed is -J. The two channels of a pair lie in one thread.

Values are left where they are. `gradient` reads the q and k rows again (the statistics come with them, nothing is
saved), takes the gradient of the values along, and writes the whole gradient of qkv once. A projection that is split
by autograd would fill a buffer with zeros per part and add the parts up.

Bits. CHUNK head rows of one sample, tokens slow and heads fast, make a partial sum of dw and db; ordered_sum adds the
chunks. The rows of a tile and its warps order the sums inside a chunk: both are functions of the padded width and of
whether there are tables.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.launch import ALIGNMENT, Kept, launcher, signature
from dit_fast.kernels.ordered_sum import ordered_sum
from dit_fast.kernels.rows import MAX_CHUNKS, store_rounded

MAX_WIDTH = 256
CHUNK = 128  # head rows per partial sum
WARPS = 4
FORWARD_TILE = 4096  # elements of one part that a program of the forward has in flight; half of it with tables
BACKWARD_TILE = 2048  # the same
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_FORWARD, _BACKWARD = Kept(), Kept()


@triton.jit
def _multiple(stride, VECTOR: tl.constexpr):
    """The same stride, known to be a multiple of VECTOR. A hint on the pointer is lost where additions are combined."""
    return stride // VECTOR * VECTOR


@triton.jit
def _turned(x, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """J(x) of rows [R, C]."""
    first, second = tl.split(tl.reshape(x, [ROWS, PADDED // 2, 2]))
    return tl.reshape(tl.join(-second, first), [ROWS, PADDED])


@triton.jit
def _unit(x, whole, eps, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """x^ and r of rows [R, C]; columns outside of `whole` are zero in x and in x^."""
    centred = x
    if NORM == "layer":
        centred = tl.where(whole, x - tl.sum(x, 1)[:, None] / WIDTH, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    return centred * rstd[:, None], rstd[:, None]


@triton.jit
def _head(raw, weight, bias, cosines, sines, channel, eps,
          WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
          NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROTARY: tl.constexpr):  # fmt: skip
    """Rows [R, C] normalised and turned, in float32."""
    whole = channel < WIDTH
    if WEIGHT:
        gain = tl.load(weight + channel, mask=whole, other=0.0).to(tl.float32)
    if BIAS:
        offset = tl.load(bias + channel, mask=whole, other=0.0).to(tl.float32)
    x = raw.to(tl.float32)
    if NORM != "none":
        x, _ = _unit(x, whole, eps, WIDTH, NORM)
    if WEIGHT:
        x = x * gain
    if BIAS:
        x = x + offset
    if ROTARY:
        x = x * cosines + _turned(x, ROWS, PADDED) * sines
    return x


@triton.jit
def normalise(qkv, query, key, q_weight, q_bias, k_weight, k_bias, cos, sin, tokens, sample_stride, token_stride, eps,
              HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
              NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROTARY: tl.constexpr,
              VECTOR: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """query, key [N, T, H, d] contiguous. Program (n, tile): ROWS head rows of sample n, both parts.

    NORM: "layer", "rms" or "none". WEIGHT, BIAS, ROTARY: there are weights, biases, cos and sin [T, d] contiguous.
    """
    sample = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = row // HEADS, row % HEADS
    channel = tl.arange(0, PADDED)[None, :]
    inside = (row < tokens * HEADS) & (channel < WIDTH)

    source = qkv + sample * _multiple(sample_stride, VECTOR) + token * _multiple(token_stride, VECTOR) + head * WIDTH
    raw_q = tl.load(source + channel, mask=inside, other=0.0)
    raw_k = tl.load(source + HEADS * WIDTH + channel, mask=inside, other=0.0)
    place = (sample * tokens * HEADS + row) * WIDTH

    cosines = None
    sines = None
    if ROTARY:
        cosines = tl.load(cos + token * WIDTH + channel, mask=inside, other=0.0).to(tl.float32)
        sines = tl.load(sin + token * WIDTH + channel, mask=inside, other=0.0).to(tl.float32)
    turned = _head(raw_q, q_weight, q_bias, cosines, sines, channel, eps,
                   WIDTH, PADDED, ROWS, NORM, WEIGHT, BIAS, ROTARY)  # fmt: skip
    store_rounded(query + place + channel, turned, inside, UPCAST)
    turned = _head(raw_k, k_weight, k_bias, cosines, sines, channel, eps,
                   WIDTH, PADDED, ROWS, NORM, WEIGHT, BIAS, ROTARY)  # fmt: skip
    store_rounded(key + place + channel, turned, inside, UPCAST)


@triton.jit
def _part(source, grad, out, partial, weight, cos, sin, first, tokens, strides, eps,
          HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
          NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROTARY: tl.constexpr,
          INPUT: tl.constexpr, PARAMETERS: tl.constexpr, VECTOR: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Gradient of queries or keys over one chunk. strides: tokens of qkv, tokens and heads of grad."""
    token_stride = _multiple(strides[0], VECTOR)
    grad_token_stride, grad_head_stride = _multiple(strides[1], VECTOR), _multiple(strides[2], VECTOR)
    channel = tl.arange(0, PADDED)[None, :]
    whole = channel < WIDTH
    if WEIGHT:
        scale = tl.load(weight + channel, mask=whole, other=0.0).to(tl.float32)
        grad_weight = tl.zeros([ROWS, PADDED], tl.float32)
    if BIAS:
        grad_bias = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(0, CHUNK, ROWS):
        row = first + start + tl.arange(0, ROWS)[:, None]
        token, head = row // HEADS, row % HEADS
        inside = (row < tokens * HEADS) & whole
        if NORM != "none":
            x = tl.load(source + token * token_stride + head * WIDTH + channel, mask=inside, other=0.0)
        above = grad + token * grad_token_stride + head * grad_head_stride
        dy = tl.load(above + channel, mask=inside, other=0.0).to(tl.float32)
        if ROTARY:
            cosines = tl.load(cos + token * WIDTH + channel, mask=inside, other=0.0).to(tl.float32)
            sines = tl.load(sin + token * WIDTH + channel, mask=inside, other=0.0).to(tl.float32)
            dy = dy * cosines - _turned(dy * sines, ROWS, PADDED)
        if NORM != "none":
            unit, rstd = _unit(x.to(tl.float32), whole, eps, WIDTH, NORM)
        if PARAMETERS:
            if WEIGHT:
                grad_weight += dy * unit
            if BIAS:
                grad_bias += dy
        if INPUT:
            dx = dy
            if WEIGHT:
                dx = dy * scale
            if NORM == "layer":
                along = tl.sum(dx * unit, 1)[:, None] / WIDTH
                dx = rstd * (dx - tl.sum(dx, 1)[:, None] / WIDTH - unit * along)
            if NORM == "rms":
                dx = rstd * (dx - unit * (tl.sum(dx * unit, 1)[:, None] / WIDTH))
            place = out + (token * 3 * HEADS + head) * WIDTH
            store_rounded(place + channel, dx, inside, UPCAST)
    if PARAMETERS:
        column = tl.arange(0, PADDED)
        if WEIGHT:
            tl.store(partial + column, tl.sum(grad_weight, 0), mask=column < WIDTH)
        if BIAS:
            tl.store(partial + WEIGHT * WIDTH + column, tl.sum(grad_bias, 0), mask=column < WIDTH)


@triton.jit
def gradient(qkv, grad_query, grad_key, grad_value, out, partials, q_weight, k_weight, cos, sin, tokens, chunks,
             sample_stride, token_stride, q_strides, k_strides, v_strides, eps,
             HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
             CHUNK: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROTARY: tl.constexpr,
             INPUT: tl.constexpr, PARAMETERS: tl.constexpr, VECTOR: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """out [N, T, 3 H d] contiguous; partials [N chunks, parts d]: w and b of q, then of k, those that there are.

    Program (n, chunk).
    """
    sample = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    first = chunk * CHUNK
    source = qkv + sample * _multiple(sample_stride, VECTOR)
    target = out + sample * tokens * (3 * HEADS * WIDTH)
    partial = partials + (sample * chunks + chunk) * (2 * (WEIGHT + BIAS) * WIDTH)
    above = grad_query + sample * _multiple(q_strides[0], VECTOR)
    _part(source, above, target, partial, q_weight, cos, sin, first, tokens,
          (token_stride, q_strides[1], q_strides[2]), eps,
          HEADS, WIDTH, PADDED, ROWS, CHUNK, NORM, WEIGHT, BIAS, ROTARY, INPUT, PARAMETERS, VECTOR, UPCAST)  # fmt: skip
    above = grad_key + sample * _multiple(k_strides[0], VECTOR)
    _part(source + HEADS * WIDTH, above, target + HEADS * WIDTH, partial + (WEIGHT + BIAS) * WIDTH, k_weight, cos, sin,
          first, tokens, (token_stride, k_strides[1], k_strides[2]), eps,
          HEADS, WIDTH, PADDED, ROWS, CHUNK, NORM, WEIGHT, BIAS, ROTARY, INPUT, PARAMETERS, VECTOR, UPCAST)  # fmt: skip
    if INPUT:
        channel = tl.arange(0, PADDED)[None, :]
        above = grad_value + sample * _multiple(v_strides[0], VECTOR)
        token_step, head_step = _multiple(v_strides[1], VECTOR), _multiple(v_strides[2], VECTOR)
        for start in range(0, CHUNK, ROWS):
            row = first + start + tl.arange(0, ROWS)[:, None]
            token, head = row // HEADS, row % HEADS
            inside = (row < tokens * HEADS) & (channel < WIDTH)
            rows = above + token * token_step + head * head_step
            place = target + (token * 3 * HEADS + 2 * HEADS + head) * WIDTH
            tl.store(place + channel, tl.load(rows + channel, mask=inside, other=0.0), mask=inside)


def supports(qkv: Tensor, num_heads: int, rotary: bool = False) -> list[str]:
    """Why qkv [N, T, 3 H d] cannot go through the kernels; empty if it can."""
    reasons, width = [], qkv.shape[-1] // (3 * num_heads)
    if width > MAX_WIDTH:
        reasons.append(f"head width {width} is more than {MAX_WIDTH}")
    if qkv.dtype not in _TYPES:
        reasons.append(f"{qkv.dtype} is not float32, bfloat16 or float16")
    most = _tile(width, FORWARD_TILE, rotary)["ROWS"] * MAX_CHUNKS
    if qkv.shape[1] * num_heads > most:
        reasons.append(f"{qkv.shape[1]} tokens of {num_heads} heads are more than {most} head rows")
    return reasons


def _vector(width: int, tensors: Sequence[Tensor]) -> int:
    """Elements in 16 bytes if every head row starts at a multiple of them, else 1."""
    size = tensors[0].element_size()
    for tensor in tensors:
        steps = (step for step, length in zip(tensor.stride()[:-1], tensor.shape, strict=False) if length > 1)
        if tensor.data_ptr() % ALIGNMENT or any(step * size % ALIGNMENT for step in (width, *steps)):
            return 1
    return ALIGNMENT // size


def _tile(width: int, elements: int, rotary: bool = False) -> dict[str, int]:
    padded = max(16, triton.next_power_of_2(width))
    elements = elements // 2 if rotary else elements
    return {"PADDED": padded, "ROWS": max(1, min(CHUNK, elements // padded))}


def _options() -> dict[str, object]:
    return {"UPCAST": triton.knobs.runtime.interpret, "num_warps": WARPS, "num_stages": 1}


def _form(norm: str, weight: Any, bias: Any, cos: Any) -> dict[str, object]:
    return {"NORM": norm, "WEIGHT": weight is not None, "BIAS": bias is not None, "ROTARY": cos is not None}


def forward(
    qkv: Tensor, num_heads: int, q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None,
    k_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, norm: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """query, key [N, T, H, d], contiguous, in qkv's dtype.

    qkv: [N, T, 3 H d], not empty, last stride 1, else any strides, fp32, bf16 or fp16; parameters [d] and tables
    [T, d], contiguous, any of these dtypes. norm: "layer", "rms" or "none".
    """
    batch, tokens, width = *qkv.shape[:2], qkv.shape[2] // (3 * num_heads)
    query, key = (torch.empty(batch, tokens, num_heads, width, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    given = (q_weight, q_bias, k_weight, k_bias, cos, sin)
    known = (signature(qkv, *given), num_heads, eps, norm, qkv.data_ptr() % ALIGNMENT != 0)
    launch = _FORWARD.get(known)
    if launch is None:
        tile = _tile(width, FORWARD_TILE, cos is not None)
        constants = {
            "HEADS": num_heads, "WIDTH": width, "VECTOR": _vector(width, [qkv]),
            **_form(norm, q_weight, q_bias, cos), **tile, **_options(), "enable_fp_fusion": True,
        }  # fmt: skip
        grid, numbers = (batch, triton.cdiv(tokens * num_heads, tile["ROWS"])), (tokens, *qkv.stride()[:2], eps)
        launch = _FORWARD.keep(known, launcher(normalise, grid, numbers, constants))
    launch(qkv, query, key, *(qkv if x is None else x for x in given))
    return query, key


def backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str,
    biased: bool,
    need_input: bool,
    need_parameters: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of qkv [N, T, 3 H d], contiguous, in its dtype, and fp32 [parts, d]: of q's weight and bias, then k's,
    those that there are.

    grad_query, grad_key, grad_value: [N, T, H, d] in qkv's dtype, last stride 1, else any strides. At least one of the
    two needs must hold; what is not needed is None.
    """
    batch, tokens, heads, width = grad_query.shape
    chunks = -(-tokens * heads // CHUNK)  # triton.cdiv takes 5 us
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device) if need_input else None
    parts = 2 * ((q_weight is not None) + biased)
    partials = None
    if need_parameters:
        partials = torch.empty(batch * chunks, parts * width, dtype=torch.float32, device=qkv.device)
    streams = (qkv, grad_query, grad_key, grad_value)
    given = (q_weight, k_weight, cos, sin)
    odd = any(x.data_ptr() % ALIGNMENT for x in streams)
    known = (signature(*streams, *given), eps, norm, biased, need_input, need_parameters, odd)
    launch = _BACKWARD.get(known)
    if launch is None:
        constants = {
            "HEADS": heads, "WIDTH": width, "CHUNK": CHUNK, **_form(norm, q_weight, True if biased else None, cos),
            "INPUT": need_input, "PARAMETERS": need_parameters, "VECTOR": _vector(width, streams),
            **_tile(width, BACKWARD_TILE, cos is not None), **_options(), "enable_fp_fusion": True,
        }  # fmt: skip
        strides = (grad.stride()[:3] for grad in streams[1:])
        numbers = (tokens, chunks, *qkv.stride()[:2], *strides, eps)
        launch = _BACKWARD.keep(known, launcher(gradient, (batch, chunks), numbers, constants))
    launch(*streams, *(qkv if x is None else x for x in (grad_qkv, partials, *given)))
    return grad_qkv, None if partials is None else ordered_sum(partials).view(parts, width)


_AFFINE = {"NORM": "layer", "WEIGHT": True, "BIAS": True, "ROTARY": False}
_RMS_ROTARY = {"NORM": "rms", "WEIGHT": True, "BIAS": False, "ROTARY": True}
_ROTARY = {"NORM": "none", "WEIGHT": False, "BIAS": False, "ROTARY": True}


def aot_cases(arch: int) -> list[AotCase]:
    """Heads of SiT-B, L and XL; one case per type, form and choice of gradients, to keep the compile time down."""
    shapes = ((12, 64, "bf16"), (16, 72, "bf16"), (16, 64, "fp16"), (16, 72, "fp32"))
    both = {"INPUT": True, "PARAMETERS": True}
    cases = [_case(normalise, *shape, {}) for shape in shapes] + [_case(gradient, *shape, both) for shape in shapes]
    cases += [_case(gradient, 16, 72, "bf16", {"INPUT": True, "PARAMETERS": False}, " input")]
    cases += [_case(gradient, 16, 72, "bf16", {"INPUT": False, "PARAMETERS": True}, " parameters")]
    for suffix, form in ((" rms rotary", _RMS_ROTARY), (" layer rotary", _AFFINE | {"ROTARY": True})):
        for kernel, needs in ((normalise, {}), (gradient, both)):
            cases += [_case(kernel, 16, 72, kind, needs, suffix, form) for kind in ("bf16", "fp32")]
    cases += [_case(normalise, 16, 72, "bf16", {}, " rms", _RMS_ROTARY | {"ROTARY": False})]
    cases += [_case(gradient, 16, 72, "bf16", both, " rms", _RMS_ROTARY | {"ROTARY": False})]
    cases += [_case(normalise, 16, 72, "bf16", {}, " rotary", _ROTARY)]
    cases += [_case(gradient, 16, 72, "bf16", {"INPUT": True, "PARAMETERS": False}, " rotary", _ROTARY)]
    return cases


def _case(
    kernel: Any, heads: int, width: int, kind: str, needs: dict[str, bool], suffix: str = "",
    form: dict[str, Any] = _AFFINE,
) -> AotCase:  # fmt: skip
    tile = _tile(width, FORWARD_TILE if kernel is normalise else BACKWARD_TILE, form["ROTARY"])
    options = _options()
    constants = {
        "HEADS": heads,
        "WIDTH": width,
        "VECTOR": 4 if kind == "fp32" else 8,
        "UPCAST": options.pop("UPCAST"),
        **tile,
        **form,
        **needs,
    }
    if kernel is gradient:
        constants["CHUNK"] = CHUNK
    # What is absent is passed as the launcher does it: by qkv.
    streams = ["qkv", "query", "key", "grad_query", "grad_key", "grad_value", "out"]
    streams += [] if form["WEIGHT"] else ["q_weight", "k_weight"]
    streams += [] if form["BIAS"] else ["q_bias", "k_bias"]
    streams += [] if form["ROTARY"] else ["cos", "sin"]
    streams += [] if needs.get("PARAMETERS") else ["partials"]
    types: dict[str, Any] = dict.fromkeys(streams, f"*{kind}")
    types |= dict.fromkeys(("tokens", "chunks", "sample_stride", "token_stride"), "i32") | {"eps": "fp32"}
    strides: Any = ("i32", "i32", "i32")
    types |= dict.fromkeys(("q_strides", "k_strides", "v_strides"), strides)
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
    stores = needs.get("INPUT", True)
    return AotCase(
        kernel, f"H={heads} d={width} {kind}{suffix}", signature, constants, options,
        unaligned=("tokens", "chunks", "eps", "sample_stride", "token_stride", "q_strides", "k_strides", "v_strides"),
        wide_stores=stores,
    )  # fmt: skip
