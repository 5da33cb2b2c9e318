r"""LayerNorm of queries and keys per head, straight from the fused projection qkv [N, T, 3 H d], and its gradient.

A head row is the d channels of one token and head; it stays in registers from load to store. For part p of {q, k}

    y = x^ w_p + b_p,   x^ = (x - mean x) r,   r = 1 / sqrt(var x + eps)

and with g = dy w_p

    dx = r (g - mean g - x^ mean(g x^)),   dw_p = sum over rows of dy x^,   db_p = sum over rows of dy.

Values are left where they are. `gradient` reads the q and k rows again (the statistics come with them, nothing is
saved), takes the gradient of the values along, and writes the whole gradient of qkv once. A projection that is split
by autograd would fill a buffer with zeros per part and add the parts up.

Bits. CHUNK head rows of one sample, tokens slow and heads fast, make a partial sum of dw and db; ordered_sum adds the
chunks. The rows of a tile and its warps order the sums inside a chunk: both are functions of the padded width alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.ordered_sum import ordered_sum
from dit_fast.kernels.rows import MAX_CHUNKS, store_rounded

MAX_WIDTH = 256
CHUNK = 128  # head rows per partial sum
WARPS = 4
FORWARD_TILE = 4096  # elements of one part that a program of the forward has in flight
BACKWARD_TILE = 2048
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit
def _multiple(stride, VECTOR: tl.constexpr):
    """The same stride, known to be a multiple of VECTOR. A hint on the pointer is lost where additions are combined."""
    return stride // VECTOR * VECTOR


@triton.jit
def _unit(x, whole, eps, WIDTH: tl.constexpr):
    """x^ and r of rows [R, C]; columns outside of `whole` are zero in x and in x^."""
    centred = tl.where(whole, x - tl.sum(x, 1)[:, None] / WIDTH, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    return centred * rstd[:, None], rstd[:, None]


@triton.jit
def normalise(qkv, query, key, q_weight, q_bias, k_weight, k_bias, tokens, sample_stride, token_stride, eps,
              HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
              VECTOR: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """query, key [N, T, H, d] contiguous. Program (n, tile): ROWS head rows of sample n, both parts."""
    sample = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = row // HEADS, row % HEADS
    channel = tl.arange(0, PADDED)[None, :]
    inside = (row < tokens * HEADS) & (channel < WIDTH)

    source = qkv + sample * _multiple(sample_stride, VECTOR) + token * _multiple(token_stride, VECTOR) + head * WIDTH
    raw_q = tl.load(source + channel, mask=inside, other=0.0)
    raw_k = tl.load(source + HEADS * WIDTH + channel, mask=inside, other=0.0)
    place = (sample * tokens * HEADS + row) * WIDTH

    weight = tl.load(q_weight + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)
    bias = tl.load(q_bias + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)
    unit, _ = _unit(raw_q.to(tl.float32), channel < WIDTH, eps, WIDTH)
    store_rounded(query + place + channel, unit * weight + bias, inside, UPCAST)

    weight = tl.load(k_weight + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)
    bias = tl.load(k_bias + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)
    unit, _ = _unit(raw_k.to(tl.float32), channel < WIDTH, eps, WIDTH)
    store_rounded(key + place + channel, unit * weight + bias, inside, UPCAST)


@triton.jit
def _part(source, grad, out, partial, weight, first, tokens, strides, eps,
          HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
          INPUT: tl.constexpr, PARAMETERS: tl.constexpr, VECTOR: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Gradient of one normalised part over one chunk. strides: tokens of qkv, tokens and heads of grad."""
    token_stride = _multiple(strides[0], VECTOR)
    grad_token_stride, grad_head_stride = _multiple(strides[1], VECTOR), _multiple(strides[2], VECTOR)
    channel = tl.arange(0, PADDED)[None, :]
    whole = channel < WIDTH
    scale = tl.load(weight + channel, mask=whole, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([ROWS, PADDED], tl.float32)
    grad_bias = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(0, CHUNK, ROWS):
        row = first + start + tl.arange(0, ROWS)[:, None]
        token, head = row // HEADS, row % HEADS
        inside = (row < tokens * HEADS) & whole
        x = tl.load(source + token * token_stride + head * WIDTH + channel, mask=inside, other=0.0)
        above = grad + token * grad_token_stride + head * grad_head_stride
        dy = tl.load(above + channel, mask=inside, other=0.0).to(tl.float32)
        unit, rstd = _unit(x.to(tl.float32), whole, eps, WIDTH)
        if PARAMETERS:
            grad_weight += dy * unit
            grad_bias += dy
        if INPUT:
            g = dy * scale
            along = tl.sum(g * unit, 1)[:, None] / WIDTH
            dx = rstd * (g - tl.sum(g, 1)[:, None] / WIDTH - unit * along)
            place = out + (token * 3 * HEADS + head) * WIDTH
            store_rounded(place + channel, dx, inside, UPCAST)
    if PARAMETERS:
        column = tl.arange(0, PADDED)
        tl.store(partial + column, tl.sum(grad_weight, 0), mask=column < WIDTH)
        tl.store(partial + WIDTH + column, tl.sum(grad_bias, 0), mask=column < WIDTH)


@triton.jit
def gradient(qkv, grad_query, grad_key, grad_value, out, partials, q_weight, k_weight, tokens, chunks,
             sample_stride, token_stride, q_strides, k_strides, v_strides, eps,
             HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
             CHUNK: tl.constexpr, INPUT: tl.constexpr, PARAMETERS: tl.constexpr, VECTOR: tl.constexpr,
             UPCAST: tl.constexpr):  # fmt: skip
    """out [N, T, 3 H d] contiguous; partials [N chunks, 4 d]: w and b of q, then of k. Program (n, chunk)."""
    sample = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    first = chunk * CHUNK
    source = qkv + sample * _multiple(sample_stride, VECTOR)
    target = out + sample * tokens * (3 * HEADS * WIDTH)
    partial = partials + (sample * chunks + chunk) * (4 * WIDTH)
    above = grad_query + sample * _multiple(q_strides[0], VECTOR)
    _part(source, above, target, partial, q_weight, first, tokens, (token_stride, q_strides[1], q_strides[2]), eps,
          HEADS, WIDTH, PADDED, ROWS, CHUNK, INPUT, PARAMETERS, VECTOR, UPCAST)  # fmt: skip
    above = grad_key + sample * _multiple(k_strides[0], VECTOR)
    _part(source + HEADS * WIDTH, above, target + HEADS * WIDTH, partial + 2 * WIDTH, k_weight, first, tokens,
          (token_stride, k_strides[1], k_strides[2]), eps,
          HEADS, WIDTH, PADDED, ROWS, CHUNK, INPUT, PARAMETERS, VECTOR, UPCAST)  # fmt: skip
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


def supports(qkv: Tensor, num_heads: int) -> list[str]:
    """Why qkv [N, T, 3 H d] cannot go through the kernels; empty if it can."""
    reasons, width = [], qkv.shape[-1] // (3 * num_heads)
    if width > MAX_WIDTH:
        reasons.append(f"head width {width} is more than {MAX_WIDTH}")
    if qkv.dtype not in _TYPES:
        reasons.append(f"{qkv.dtype} is not float32, bfloat16 or float16")
    most = _tile(width, FORWARD_TILE)["ROWS"] * MAX_CHUNKS
    if qkv.shape[1] * num_heads > most:
        reasons.append(f"{qkv.shape[1]} tokens of {num_heads} heads are more than {most} head rows")
    return reasons


def _vector(width: int, tensors: list[Tensor]) -> int:
    """Elements in 16 bytes if every head row starts at a multiple of them, else 1."""
    size = tensors[0].element_size()
    for tensor in tensors:
        steps = (step for step, length in zip(tensor.stride()[:-1], tensor.shape, strict=False) if length > 1)
        if tensor.data_ptr() % 16 or any(step * size % 16 for step in (width, *steps)):
            return 1
    return 16 // size


def _tile(width: int, elements: int) -> dict[str, int]:
    padded = max(16, triton.next_power_of_2(width))
    return {"PADDED": padded, "ROWS": max(1, min(CHUNK, elements // padded))}


def _options() -> dict[str, object]:
    return {"UPCAST": triton.knobs.runtime.interpret, "num_warps": WARPS, "num_stages": 1}


def forward(
    qkv: Tensor, num_heads: int, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """query, key [N, T, H, d], contiguous, in qkv's dtype.

    qkv: [N, T, 3 H d], not empty, last stride 1, else any strides, fp32, bf16 or fp16; parameters [d], contiguous, any
    of these dtypes.
    """
    batch, tokens, width = *qkv.shape[:2], qkv.shape[2] // (3 * num_heads)
    query, key = (torch.empty(batch, tokens, num_heads, width, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    tile = _tile(width, FORWARD_TILE)
    normalise[(batch, triton.cdiv(tokens * num_heads, tile["ROWS"]))](
        qkv, query, key, q_weight, q_bias, k_weight, k_bias, tokens, qkv.stride(0), qkv.stride(1), eps,
        HEADS=num_heads, WIDTH=width, VECTOR=_vector(width, [qkv]), **tile, **_options(), enable_fp_fusion=True,
    )  # fmt: skip
    return query, key


def backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    need_input: bool,
    need_parameters: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of qkv [N, T, 3 H d], contiguous, in its dtype, and fp32 [4, d]: of q's weight and bias, then k's.

    grad_query, grad_key, grad_value: [N, T, H, d] in qkv's dtype, last stride 1, else any strides. At least one of the
    two needs must hold; what is not needed is None.
    """
    batch, tokens, heads, width = grad_query.shape
    chunks = triton.cdiv(tokens * heads, CHUNK)
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device) if need_input else None
    partials = (
        torch.empty(batch * chunks, 4 * width, dtype=torch.float32, device=qkv.device) if need_parameters else None
    )
    grads = [grad_query, grad_key, grad_value]
    gradient[(batch, chunks)](
        qkv, *grads, qkv if grad_qkv is None else grad_qkv, q_weight if partials is None else partials,
        q_weight, k_weight, tokens, chunks, qkv.stride(0), qkv.stride(1), *(grad.stride()[:3] for grad in grads), eps,
        HEADS=heads, WIDTH=width, CHUNK=CHUNK, INPUT=need_input, PARAMETERS=need_parameters,
        VECTOR=_vector(width, [qkv, *grads]), **_tile(width, BACKWARD_TILE), **_options(), enable_fp_fusion=True,
    )  # fmt: skip
    return grad_qkv, None if partials is None else ordered_sum(partials).view(4, width)


def aot_cases(arch: int) -> list[AotCase]:
    """Heads of SiT-B, L and XL; one case per type and per choice of gradients, to keep the compile time down."""
    both = {"INPUT": True, "PARAMETERS": True}
    cases = [_case(normalise, *shape, {}) for shape in ((12, 64, "bf16"), (16, 72, "bf16"), (16, 64, "fp16"))]
    cases += [_case(normalise, 16, 72, "fp32", {})]
    cases += [_case(gradient, *shape, both) for shape in ((12, 64, "bf16"), (16, 72, "bf16"), (16, 64, "fp16"))]
    cases += [_case(gradient, 16, 72, "fp32", both)]
    cases += [_case(gradient, 16, 72, "bf16", {"INPUT": True, "PARAMETERS": False}, " input")]
    cases += [_case(gradient, 16, 72, "bf16", {"INPUT": False, "PARAMETERS": True}, " parameters")]
    return cases


def _case(kernel: Any, heads: int, width: int, kind: str, needs: dict[str, bool], suffix: str = "") -> AotCase:
    tile = _tile(width, FORWARD_TILE if kernel is normalise else BACKWARD_TILE)
    options = _options()
    constants = {
        "HEADS": heads,
        "WIDTH": width,
        "VECTOR": 4 if kind == "fp32" else 8,
        "UPCAST": options.pop("UPCAST"),
        **tile,
        **needs,
    }
    if kernel is gradient:
        constants["CHUNK"] = CHUNK
    streams = ("qkv", "query", "key", "grad_query", "grad_key", "grad_value", "out")
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
