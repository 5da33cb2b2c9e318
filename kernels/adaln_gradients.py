"""Gradient of the adaLN-Zero family: one pass over the streams, then the sums over tokens; equations in adaln.py."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.adaln_rows import (
    AUTOCAST,
    HALF,
    PURE,
    SINGLE,
    by_rows,
    has_aligned_rows,
    multiple,
    options_of,
    read_rows,
    read_vector,
    strides_of,
    tile_of,
)
from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.launch import Kept, launcher, signature
from dit_fast.kernels.rows import store_rounded
from dit_fast.kernels.tables import address_table

CHUNK = 32  # tokens per partial sum, part of the definition
BLOCK = 256


@triton.jit(do_not_specialize=("tokens", "chunks"))
def differentiate_rows(grad_x_new, grad_out, x_new, y, gate, scale, mean, variance, grad_x, grad_y, partials,
                       tokens, chunks, above_strides, out_strides, x_strides, y_strides, gate_stride, scale_stride, eps,
                       WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
                       ABOVE: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, RMS: tl.constexpr,
                       SCALE_ONLY: tl.constexpr, ALIGNED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """grad_y [N, T, D] contiguous; grad_x too if NORM, else it is grad_x_new. partials [N, chunks, parts, D]: of gate
    if RESIDUAL, scale if NORM, before it of shift unless SCALE_ONLY.

    Program (n, chunk). ABOVE: there is grad_x_new. RMS: NORM is that of RMSNorm.
    """
    sample = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    first = chunk * CHUNK
    channel = tl.arange(0, PADDED)[None, :]
    whole = channel < WIDTH
    if RESIDUAL:
        gates = read_vector(gate, sample, gate_stride, channel, whole, ALIGNED)
        y += sample * multiple(y, y_strides[0], ALIGNED)
        grad_gate = tl.zeros([ROWS, PADDED], tl.float32)
    if NORM:
        gain = 1 + read_vector(scale, sample, scale_stride, channel, whole, ALIGNED)
        grad_out += sample * multiple(grad_out, out_strides[0], ALIGNED)
        x_new += sample * multiple(x_new, x_strides[0], ALIGNED)
        if not SCALE_ONLY:
            grad_shift = tl.zeros([ROWS, PADDED], tl.float32)
        grad_scale = tl.zeros([ROWS, PADDED], tl.float32)
    if ABOVE:
        grad_x_new += sample * multiple(grad_x_new, above_strides[0], ALIGNED)
    for start in range(0, CHUNK, ROWS):
        token = first + start + tl.arange(0, ROWS)[:, None]
        present = token < tokens
        inside = present & whole
        row = sample * tokens + token
        if ABOVE:
            total = read_rows(grad_x_new, token, above_strides, channel, inside, ALIGNED)
        else:
            total = tl.zeros([ROWS, PADDED], tl.float32)
        if RESIDUAL:
            branch = read_rows(y, token, y_strides, channel, inside, ALIGNED)
        if NORM:
            above = read_rows(grad_out, token, out_strides, channel, inside, ALIGNED)
            stream = read_rows(x_new, token, x_strides, channel, inside, ALIGNED)
            centre = tl.load(mean + row, mask=present, other=0.0)
            spread = tl.load(variance + row, mask=present, other=1.0)
            if RMS:
                rstd = 1 / tl.sqrt(spread + centre * centre + eps)
                unit = stream * rstd
                inner = above * gain
                along = tl.sum(inner * unit, 1)[:, None] / WIDTH
                total += rstd * (inner - unit * along)
            else:
                rstd = 1 / tl.sqrt(spread + eps)
                unit = (stream - centre) * rstd  # outside of the row `above` is zero, which is enough
                inner = above * gain
                level, along = tl.sum(inner, 1)[:, None] / WIDTH, tl.sum(inner * unit, 1)[:, None] / WIDTH
                total += rstd * (inner - level - unit * along)
            if not SCALE_ONLY:
                grad_shift += above
            grad_scale += above * unit
        if NORM:
            store_rounded(grad_x + row * WIDTH + channel, total, inside, UPCAST)
        if RESIDUAL:
            store_rounded(grad_y + row * WIDTH + channel, gates * total, inside, UPCAST)
            grad_gate += total * branch
    column = tl.arange(0, PADDED)
    partials += (sample * chunks + chunk) * ((RESIDUAL + 2 * NORM - SCALE_ONLY) * WIDTH) + column
    if RESIDUAL:
        tl.store(partials, tl.sum(grad_gate, 0), mask=column < WIDTH)
    if NORM:
        if not SCALE_ONLY:
            tl.store(partials + RESIDUAL * WIDTH, tl.sum(grad_shift, 0), mask=column < WIDTH)
        tl.store(partials + (RESIDUAL + 1 - SCALE_ONLY) * WIDTH, tl.sum(grad_scale, 0), mask=column < WIDTH)


@triton.jit(do_not_specialize=("chunks",))
def add_chunks(partials, grad_gate, grad_shift, grad_scale, chunks, width,
               BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, SCALE_ONLY: tl.constexpr,
               UPCAST: tl.constexpr):  # fmt: skip
    """grad_gate, grad_shift, grad_scale [N, D] contiguous from partials [N, chunks, parts, D]. Program (n, block)."""
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = sample * width + column
    step = (RESIDUAL + 2 * NORM - SCALE_ONLY) * width
    partials += sample * chunks * step + column
    gates = tl.zeros([BLOCK], tl.float64)
    shifts = tl.zeros([BLOCK], tl.float64)
    scales = tl.zeros([BLOCK], tl.float64)
    for _ in range(chunks):
        if RESIDUAL:
            gates += tl.load(partials, mask=inside, other=0.0).to(tl.float64)
        if NORM:
            if not SCALE_ONLY:
                shifts += tl.load(partials + RESIDUAL * width, mask=inside, other=0.0).to(tl.float64)
            scales += tl.load(partials + (RESIDUAL + 1 - SCALE_ONLY) * width, mask=inside, other=0.0).to(tl.float64)
        partials += step
    if RESIDUAL:
        store_rounded(grad_gate + place, gates.to(tl.float32), inside, UPCAST)
    if NORM:
        if not SCALE_ONLY:
            store_rounded(grad_shift + place, shifts.to(tl.float32), inside, UPCAST)
        store_rounded(grad_scale + place, scales.to(tl.float32), inside, UPCAST)


@triton.jit(do_not_specialize=("parts",))
def add_chunks_of_all(addresses, places, out, parts, width, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """out [N, parts, D] where `places` says, as `add_chunks` does it, from many partials. Program (n, entry, block)."""
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(2).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    entry = tl.program_id(1).to(tl.int64)
    source = tl.load(addresses + entry).to(tl.pointer_type(tl.float32))
    place = tl.load(places + entry)
    own, among, chunks = (place >> 4) & 3, (place >> 6) & 3, (place >> 8) & 0x7FFF
    step = among * width
    source += sample * chunks * step + own * width + column
    total = tl.zeros([BLOCK], tl.float64)
    for _ in range(chunks.to(tl.int32)):
        total += tl.load(source, mask=inside, other=0.0).to(tl.float64)
        source += step
    out += (sample * parts + (place >> 23)) * width + column
    store_rounded(out, total.to(tl.float32), inside, UPCAST)


def sum_all(partials: Sequence[tuple[int, Tensor]], out: Tensor) -> None:
    """Writes vectors' gradients into out [N, parts, D], contiguous, from the number of the first part and partial sums
    [N, chunks, 1 to 3, D] of each that `differentiate` gave; the bits of `backward`."""
    tensors, places = [], []
    for first, each in partials:
        _, chunks, among, _ = each.shape
        tensors += [each] * among
        # In one 32-bit number, a multiple of 16 as Triton compiles the table's kernel for: 256 parts, 2^15 chunks.
        places += [first + own << 23 | chunks << 8 | among << 6 | own << 4 for own in range(among)]
    batch, parts, width = out.shape
    key = (signature(out), len(tensors))
    launch = _SUMS.get(key)
    if launch is None:
        constants = {"BLOCK": BLOCK, "UPCAST": triton.knobs.runtime.interpret}
        constants |= {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
        grid = (batch, len(tensors), triton.cdiv(width, BLOCK))
        launch = _SUMS.keep(key, launcher(add_chunks_of_all, grid, (parts, width), constants))
    launch(*address_table(tensors, tuple(places)), out)


def backward(
    grad_x_new: Tensor | None, grad_out: Tensor | None, x_new: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, mean: Tensor | None, variance: Tensor | None, eps: float, rms: bool, shifted: bool,
    x_dtype: torch.dtype, y_dtype: torch.dtype | None, vector_dtypes: Sequence[torch.dtype],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, y, gate, shift and scale, contiguous, in the given dtypes; of one of the two gradients at least.

    Without grad_out that of x is grad_x_new, and None here, as are those of shift and scale. Without y those of y and
    gate are None, and that of shift where there was none; x_new, scale, mean and variance are only read with grad_out.
    x_new is x where there is no y.
    """
    grad_x, grad_y, partials, plan = _differentiated(
        grad_x_new, grad_out, x_new, y, gate, scale, mean, variance, eps, rms, shifted, x_dtype, y_dtype
    )
    vectors = [
        torch.empty_like(vector, dtype=dtype, memory_format=torch.contiguous_format)
        if here and vector is not None
        else None
        for here, vector, dtype in zip(plan.present, (gate, scale, scale), vector_dtypes, strict=True)
    ]
    if plan.add is not None:
        plan.add(partials, *[partials if vector is None else vector for vector in vectors])
    return grad_x, grad_y, vectors[0], vectors[1], vectors[2]


