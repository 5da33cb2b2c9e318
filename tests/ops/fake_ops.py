"""Single ops on the fake GPU, with all their options, forward and backward; `CASES` by name."""

from tests.ops.fake_device import GPU, Trace, trace

# isort: split
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_fast import ops
from dit_fast.ops.draws import draws

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (F32, BF16, F16, F64)
MIXED = ((F32, BF16), (BF16, BF16), (F16, F16), (F32, F32), (F64, F64))  # stream, branch


def new(*shape: int, dtype: torch.dtype = F32, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU).requires_grad_(grad)


def laid(form: str, *shape: int, dtype: torch.dtype) -> Tensor:
    """A stream [N, T, D]: dense, a slice at odd addresses, or the memory of another order of its dimensions."""
    samples, tokens, width = shape
    if form == "odd":
        x = new(samples, tokens, width + 3, dtype=dtype, grad=False)[..., 1:-2]
    elif form == "tokens first":
        x = new(tokens, samples, width, dtype=dtype, grad=False).transpose(0, 1)
    elif form == "channels first":
        x = new(samples, width, tokens, dtype=dtype, grad=False).transpose(1, 2)
    else:
        x = new(*shape, dtype=dtype, grad=False)
    return x.requires_grad_()


FORMS = ("dense", "odd", "tokens first", "channels first")


def both_ways(results: Any) -> None:
    """Backward from every result with dense gradients, with one number expanded, and with transposed ones."""
    every = results if isinstance(results, tuple | list) else (results,)
    outputs = [x for x in every if isinstance(x, Tensor) and x.requires_grad]
    forms: list[Callable[[Tensor], Tensor]] = [
        lambda x: torch.empty(x.shape, dtype=x.dtype, device=GPU),
        lambda x: torch.empty((), dtype=x.dtype, device=GPU).expand(x.shape),
        lambda x: torch.empty(x.shape[::-1], dtype=x.dtype, device=GPU).permute(tuple(range(x.dim()))[::-1]),
    ]
    for form in forms if outputs else ():
        torch.autograd.backward(outputs, [form(x) for x in outputs], retain_graph=True)
    if len(outputs) > 1:
        outputs[-1].sum().backward(retain_graph=True)  # the others get none


def adaln() -> Iterator[tuple[str, Callable[[], Any]]]:
    def run(
        part: str, norm: str, shifted: bool, x: Tensor, y: Tensor, vectors: Sequence[Tensor], **options: Any
    ) -> Any:
        gate, shift, scale = vectors
        if part == "residual":
            return ops.gate_residual(x, y, gate, return_stats=True)
        given = (shift if shifted else None, scale)
        if part == "modulate":
            stats = ops.row_statistics(x)
            ops.layer_norm_modulate(x, *given, norm=norm, stats=stats, **options).sum().backward()
            return ops.layer_norm_modulate(x, *given, norm=norm, **options)
        return ops.gate_residual_modulate(x, y, gate, *given, norm=norm, return_stats=True, **options)

    def case(part: str, norm: str, shifted: bool, types: Any, size: Any, form: str, chunked: bool) -> Any:
        stream, branch = types
        samples, _, width = size
        x, y = laid(form, *size, dtype=stream), laid(form, *size, dtype=branch)
        vectors = new(samples, 6 * width, dtype=branch).chunk(6, 1)[:3] if chunked else [
            new(samples, width, dtype=branch) for _ in range(3)
        ]  # fmt: skip
        return run(part, norm, shifted, x, y, vectors, out_dtype=branch)

    forms = [("modulate", "layer", True), ("residual", "layer", True), ("both", "layer", True), ("both", "rms", True),
             ("both", "rms", False), ("modulate", "rms", False), ("both", "layer", False)]  # fmt: skip
    plain = ((32, 256, 1152), "dense", True)
    for form, types in itertools.product(forms, MIXED):
        yield f"{form} {types}", partial(case, *form, types, *plain)
    for size in ((4, 257, 768), (4, 256, 1024), (1, 1, 1152), (2, 65, 1150), (2, 16, 8)):
        yield f"{size}", partial(case, *forms[2], MIXED[0], size, "dense", True)
    for layout, chunked in itertools.product(FORMS, (True, False)):
        yield f"{layout} {chunked}", partial(case, *forms[2], MIXED[0], (4, 64, 1152), layout, chunked)
        yield f"{layout} {chunked} rms", partial(case, *forms[4], MIXED[1], (4, 64, 768), layout, chunked)
    yield "sums of many", partial(sums_of_many, 28)
    yield (
        "a vector for each token",
        lambda: ops.gate_residual_modulate(*(new(4, 64, 768, dtype=BF16) for _ in range(5)), backend="auto"),
    )


def sums_of_many(blocks: int) -> Tensor:
    """What blocks leave, which no op launches."""
    from dit_fast.kernels import adaln as kernel

    partials = [new(4, 8, parts, 1152, dtype=F32).detach() for parts in (2, 3, 1) * blocks]
    firsts = [first + 6 * block for block in range(blocks) for first in (0, 2, 5)]
    out = new(4, 6 * blocks + 2, 1152, dtype=BF16).detach()
    kernel.sum_all([*zip(firsts, partials, strict=True)], out)
    return out


