r"""The adaLN-Zero family in one pass over the streams: gate + residual, LayerNorm, modulation, and their gradient.

With vectors per sample, m and v mean and variance of the row of x' as it is stored, and r = 1 / sqrt(v + eps)

    x' = x + gate * y,    n = r (x' - m),    out = n (1 + scale) + shift.

For gradients e of x' and g of out, with h = g (1 + scale) and means over the row,

    a = e + r (h - mean h - n mean(h n)),    dx = a,    dy = gate * a,
    dgate = sum of a y,    dshift = sum of g,    dscale = sum of g n     over the tokens of a sample.

Without y, x' is x; without shift and scale there is no out; e or g may be missing. A row stays in registers from load
to store, the vectors over all rows of a program.

Bits. CHUNK tokens of one sample make a partial sum of the three vectors; `add_chunks` adds the chunks in order, in
float64. Padded width, rows of a tile and warps order the sums inside: all three are functions of the width alone. Only
TOKENS, the rows of a program of the forward, is a matter of speed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.aot import Case
from dit_fast.kernels.rows import store_rounded, to_bfloat16

MAX_WIDTH = 2048
CHUNK = 32  # tokens per partial sum
MAX_CHUNKS = 65535  # along the second axis of a grid
TOKENS = 8
TILE = 1024  # elements of a tile where rows are short
PER_WARP = 256  # 8 per thread: 16 bytes of a 16-bit type
BLOCK = 256
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit
def _multiple(pointer, stride, ALIGNED: tl.constexpr):
    """The same stride, known to be a multiple of 16 bytes. A hint on the pointer is lost where additions combine."""
    VECTOR: tl.constexpr = (128 // pointer.dtype.element_ty.primitive_bitwidth) if ALIGNED else 1
    return stride // VECTOR * VECTOR


@triton.jit
def _rows(pointer, token, strides, channel, inside, ALIGNED: tl.constexpr):
    place = pointer + token * _multiple(pointer, strides[1], ALIGNED) + channel
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _vector(pointer, sample, stride, channel, whole, ALIGNED: tl.constexpr):
    place = pointer + sample * _multiple(pointer, stride, ALIGNED) + channel
    return tl.load(place, mask=whole, other=0.0).to(tl.float32)


@triton.jit
def _as_stored(pointer, value, INTERPRETED: tl.constexpr):
    """float32 `value` after rounding to the type that `pointer` points at."""
    if pointer.dtype.element_ty == tl.bfloat16:
        value = to_bfloat16(value, INTERPRETED).to(tl.float32)
    else:
        value = value.to(pointer.dtype.element_ty).to(tl.float32)
    return value


@triton.jit(do_not_specialize=("tokens",))
def modulate_rows(x, y, gate, shift, scale, x_new, out, mean, variance, tokens, x_strides, y_strides,
                  gate_stride, shift_stride, scale_stride, eps,
                  WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
                  RESIDUAL: tl.constexpr, NORM: tl.constexpr, KNOWN: tl.constexpr, EMIT: tl.constexpr,
                  ALIGNED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """x_new, out [N, T, D], mean, variance [N, T], all contiguous. Program (n, i): TOKENS rows of sample n.

    RESIDUAL: there are y and x_new. NORM: there is out. KNOWN: statistics are read; EMIT: they are written.
    """
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * TOKENS
    channel = tl.arange(0, PADDED)[None, :]
    whole = channel < WIDTH
    if RESIDUAL:
        gates = _vector(gate, sample, gate_stride, channel, whole, ALIGNED)
        y += sample * _multiple(y, y_strides[0], ALIGNED)
    if NORM:
        gain = 1 + _vector(scale, sample, scale_stride, channel, whole, ALIGNED)
        offset = _vector(shift, sample, shift_stride, channel, whole, ALIGNED)
    x += sample * _multiple(x, x_strides[0], ALIGNED)
    for start in range(0, TOKENS, ROWS):
        token = first + start + tl.arange(0, ROWS)[:, None]
        present = token < tokens
        inside = present & whole
        row = sample * tokens + token
        stream = _rows(x, token, x_strides, channel, inside, ALIGNED)
        if RESIDUAL:
            stream += gates * _rows(y, token, y_strides, channel, inside, ALIGNED)
            store_rounded(x_new + row * WIDTH + channel, stream, inside, UPCAST)
            stream = _as_stored(x_new, stream, UPCAST)
        if NORM or EMIT:
            if KNOWN:
                centre = tl.load(mean + row, mask=present, other=0.0)
                spread = tl.load(variance + row, mask=present, other=0.0)
                centred = stream - centre
            else:
                centre = tl.sum(stream, 1)[:, None] / WIDTH
                centred = tl.where(whole, stream - centre, 0.0)
                spread = tl.sum(centred * centred, 1)[:, None] / WIDTH
            if EMIT:
                tl.store(mean + row, centre, mask=present)
                tl.store(variance + row, spread, mask=present)
            if NORM:
                value = centred * (1 / tl.sqrt(spread + eps)) * gain + offset
                store_rounded(out + row * WIDTH + channel, value, inside, UPCAST)


@triton.jit(do_not_specialize=("tokens", "chunks"))
def differentiate_rows(grad_x_new, grad_out, x_new, y, gate, scale, mean, variance, grad_x, grad_y, partials,
                       tokens, chunks, above_strides, out_strides, x_strides, y_strides, gate_stride, scale_stride, eps,
                       WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
                       ABOVE: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
                       ALIGNED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """grad_x, grad_y [N, T, D] contiguous; partials [N, chunks, parts, D]: of gate if RESIDUAL, shift, scale if NORM.

    Program (n, chunk). ABOVE: there is grad_x_new.
    """
    sample = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    first = chunk * CHUNK
    channel = tl.arange(0, PADDED)[None, :]
    whole = channel < WIDTH
    if RESIDUAL:
        gates = _vector(gate, sample, gate_stride, channel, whole, ALIGNED)
        y += sample * _multiple(y, y_strides[0], ALIGNED)
        grad_gate = tl.zeros([ROWS, PADDED], tl.float32)
    if NORM:
        gain = 1 + _vector(scale, sample, scale_stride, channel, whole, ALIGNED)
        grad_out += sample * _multiple(grad_out, out_strides[0], ALIGNED)
        x_new += sample * _multiple(x_new, x_strides[0], ALIGNED)
        grad_shift = tl.zeros([ROWS, PADDED], tl.float32)
        grad_scale = tl.zeros([ROWS, PADDED], tl.float32)
    if ABOVE:
        grad_x_new += sample * _multiple(grad_x_new, above_strides[0], ALIGNED)
    for start in range(0, CHUNK, ROWS):
        token = first + start + tl.arange(0, ROWS)[:, None]
        present = token < tokens
        inside = present & whole
        row = sample * tokens + token
        if ABOVE:
            total = _rows(grad_x_new, token, above_strides, channel, inside, ALIGNED)
        else:
            total = tl.zeros([ROWS, PADDED], tl.float32)
        if RESIDUAL:
            branch = _rows(y, token, y_strides, channel, inside, ALIGNED)
        if NORM:
            above = _rows(grad_out, token, out_strides, channel, inside, ALIGNED)
            stream = _rows(x_new, token, x_strides, channel, inside, ALIGNED)
            centre = tl.load(mean + row, mask=present, other=0.0)
            rstd = 1 / tl.sqrt(tl.load(variance + row, mask=present, other=1.0) + eps)
            unit = (stream - centre) * rstd  # outside of the row `above` is zero, which is enough
            inner = above * gain
            along = tl.sum(inner * unit, 1)[:, None] / WIDTH
            total += rstd * (inner - tl.sum(inner, 1)[:, None] / WIDTH - unit * along)
            grad_shift += above
            grad_scale += above * unit
        store_rounded(grad_x + row * WIDTH + channel, total, inside, UPCAST)
        if RESIDUAL:
            store_rounded(grad_y + row * WIDTH + channel, gates * total, inside, UPCAST)
            grad_gate += total * branch
    column = tl.arange(0, PADDED)
    partials += (sample * chunks + chunk) * ((RESIDUAL + 2 * NORM) * WIDTH) + column
    if RESIDUAL:
        tl.store(partials, tl.sum(grad_gate, 0), mask=column < WIDTH)
    if NORM:
        tl.store(partials + RESIDUAL * WIDTH, tl.sum(grad_shift, 0), mask=column < WIDTH)
        tl.store(partials + (RESIDUAL + 1) * WIDTH, tl.sum(grad_scale, 0), mask=column < WIDTH)


@triton.jit(do_not_specialize=("chunks",))
def add_chunks(partials, grad_gate, grad_shift, grad_scale, chunks, width,
               BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """grad_gate, grad_shift, grad_scale [N, D] contiguous from partials [N, chunks, parts, D]. Program (n, block)."""
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = sample * width + column
    step = (RESIDUAL + 2 * NORM) * width
    partials += sample * chunks * step + column
    gates = tl.zeros([BLOCK], tl.float64)
    shifts = tl.zeros([BLOCK], tl.float64)
    scales = tl.zeros([BLOCK], tl.float64)
    for _ in range(chunks):
        if RESIDUAL:
            gates += tl.load(partials, mask=inside, other=0.0).to(tl.float64)
        if NORM:
            shifts += tl.load(partials + RESIDUAL * width, mask=inside, other=0.0).to(tl.float64)
            scales += tl.load(partials + (RESIDUAL + 1) * width, mask=inside, other=0.0).to(tl.float64)
        partials += step
    if RESIDUAL:
        store_rounded(grad_gate + place, gates.to(tl.float32), inside, UPCAST)
    if NORM:
        store_rounded(grad_shift + place, shifts.to(tl.float32), inside, UPCAST)
        store_rounded(grad_scale + place, scales.to(tl.float32), inside, UPCAST)


def supports(x: Tensor) -> list[str]:
    """Why streams like x [N, T, D] cannot go through the kernels; empty if they can."""
    reasons = []
    if x.shape[-1] > MAX_WIDTH:
        reasons.append(f"width {x.shape[-1]} is more than {MAX_WIDTH}: a row would not fit into registers")
    if x.dtype not in _TYPES:
        reasons.append(f"{x.dtype} is not float32, bfloat16 or float16")
    if x.shape[1] > TOKENS * MAX_CHUNKS:
        reasons.append(f"{x.shape[1]} tokens are more than {TOKENS * MAX_CHUNKS}")
    return reasons


def _by_rows(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _is_aligned(tensors: Sequence[Tensor | None]) -> bool:
    """Whether every row of every tensor starts at a multiple of 16 bytes, results of x's width included."""
    for tensor in tensors:
        if tensor is None:
            continue
        steps = [step for step, length in zip(tensor.stride()[:-1], tensor.shape, strict=False) if length > 1]
        if tensor.data_ptr() % 16 or any(step * tensor.element_size() % 16 for step in (*steps, tensor.shape[-1])):
            return False
    return True