def differentiate(*given: Any) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """As `backward`, without vector_dtypes, with partial sums [N, chunks, parts, D] of the vectors that there are."""
    return _differentiated(*given)[:3]


def _differentiated(
    grad_x_new: Tensor | None, grad_out: Tensor | None, x_new: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, mean: Tensor | None, variance: Tensor | None, eps: float, rms: bool, shifted: bool,
    x_dtype: torch.dtype, y_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor, "_Plan"]:  # fmt: skip
    like = grad_out if grad_out is not None else grad_x_new
    if like is None:
        raise ValueError("grad_x_new and grad_out are both None")
    if grad_out is None:
        x_new = scale = mean = variance = None
    tensors = (grad_x_new, grad_out, x_new, y, gate, scale)
    key = (signature(like, *tensors), eps, rms, shifted, x_dtype, y_dtype)
    plan = _BACKWARD.get(key)
    if plan is None:
        rows: Any = tuple(by_rows(tensor) for tensor in tensors)
        if any(copy is not tensor for copy, tensor in zip(rows, tensors, strict=True)):
            return _differentiated(*rows, mean, variance, eps, rms, shifted, x_dtype, y_dtype)  # type: ignore[call-arg]
        plan = _BACKWARD.keep(key, _plan(like, *tensors, eps, rms, shifted, x_dtype, y_dtype))
    contiguous = torch.contiguous_format
    grad_x = None if grad_out is None else torch.empty_like(like, dtype=x_dtype, memory_format=contiguous)
    grad_y = None if y is None else torch.empty_like(y, dtype=y_dtype, memory_format=contiguous)
    partials = torch.empty(plan.partials, dtype=torch.float32, device=like.device)
    if plan.differentiate is not None:
        if mean is not None and variance is not None:
            mean, variance = mean.contiguous(), variance.contiguous()
        given = (*tensors, mean, variance, grad_x, grad_y, partials)
        plan.differentiate(*[like if each is None else each for each in given])
    return grad_x, grad_y, partials, plan