def long_skip() -> Iterator[tuple[str, Callable[[], Any]]]:
    def case(types: Any, weights: torch.dtype, size: Any, form: str, backend: str, stats: bool, needs: Any) -> Any:
        width = size[-1]
        x, skip = (laid(form, *size, dtype=dtype) for dtype in types)
        parts = [new(*shape, dtype=weights) for shape in ((2 * width,), (2 * width,), (width, 2 * width), (width,))]
        for tensor, needed in zip((x, skip, *parts), needs, strict=True):
            tensor.requires_grad_(needed)
        known = {"x_stats": ops.row_statistics(x), "skip_stats": ops.row_statistics(skip)} if stats else {}
        with torch.autocast("cuda", BF16) if weights == F32 and F64 not in types else nullcontext():
            return ops.long_skip(x, skip, *parts, backend=backend, **known)

    every, size = (True,) * 6, (32, 256, 1152)
    for backend in ("auto", "gemm", "torch"):
        for types, weights in (((F32, F32), F32), ((BF16, F32), F32), ((BF16, BF16), F32), ((BF16, BF16), BF16),
                               ((F16, F16), F16), ((F64, F64), F64)):  # fmt: skip
            yield f"{types} {weights} {backend}", partial(case, types, weights, size, "dense", backend, False, every)
        for needs in ((True, False, True, False, False, True), (False, True, False, True, True, False),
                      (False, False, True, True, True, True), (True, True, False, False, False, False)):  # fmt: skip
            yield f"{needs} {backend}", partial(case, (F32, F32), F32, size, "dense", backend, True, needs)
            yield f"{needs} {backend} bf16", partial(case, (BF16, BF16), F32, size, "dense", backend, False, needs)
    for sizes in ((1, 1, 1152), (1, 300, 768), (3, 33, 1024), (1, 40, 16), (1, 40, 24), (1, 7, 36)):
        for types in ((F32, F32), (BF16, BF16), (F32, BF16)):
            yield f"{sizes} {types}", partial(case, types, F32, sizes, "dense", "auto", True, every)
    for form in FORMS:
        yield form, partial(case, (F32, BF16), F32, (4, 64, 768), form, "auto", True, every)


def gelu_mlp() -> Iterator[tuple[str, Callable[[], Any]]]:
    def case(dtype: torch.dtype, autocast: bool, grad: bool, backend: str, form: str, width: int, needs: Any) -> Any:
        parts = ((4 * width, width), (4 * width,), (width, 4 * width), (width,))
        inputs = [laid(form, 32, 256, width, dtype=dtype), *(new(*shape, dtype=dtype) for shape in parts)]
        for tensor, needed in zip(inputs, needs, strict=True):
            tensor.requires_grad_(needed)
        with torch.autocast("cuda", BF16, enabled=autocast), torch.set_grad_enabled(grad):
            return ops.gelu_mlp(*inputs, backend=backend)

    every = (True,) * 5
    for dtype, backend, grad in itertools.product(DTYPES, ("auto", "triton", "recompute", "torch"), (True, False)):
        if (dtype, backend) != (F64, "triton"):  # refused
            yield f"{dtype} {backend} {grad}", partial(case, dtype, False, grad, backend, "dense", 1152, every)
    for width, grad in itertools.product((768, 1024, 1152, 36), (True, False)):
        yield f"autocast {width} {grad}", partial(case, F32, True, grad, "auto", "dense", width, every)
    for backend in ("auto", "triton"):
        for places in ((0,), (1, 3), (2, 4), (3, 4)):
            needs = tuple(place in places for place in range(5))
            yield f"{places} {backend}", partial(case, BF16, False, True, backend, "dense", 768, needs)
        for form in FORMS:
            yield f"{form} {backend}", partial(case, BF16, False, True, backend, form, 768, every)


def qk_norm() -> Iterator[tuple[str, Callable[[], Any]]]:
    def case(dtype: torch.dtype, norm: str, weights: bool, rotary: bool, heads: int, width: int, form: str) -> Any:
        qkv = laid(form, 4, 64, 3 * heads * width, dtype=dtype)
        parameters = [new(width) if weights and (norm == "layer" or place % 2 == 0) else None for place in range(4)]
        tables = tuple(new(64, width, grad=False) for _ in range(2)) if rotary else None
        return ops.qk_norm(qkv, heads, *parameters, norm=norm, rotary=tables)

    forms = [("layer", True, False), ("layer", True, True), ("layer", False, False), ("rms", True, False),
             ("rms", True, True), ("rms", False, True), ("none", False, True), ("none", False, False)]  # fmt: skip
    for form, dtype in itertools.product(forms, DTYPES):
        yield f"{form} {dtype}", partial(case, dtype, *form, 16, 72, "dense")
    for heads, width in ((12, 64), (16, 64), (16, 80), (3, 34), (1, 8)):
        yield f"{heads} x {width}", partial(case, BF16, *forms[1], heads, width, "dense")
    for layout in FORMS:
        yield layout, partial(case, BF16, *forms[0], 16, 72, layout)