def _tile(width: int) -> dict[str, int]:
    padded = max(16, triton.next_power_of_2(width))
    return {"WIDTH": width, "PADDED": padded, "ROWS": min(TOKENS, max(1, TILE // padded))}


def _options(width: int) -> dict[str, Any]:
    tile = _tile(width)
    warps = max(1, tile["PADDED"] * tile["ROWS"] // PER_WARP)
    return {"UPCAST": triton.knobs.runtime.interpret, "num_warps": warps, "num_stages": 1}


def _strides(tensor: Tensor | None, like: Tensor) -> tuple[int, int]:
    tensor = like if tensor is None else tensor
    return tensor.stride(0), tensor.stride(1)


def forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float,
    stats: tuple[Tensor, Tensor] | None, out_dtype: torch.dtype, want_stats: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(x_new, out, mean, variance): x_new is None without y and gate, out without shift and scale.

    x, y: [N, T, D]; gate, shift, scale: [N, D]; any mixture of fp32, bf16 and fp16, any strides. stats: mean and
    variance [N, T] fp32 of x, only without y; they are handed back. Statistics are fp32 [N, T], of x_new as stored.
    """
    x, y, gate, shift, scale = (_by_rows(tensor) for tensor in (x, y, gate, shift, scale))
    batch, tokens, width = x.shape
    x_new = None if y is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = None if shift is None else torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean = variance = None
    if stats is not None:
        mean, variance = (each.contiguous() for each in stats)
    elif want_stats:
        mean, variance = (torch.empty(batch, tokens, dtype=torch.float32, device=x.device) for _ in range(2))
    emits = want_stats and stats is None
    if x.numel() and (x_new is not None or out is not None or emits):
        pointers = [
            x if tensor is None else tensor for tensor in (x, y, gate, shift, scale, x_new, out, mean, variance)
        ]
        vector_strides = [0 if vector is None else vector.stride(0) for vector in (gate, shift, scale)]
        modulate_rows[(batch, triton.cdiv(tokens, TOKENS))](
            *pointers, tokens, _strides(x, x), _strides(y, x), *vector_strides, eps, TOKENS=TOKENS,
            RESIDUAL=y is not None, NORM=out is not None, KNOWN=stats is not None, EMIT=emits,
            ALIGNED=_is_aligned([x, y, gate, shift, scale, x_new, out]),
            **_tile(width), **_options(width), enable_fp_fusion=True,
        )  # fmt: skip
    return x_new, out, mean, variance


def backward(
    grad_x_new: Tensor | None, grad_out: Tensor | None, x_new: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, mean: Tensor | None, variance: Tensor | None, eps: float, x_dtype: torch.dtype,
    y_dtype: torch.dtype | None, vector_dtypes: Sequence[torch.dtype],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, y, gate, shift and scale, contiguous, in the given dtypes; of one of the two gradients at least.

    Without y those of y and gate are None, without grad_out those of shift and scale; x_new, scale, mean and variance
    are only read with grad_out. x_new is x where there is no y.
    """
    grad_x_new, grad_out, x_new, y, gate, scale = (
        _by_rows(tensor) for tensor in (grad_x_new, grad_out, x_new, y, gate, scale)
    )
    like = grad_out if grad_out is not None else grad_x_new
    if like is None:
        raise ValueError("grad_x_new and grad_out are both None")
    (batch, tokens, width), device = like.shape, like.device
    parts = {"RESIDUAL": y is not None, "NORM": grad_out is not None}
    if not parts["NORM"]:
        x_new = scale = mean = variance = None
    grad_x = torch.empty(like.shape, dtype=x_dtype, device=device)
    grad_y = None if y is None else torch.empty(like.shape, dtype=y_dtype, device=device)
    present = (parts["RESIDUAL"], parts["NORM"], parts["NORM"])
    vectors = [
        torch.empty(batch, width, dtype=dtype, device=device) if here else None
        for here, dtype in zip(present, vector_dtypes, strict=True)
    ]
    chunks = triton.cdiv(tokens, CHUNK)
    partials = torch.empty(batch, chunks, sum(present), width, dtype=torch.float32, device=device)
    streams = [grad_x_new, grad_out, x_new, y]
    if like.numel():
        statistics = [None if each is None else each.contiguous() for each in (mean, variance)]
        pointers = [like if each is None else each for each in (*streams, gate, scale, *statistics, grad_x, grad_y)]
        vector_strides = [0 if vector is None else vector.stride(0) for vector in (gate, scale)]
        differentiate_rows[(batch, chunks)](
            *pointers, partials, tokens, chunks, *(_strides(each, like) for each in streams), *vector_strides, eps,
            CHUNK=CHUNK, ABOVE=grad_x_new is not None, **parts,
            ALIGNED=_is_aligned([*streams, gate, scale, grad_x, grad_y]),
            **_tile(width), **_options(width), enable_fp_fusion=True,
        )  # fmt: skip
    if batch and any(present):
        interpreted = triton.knobs.runtime.interpret
        pointers = [partials if vector is None else vector for vector in vectors]
        add_chunks[(batch, triton.cdiv(width, BLOCK))](
            partials, *pointers, chunks, width, BLOCK=BLOCK, **parts, UPCAST=interpreted,
            num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return grad_x, grad_y, vectors[0], vectors[1], vectors[2]


_PURE = {"stream": "bf16", "branch": "bf16"}
_AUTOCAST = {"stream": "fp32", "branch": "bf16"}
_FUSED = {"RESIDUAL": True, "NORM": True}
_FORWARD = [
    (768, _PURE, _FUSED | {"KNOWN": False, "EMIT": True}),
    (1024, {"stream": "fp16", "branch": "fp16"}, _FUSED | {"KNOWN": False, "EMIT": True}),
    (1152, _PURE, _FUSED | {"KNOWN": False, "EMIT": True}),
    (1152, _AUTOCAST, _FUSED | {"KNOWN": False, "EMIT": True}),
    (1152, {"stream": "fp32", "branch": "fp32"}, _FUSED | {"KNOWN": False, "EMIT": True}),
    (1152, _AUTOCAST, {"RESIDUAL": False, "NORM": True, "KNOWN": True, "EMIT": False}),
    (1152, _AUTOCAST, {"RESIDUAL": False, "NORM": True, "KNOWN": False, "EMIT": True}),
    (1152, _AUTOCAST, {"RESIDUAL": True, "NORM": False, "KNOWN": False, "EMIT": True}),
]
_BACKWARD = [
    (768, _PURE, _FUSED | {"ABOVE": True}),
    (1024, {"stream": "fp16", "branch": "fp16"}, _FUSED | {"ABOVE": True}),
    (1152, _PURE, _FUSED | {"ABOVE": True}),
    (1152, _AUTOCAST, _FUSED | {"ABOVE": True}),
    (1152, {"stream": "fp32", "branch": "fp32"}, _FUSED | {"ABOVE": True}),
    (1152, _AUTOCAST, {"RESIDUAL": False, "NORM": True, "ABOVE": False}),
    (1152, _AUTOCAST, {"RESIDUAL": True, "NORM": False, "ABOVE": True}),
]


def aot_cases(arch: int) -> list[Case]:
    """Widths of SiT-B, L and XL; every type with everything on, and the parts alone as training in bf16 runs them."""
    cases = [_case(modulate_rows, *each, {"TOKENS": TOKENS}) for each in _FORWARD]
    cases += [_case(differentiate_rows, *each, {"CHUNK": CHUNK}) for each in _BACKWARD]
    parts = (_FUSED, {"RESIDUAL": True, "NORM": False}, {"RESIDUAL": False, "NORM": True})
    cases += [_case(add_chunks, 1152, _PURE, each, {}) for each in parts]
    return cases


def _case(kernel: Any, width: int, types: dict[str, str], parts: dict[str, bool], counts: dict[str, int]) -> Case:
    options = _options(width)
    if kernel is add_chunks:
        constants = {"BLOCK": BLOCK, "UPCAST": options.pop("UPCAST"), **parts}
        options = {"num_warps": 4, "num_stages": 1}
    else:
        constants = {**_tile(width), **counts, **parts, "ALIGNED": True, "UPCAST": options.pop("UPCAST")}
    streams, branch = f"*{types['stream']}", f"*{types['branch']}"
    residual, norm = parts["RESIDUAL"], parts["NORM"]
    # What is absent is passed as the launcher does: by another tensor.
    like = branch if kernel is differentiate_rows and norm else streams
    kinds = dict.fromkeys(("x", "grad_x"), streams)
    kinds |= dict.fromkeys(("x_new",), streams if residual else like)
    kinds |= {"grad_x_new": streams if parts.get("ABOVE") else like, "grad_out": branch if norm else like}
    kinds |= dict.fromkeys(("y", "gate", "grad_y"), branch if residual else like)
    kinds |= dict.fromkeys(("shift", "scale", "out"), branch if norm else like)
    known = norm if kernel is differentiate_rows else parts.get("KNOWN") or parts.get("EMIT")
    kinds |= dict.fromkeys(("mean", "variance"), "*fp32" if known else like) | {"partials": "*fp32"}
    if kernel is differentiate_rows:
        kinds["x_new"] = streams if norm else like
    if kernel is add_chunks:
        kinds |= {"grad_gate": branch if residual else "*fp32"}
        kinds |= dict.fromkeys(("grad_shift", "grad_scale"), branch if norm else "*fp32")
    numbers = dict.fromkeys(("tokens", "chunks", "width", "gate_stride", "shift_stride", "scale_stride"), "i32")
    pairs = {name: ("i32", "i32") for name in kernel.arg_names if name.endswith("_strides")}
    kinds |= numbers | pairs | {"eps": "fp32"}
    signature = {name: kinds[name] for name in kernel.arg_names if name not in constants}
    shown = " ".join(name.lower() for name, value in parts.items() if value)
    narrow = kernel is add_chunks
    return Case(
        kernel, f"D={width} {types['stream']}+{types['branch']} {shown}", signature, constants, options,
        unaligned=("tokens", "chunks", "eps"), wide_loads=not narrow, wide_stores=not narrow,
    )  # fmt: skip