class _Plan(NamedTuple):
    """Of a backward: which vectors it gives, the shape of the partial sums, and the launches, None for none."""

    present: tuple[bool, bool, bool]
    partials: tuple[int, ...]
    differentiate: Callable[..., None] | None
    add: Callable[..., None] | None


_BACKWARD, _SUMS = Kept(), Kept()


def _plan(
    like: Tensor, grad_x_new: Tensor | None, grad_out: Tensor | None, x_new: Tensor | None, y: Tensor | None,
    gate: Tensor | None, scale: Tensor | None, eps: float, rms: bool, shifted: bool, x_dtype: torch.dtype,
    y_dtype: torch.dtype | None,
) -> _Plan:  # fmt: skip
    batch, tokens, width = like.shape
    parts = {"RESIDUAL": y is not None, "NORM": grad_out is not None}
    parts["SCALE_ONLY"] = parts["NORM"] and not shifted
    present = (parts["RESIDUAL"], parts["NORM"] and shifted, parts["NORM"])
    chunks = triton.cdiv(tokens, CHUNK)
    differentiate = add = None
    if like.numel():
        streams = [grad_x_new, grad_out, x_new, y]
        vector_strides = [0 if vector is None else vector.stride(0) for vector in (gate, scale)]
        results = [x_dtype] * parts["NORM"] + ([] if y_dtype is None else [y_dtype])
        constants = {
            "CHUNK": CHUNK, "ABOVE": grad_x_new is not None, **parts, "RMS": rms and parts["NORM"],
            "ALIGNED": has_aligned_rows([*streams, gate, scale], results),
            **tile_of(width), **options_of(width), "enable_fp_fusion": True,
        }  # fmt: skip
        numbers = (tokens, chunks, *(strides_of(each, like) for each in streams), *vector_strides, eps)
        differentiate = launcher(differentiate_rows, (batch, chunks), numbers, constants, {"ALIGNED": False})
    if batch and any(present):
        constants = {"BLOCK": BLOCK, **parts, "UPCAST": triton.knobs.runtime.interpret}
        constants |= {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
        add = launcher(add_chunks, (batch, triton.cdiv(width, BLOCK)), (chunks, width), constants)
    return _Plan(present, (batch, chunks, sum(present), width), differentiate, add)


def aot_cases(arch: int) -> list[AotCase]:
    """Widths of SiT-B, L and XL; every type with everything on, and the parts alone as training in bf16 runs them."""
    fused = {"ABOVE": True, "RESIDUAL": True, "NORM": True, "RMS": False, "SCALE_ONLY": False}
    shapes = ((768, PURE), (1024, HALF), (1152, PURE), (1152, AUTOCAST), (1152, SINGLE))
    alone = (fused | {"NORM": False}, fused | {"RESIDUAL": False}, fused | {"ABOVE": False, "RESIDUAL": False})
    rms = (fused | {"RMS": True}, fused | {"ABOVE": False, "RESIDUAL": False, "RMS": True, "SCALE_ONLY": True})
    cases = [_case(differentiate_rows, *shape, fused) for shape in shapes] + [
        _case(differentiate_rows, 1152, AUTOCAST, parts) for parts in (*alone, *rms)
    ]
    for residual, norm, bare in ((True, True, False), (True, False, False), (False, True, False), (False, True, True)):
        kinds = {"partials": "*fp32", "chunks": "i32", "width": "i32", "grad_gate": "*bf16" if residual else "*fp32"}
        kinds |= {"grad_shift": "*bf16" if norm and not bare else "*fp32", "grad_scale": "*bf16" if norm else "*fp32"}
        constants = {"BLOCK": BLOCK, "RESIDUAL": residual, "NORM": norm, "SCALE_ONLY": bare}
        constants["UPCAST"] = options_of(1152)["UPCAST"]
        signature = {name: kinds[name] for name in add_chunks.arg_names if name not in constants}
        shown = " ".join(name.lower() for name in ("RESIDUAL", "NORM", "SCALE_ONLY") if constants[name])
        launch = {"num_warps": 4, "num_stages": 1}
        cases.append(
            AotCase(add_chunks, f"bf16 {shown}", signature, constants, launch, unaligned=("chunks",), wide_loads=False)
        )
    kinds = {"addresses": "*i64", "places": "*i64", "out": "*bf16", "parts": "i32", "width": "i32"}
    constants = {"BLOCK": BLOCK, "UPCAST": options_of(1152)["UPCAST"]}
    cases.append(AotCase(add_chunks_of_all, "bf16", kinds, constants, launch, unaligned=("parts",), wide_loads=False))
    return cases


def _case(kernel: Any, width: int, types: tuple[str, str], parts: dict[str, bool]) -> AotCase:
    options = options_of(width)
    constants = {**tile_of(width), "CHUNK": CHUNK, **parts, "ALIGNED": True, "UPCAST": options.pop("UPCAST")}
    stream, branch = (f"*{each}" for each in types)
    # What is absent is passed as the launcher does it: by grad_out, or else by grad_x_new.
    like = branch if parts["NORM"] else stream
    kinds: dict[str, Any] = {"grad_x": stream if parts["NORM"] else like, "partials": "*fp32", "eps": "fp32"}
    kinds |= {"grad_x_new": stream if parts["ABOVE"] else like}
    kinds |= dict.fromkeys(("y", "gate", "grad_y"), branch if parts["RESIDUAL"] else like)
    kinds |= dict.fromkeys(("grad_out", "scale"), like) | {"x_new": stream}
    kinds |= dict.fromkeys(("mean", "variance"), "*fp32" if parts["NORM"] else like)
    kinds |= dict.fromkeys(("tokens", "chunks", "gate_stride", "scale_stride"), "i32")
    kinds |= dict.fromkeys(("above_strides", "out_strides", "x_strides", "y_strides"), ("i32", "i32"))
    signature = {name: kinds[name] for name in kernel.arg_names if name not in constants}
    shown = " ".join(name.lower() for name, value in parts.items() if value)
    return AotCase(
        kernel, f"D={width} {'+'.join(types)} {shown}", signature, constants, options,
        unaligned=("tokens", "chunks", "eps"), wide_stores=True,
    )  # fmt: skip
