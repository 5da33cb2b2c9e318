r"""The adaLN-Zero family in one pass over the streams: gate + residual, norm, modulation, and their gradient.

With vectors per sample, m and v mean and variance of the row of x' as it is stored, and r = 1 / sqrt(v + eps)

    x' = x + gate * y,    n = r (x' - m),    out = n (1 + scale) + shift.

For gradients e of x' and g of out, with h = g (1 + scale) and means over the row,

    a = e + r (h - mean h - n mean(h n)),    dx = a,    dy = gate * a,
    dgate = sum of a y,    dshift = sum of g,    dscale = sum of g n     over the tokens of a sample.

That is LayerNorm. RMSNorm divides by the root of the mean square, which m and v give without cancellation, and its
gradient lacks the term of the mean:

    r = 1 / sqrt(v + m^2 + eps),    n = r x',    a = e + r (h - n mean(h n)).

Without y, x' is x; without scale there is no out, and scale may be without shift; e or g may be missing. A row stays in
registers from load to store, the vectors over all rows of a program.

Bits. CHUNK tokens of one sample make a partial sum of the three vectors; `add_chunks` adds the chunks in order, in
float64. Padded width, rows of a tile and warps order the sums inside: all three are functions of the width alone. Only
the rows of a program of the forward, one of PROGRAMS, are a matter of speed. The gradient lies in adaln_gradients.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import tuning
from dit_fast.kernels.adaln_gradients import CHUNK as CHUNK
from dit_fast.kernels.adaln_gradients import backward as backward
from dit_fast.kernels.adaln_gradients import differentiate as differentiate
from dit_fast.kernels.adaln_gradients import sum_all as sum_all
from dit_fast.kernels.adaln_rows import (
    AUTOCAST,
    HALF,
    MAX_WIDTH,
    PER_WARP,
    PURE,
    SINGLE,
    TOKENS,
    TYPES,
    as_stored,
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
from dit_fast.kernels.rows import MAX_CHUNKS, store_rounded

PROGRAMS = (TOKENS, 2 * TOKENS, 4 * TOKENS)  # rows of a program of the forward; all give the same bits


@triton.jit(do_not_specialize=("tokens",))
def modulate_rows(x, y, gate, shift, scale, x_new, out, mean, variance, tokens, x_strides, y_strides,
                  gate_stride, shift_stride, scale_stride, eps,
                  WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
                  RESIDUAL: tl.constexpr, NORM: tl.constexpr, RMS: tl.constexpr, SCALE_ONLY: tl.constexpr,
                  KNOWN: tl.constexpr, EMIT: tl.constexpr,
                  ALIGNED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """x_new, out [N, T, D], mean, variance [N, T], all contiguous. Program (n, i): TOKENS rows of sample n.

    RESIDUAL: there are y and x_new. NORM: there is out. RMS: of RMSNorm. SCALE_ONLY: there is no shift. KNOWN:
    statistics are read; EMIT: they are written.
    """
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * TOKENS
    channel = tl.arange(0, PADDED)[None, :]
    whole = channel < WIDTH
    if RESIDUAL:
        gates = read_vector(gate, sample, gate_stride, channel, whole, ALIGNED)
        y += sample * multiple(y, y_strides[0], ALIGNED)
    if NORM:
        gain = 1 + read_vector(scale, sample, scale_stride, channel, whole, ALIGNED)
        if not SCALE_ONLY:
            offset = read_vector(shift, sample, shift_stride, channel, whole, ALIGNED)
    x += sample * multiple(x, x_strides[0], ALIGNED)
    for start in range(0, TOKENS, ROWS):
        token = first + start + tl.arange(0, ROWS)[:, None]
        present = token < tokens
        inside = present & whole
        row = sample * tokens + token
        stream = read_rows(x, token, x_strides, channel, inside, ALIGNED)
        if RESIDUAL:
            stream += gates * read_rows(y, token, y_strides, channel, inside, ALIGNED)
            store_rounded(x_new + row * WIDTH + channel, stream, inside, UPCAST)
            stream = as_stored(x_new, stream, UPCAST)
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
                if RMS:
                    centred = stream
                    spread += centre * centre
                value = centred * (1 / tl.sqrt(spread + eps)) * gain
                if not SCALE_ONLY:
                    value += offset
                store_rounded(out + row * WIDTH + channel, value, inside, UPCAST)


def supports(x: Tensor) -> list[str]:
    """Why streams like x [N, T, D] cannot go through the kernels; empty if they can."""
    reasons = []
    if x.shape[-1] > MAX_WIDTH:
        reasons.append(f"width {x.shape[-1]} is more than {MAX_WIDTH}: a row would not fit into registers")
    if x.dtype not in TYPES:
        reasons.append(f"{x.dtype} is not float32, bfloat16 or float16")
    if x.shape[1] > TOKENS * MAX_CHUNKS:
        reasons.append(f"{x.shape[1]} tokens are more than {TOKENS * MAX_CHUNKS}")
    return reasons


def forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float,
    rms: bool, stats: tuple[Tensor, Tensor] | None, out_dtype: torch.dtype, want_stats: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(x_new, out, mean, variance): x_new is None without y and gate, out without scale.

    x, y: [N, T, D]; gate, shift, scale: [N, D]; any mixture of fp32, bf16 and fp16, any strides. stats: mean and
    variance [N, T] fp32 of x, only without y; they are handed back. Statistics are fp32 [N, T], of x_new as stored.
    """
    known = stats is not None
    key = (signature(x, y, gate, shift, scale), eps, rms, known, out_dtype, want_stats)
    launch = _FORWARD.get(key, key)
    if launch is key:
        inputs = (x, y, gate, shift, scale)
        rows = tuple(by_rows(tensor) for tensor in inputs)
        if any(copy is not tensor for copy, tensor in zip(rows, inputs, strict=True)):
            return forward(*rows, eps, rms, stats, out_dtype, want_stats)  # type: ignore[arg-type, call-arg]
        launch = _FORWARD.keep(key, _forward_launcher(x, y, gate, shift, scale, eps, rms, known, out_dtype, want_stats))
    # empty_like takes half of the time of empty, whose arguments are many
    x_new = None if y is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    out = None if scale is None else torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format)
    mean = variance = None
    if stats is not None:
        mean, variance = (each.contiguous() for each in stats)
    elif want_stats:
        mean = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
        variance = torch.empty_like(mean)
    if launch is not None:
        launch(*[x if tensor is None else tensor for tensor in (x, y, gate, shift, scale, x_new, out, mean, variance)])
    return x_new, out, mean, variance