def repa_cosine() -> Iterator[tuple[str, Callable[[], Any]]]:
    def case(prediction: torch.dtype, target: torch.dtype, width: int, form: str, needs: tuple[bool, bool]) -> Any:
        p, q = (laid(form, 8, 64, width, dtype=dtype) for dtype in (prediction, target))
        return ops.repa_cosine(p.requires_grad_(needs[0]), q.requires_grad_(needs[1]))

    for types in itertools.product(DTYPES, DTYPES):
        yield f"{types}", partial(case, *types, 768, "dense", (True, False))
    for width, needs in itertools.product((768, 1024, 1536, 6), ((True, True), (False, True), (True, False))):
        yield f"{width} {needs}", partial(case, BF16, F32, width, "dense", needs)
    for form in FORMS:
        yield form, partial(case, BF16, F32, 1024, form, (True, True))


def flow() -> Iterator[tuple[str, Callable[[], Any]]]:
    def case(dtype: torch.dtype, samples: int, shape: Any, path: str, seed: int, needs: tuple[bool, bool]) -> Any:
        latents, prediction = new(samples, *shape, grad=needs[1]), new(samples, *shape, dtype=dtype, grad=needs[0])
        t = torch.empty(samples, device=GPU)
        positions = torch.empty(samples, dtype=torch.int64, device=GPU)
        noised = ops.flow_noised(latents, t, positions, seed, path)
        return noised, ops.flow_error(prediction, latents, t, positions, seed, path)

    big = (1 << 64) - 1
    for dtype, path in itertools.product(DTYPES, ("linear", "cosine")):
        yield f"{dtype} {path}", partial(case, dtype, 32, (4, 32, 32), path, big, (True, False))
    for samples, shape in itertools.product((1, 3, 32), ((4, 32, 32), (3, 256, 256), (1, 5), (32, 16, 16))):
        yield f"{samples} {shape}", partial(case, BF16, samples, shape, "linear", 0, (True, True))
    yield "latents alone", partial(case, BF16, 32, (4, 32, 32), "linear", 1 << 40, (False, True))


def diversity() -> Iterator[tuple[str, Callable[[], Any]]]:
    def features(blocks: int, types: Sequence[torch.dtype], size: Any, form: str) -> list[Tensor]:
        return [laid(form, *size, dtype=types[k % len(types)]) for k in range(blocks)]

    def whole(blocks: int, types: Any, size: Any, form: str, pairs: Any) -> Any:
        return ops.diversity_loss(features(blocks, types, size, form), pairs).total

    def tapped(blocks: int, types: Any, size: Any, form: str, pairs: Any) -> Any:
        taps = ops.DiversityTaps()
        same = [taps.tap(x) for x in features(blocks, types, size, form)]
        return (*same, taps.loss(pairs).total)

    some = [(0, 1), (1, 2), (0, 5)]
    kinds = ((BF16,), (F32,), (F16,), (F32, BF16), (F32, F16, BF16), (F64,))
    large = ((28, 1152, (BF16,), "all"), (28, 1152, (F32,), "all"), (28, 1152, (BF16,), some))
    for blocks, width, types, pairs in (*large, *((6, 768, types, "all") for types in kinds)):
        for call in (whole, tapped):
            name = f"{call.__name__} {blocks} x {width} {types} {pairs}"
            yield name, partial(call, blocks, types, (4, 64, width), "dense", pairs)
    for form in FORMS:
        yield f"tapped {form}", partial(tapped, 6, (BF16,), (4, 64, 768), form, "all")
    yield "tap", lambda: ops.diversity_tap(new(4, 64, 768, dtype=BF16))[1].sums
    yield "odd width", partial(tapped, 5, (F32,), (3, 17, 36), "dense", "all")


def shared() -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype, width in itertools.product(DTYPES, (768, 1024, 1152, 1150, 8)):
        yield (
            f"rows {dtype} {width}",
            lambda dtype=dtype, width=width: ops.row_statistics(new(4, 64, width, dtype=dtype)),
        )
    for form in FORMS:
        yield f"rows {form}", lambda form=form: ops.row_statistics(laid(form, 4, 64, 768, dtype=BF16))


def random_draws() -> Iterator[tuple[str, Callable[[], Any]]]:
    asked = [(True, 1, (4, 32, 32)), (False, 1 << 31, ()), (True, 3, (7,))]
    for count, seed in itertools.product((1, 3), (3, (1 << 64) - 1)):
        positions = partial(torch.arange, 4, device=GPU)
        yield f"{count} draws {seed}", lambda count=count, seed=seed, at=positions: draws(seed, at(), asked[:count])


def _traced(call: Callable[[], Any]) -> Trace:
    with trace() as found:
        both_ways(call())
    return found


CASES: dict[str, Callable[[], Trace]] = {
    f"op {family.__name__} {name}": partial(_traced, call)
    for family in (adaln, long_skip, gelu_mlp, qk_norm, repa_cosine, flow, diversity, shared, random_draws)
    for name, call in family()
}