_FORWARD = Kept()


def _forward_launcher(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float,
    rms: bool, known: bool, out_dtype: torch.dtype, want_stats: bool,
) -> Callable[..., None] | None:  # fmt: skip
    """None where there is nothing to compute."""
    emits, norm = want_stats and not known, scale is not None
    if not (x.numel() and (y is not None or norm or emits)):
        return None
    vector_strides = [0 if vector is None else vector.stride(0) for vector in (gate, shift, scale)]
    widths = (x.dtype, *((out_dtype,) if norm else ()))
    program = tuning.tuned(
        "adaln", x.device, x.shape[0] * x.shape[1], PROGRAMS, width=x.shape[2], stream=TYPES[x.dtype],
        compute=TYPES[out_dtype],
    ) or TOKENS  # fmt: skip
    constants = {
        "TOKENS": program, "RESIDUAL": y is not None, "NORM": norm, "RMS": rms, "SCALE_ONLY": norm and shift is None,
        "KNOWN": known, "EMIT": emits, "ALIGNED": has_aligned_rows([x, y, gate, shift, scale], widths),
        **tile_of(x.shape[-1]), **_options(x.shape[-1]), "enable_fp_fusion": True,
    }  # fmt: skip
    numbers = (x.shape[1], strides_of(x, x), strides_of(y, x), *vector_strides, eps)
    grid = (x.shape[0], triton.cdiv(x.shape[1], program))
    return launcher(modulate_rows, grid, numbers, constants, {"ALIGNED": False})


def _options(width: int) -> dict[str, Any]:
    """Of a tile with a third of padding (1152 of 2048) half as many warps do the same in 0.6 to 0.7 of the
    instructions. The gradient, which keeps more of a row, would spill so on sm_120."""
    return options_of(width, PER_WARP * (2 if 3 * width <= 2 * tile_of(width)["PADDED"] else 1))


def aot_cases(arch: int) -> list[AotCase]:
    """Widths of SiT-B, L and XL; every type with everything on, and the parts alone as training in bf16 runs them."""
    fused = {"RESIDUAL": True, "NORM": True, "RMS": False, "SCALE_ONLY": False, "KNOWN": False, "EMIT": True}
    shapes = ((768, PURE), (1024, HALF), (1152, PURE), (1152, AUTOCAST), (1152, SINGLE))
    alone = (fused | {"RESIDUAL": False}, fused | {"NORM": False})
    known = fused | {"RESIDUAL": False, "KNOWN": True, "EMIT": False}
    rms = (fused | {"RMS": True}, known | {"RMS": True}, fused | {"RESIDUAL": False, "RMS": True, "SCALE_ONLY": True})
    cases = [_case(modulate_rows, *shape, fused) for shape in shapes] + [
        _case(modulate_rows, 1152, AUTOCAST, parts) for parts in (*alone, known, *rms)
    ]
    cases.append(_case(modulate_rows, 1152, AUTOCAST, fused, unaligned=("x_strides", "y_strides")))
    return cases + [_case(modulate_rows, 1152, AUTOCAST, fused, program) for program in PROGRAMS if program != TOKENS]


def _case(
    kernel: Any, width: int, types: tuple[str, str], parts: dict[str, bool], program: int = TOKENS,
    unaligned: tuple[str, ...] = (),
) -> AotCase:  # fmt: skip
    """unaligned: strides that are multiples of 8 alone, as where a stream is cut out of a wider one."""
    options = _options(width)
    constants = {**tile_of(width), "TOKENS": program, **parts, "ALIGNED": True, "UPCAST": options.pop("UPCAST")}
    stream, branch = (f"*{each}" for each in types)
    # What is absent is passed as the launcher does it: by x.
    kinds: dict[str, Any] = {"x": stream, "x_new": stream, "eps": "fp32"}
    kinds |= dict.fromkeys(("y", "gate"), branch if parts["RESIDUAL"] else stream)
    kinds |= dict.fromkeys(("scale", "out"), branch if parts["NORM"] else stream)
    kinds |= {"shift": branch if parts["NORM"] and not parts["SCALE_ONLY"] else stream}
    kinds |= dict.fromkeys(("mean", "variance"), "*fp32")
    kinds |= dict.fromkeys(("tokens", "gate_stride", "shift_stride", "scale_stride"), "i32")
    kinds |= dict.fromkeys(("x_strides", "y_strides"), ("i32", "i32"))
    signature = {name: kinds[name] for name in kernel.arg_names if name not in constants}
    shown = " ".join(name.lower() for name, value in parts.items() if value)
    shown += "" if program == TOKENS else f" rows={program}"
    shown += " cut out" if unaligned else ""
    return AotCase(
        kernel, f"D={width} {'+'.join(types)} {shown}", signature, constants, options,
        unaligned=("tokens", "eps", *unaligned), wide_stores=True,
    )  # fmt: skip
