r"""Diversity statistics of K block features x_k [M, D] and their gradient, from one address table and no copies.

Forward, for tokens i, channels d, with y = x / max(|x|, 1e-8) per token:

    S_kd = sum_i x,   A_kd = sum_i |x|,   Q_kd = sum_i x^2,   C_kl = sum_i y_ki . y_li,   r_ki = 1 / max(|x_ki|, 1e-8).

`block_sums` reads each row once: norms and the three channel sums. `token_cosines` takes the Gram matrix of one token's
K raw rows on tensor cores (products of 16-bit values are exact in float32) and scales entry (k, l) by r_k r_l. Scaling
after the product spares the rounding of y to 16 bits. Blocks whose types differ, and float32 blocks, use three TF32
products per product, which keeps float32 accuracy. A warp has a token of its own, so warps share nothing. C is their
sum over tokens. With norms that are known one read of strips of channels would do, for which an H200 takes longer than
for these two.

Backward. With G = dL/dC let H = G + G^T and v_k = sum_l H_kl y_l. Since dy/dx = r (I - y y^T), and r is constant where
the norm is below the floor,

    dx_k = dL/dS + dL/dA sgn(x) + 2 dL/dQ x + r_k (v_k - p_k y_k),
    p_k = v_k . y_k = sum_l H_kl (y_k . y_l), or 0 below the floor.

p needs whole rows and no elementwise gradient: `projections` takes it from the cosines of the forward, K K for a token
beside K D of features. What is left needs no whole
row, so a program of `gradients` owns a strip of channels, and H stays in its registers over all its tokens. It reads
only the blocks that matter: the wanted ones and those that H joins with them.

Bits. The order of every sum is part of the definition: CHUNK tokens per partial channel sum, STEP tokens added at once,
the width and warp count of a row reduction, STRIP channels per product in steps of the tensor core's inner size, then
ordered_sum, which adds the cosines of all tokens too. Configurations hold only what cannot change a bit.

Source: DiverseDiT (arXiv 2603.04239), Eq. 9-15; gradient derived here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dit_fast.kernels import unavailable as unavailable
from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.diversity_gradients import gradients, projections
from dit_fast.kernels.diversity_sums import block_sums, token_cosines
from dit_fast.kernels.launch import Kept, launcher, signature
from dit_fast.kernels.ordered_sum import ordered_sum
from dit_fast.kernels.rows import MAX_CHUNKS, TYPES, types_of
from dit_fast.kernels.tables import address_table, is_aligned

MAX_BLOCKS = 32
MAX_WIDTH = 4096
CHUNK = 256  # tokens per partial channel sum
STEP = {"fp32": 2, "bf16": 4, "fp16": 4, "mixed": 4}  # tokens whose rows are in flight together
STRIP = {"bf16": 128, "fp16": 128, "fp32": 32, "mixed": 32}  # channels per product in a Gram matrix
GRADIENT_TOKENS = 64
PROJECTION_TOKENS = 8
_LAUNCHES = Kept()


class Config(NamedTuple):
    """Launch options, none of which changes a bit of the result."""

    cosine_warps: int  # as many as tokens
    cosine_stages: int
    gradient_warps: int
    gradient_stages: int
    gradient_strip: int


# (rows of the Gram matrix, type of the features); one table until a measurement separates the architectures.
_CONFIGS = {
    (16, "bf16"): Config(2, 3, 4, 4, 64),
    (16, "fp16"): Config(2, 3, 4, 4, 64),
    (16, "fp32"): Config(2, 4, 4, 4, 64),
    (16, "mixed"): Config(2, 4, 4, 4, 64),
    (32, "bf16"): Config(2, 3, 4, 4, 64),
    (32, "fp16"): Config(2, 3, 4, 4, 64),
    (32, "fp32"): Config(2, 4, 4, 4, 64),
    (32, "mixed"): Config(2, 3, 4, 4, 32),
}
CONFIGS = {80: _CONFIGS, 90: _CONFIGS}


def supports(features: Sequence[Tensor]) -> list[str]:
    """Why these features [M, D] cannot go through the kernels; empty if they can."""
    reasons = []
    if len(features) > MAX_BLOCKS:
        reasons.append(f"{len(features)} blocks are more than {MAX_BLOCKS}")
    if features[0].shape[-1] > MAX_WIDTH:
        reasons.append(f"width {features[0].shape[-1]} is more than {MAX_WIDTH}")
    tokens = features[0].shape[:-1].numel()
    if tokens > GRADIENT_TOKENS * MAX_CHUNKS:
        reasons.append(f"{tokens} tokens are more than {GRADIENT_TOKENS * MAX_CHUNKS}")
    for dtype in sorted({str(feature.dtype) for feature in features if feature.dtype not in TYPES}):
        reasons.append(f"{dtype} is not float32, bfloat16 or float16")
    if any(feature.stride(-1) != 1 and feature.shape[-1] > 1 for feature in features):
        reasons.append("the last dimension is not contiguous")
    return reasons


class _Plan(NamedTuple):
    """Arguments shared by the launches of one call."""

    config: Config
    kind: str
    constants: dict[str, object]
    masks: tuple[int, int]


def _plan(features: Sequence[Tensor], touched: list[Tensor]) -> _Plan:
    kind, masks = types_of(tuple(feature.dtype for feature in features))
    arch = 80
    if features[0].is_cuda and torch.cuda.get_device_capability(features[0].device) >= (9, 0):
        arch = 90
    blocks, width = len(features), features[0].shape[1]
    constants = {"BLOCKS": blocks, "WIDTH": width, "TYPE": kind, "ALIGNED": is_aligned(touched)}
    return _Plan(CONFIGS[arch][_padded_rows(blocks), kind], kind, constants, masks)


def _padded_rows(blocks: int) -> int:
    return 16 if blocks <= 16 else 32


def _block_options(width: int, kind: str) -> dict[str, int]:
    """Functions of width and type alone: padding and warps order the sum over a row, steps that over tokens."""
    padded = max(128, triton.next_power_of_2(width))
    return {"PADDED": padded, "CHUNK": CHUNK, "STEP": STEP[kind], "num_warps": max(1, padded // 256), "num_stages": 1}


def _cosine_options(blocks: int, kind: str, config: Config) -> dict[str, int]:
    return {
        "ROWS": _padded_rows(blocks),
        "STRIP": STRIP[kind],
        "TOKENS": config.cosine_warps,
        "UPCAST": triton.knobs.runtime.interpret,
        "num_warps": config.cosine_warps,
        "num_stages": config.cosine_stages,
    }


def _projection_options(blocks: int) -> dict[str, int]:
    return {"ROWS": _padded_rows(blocks), "TOKENS": PROJECTION_TOKENS, "num_warps": 4, "num_stages": 1}


def _gradient_options(blocks: int, config: Config) -> dict[str, int]:
    return {
        "ROWS": _padded_rows(blocks),
        "UPCAST": triton.knobs.runtime.interpret,
        "STRIP": config.gradient_strip,
        "TOKENS": GRADIENT_TOKENS,
        "num_warps": config.gradient_warps,
        "num_stages": config.gradient_stages,
    }


def forward(features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """statistics [3, K, D] (sums of x, |x|, x^2), pair_sums [K, K], inverse_norms [K, M], cosines [M, K, K], float32.

    features: K <= 32 tensors [M, D] with contiguous rows, any row stride; float32, bfloat16 or float16, which may
    differ between blocks. Two reads of every feature.
    """
    features = list(features)
    plan, device = _plan(features, features), features[0].device
    blocks, (tokens, width) = len(features), features[0].shape
    tables = address_table(features)

    inverse_norms = torch.empty(blocks, tokens, dtype=torch.float32, device=device)
    chunks = triton.cdiv(tokens, CHUNK)
    partials = torch.empty(chunks, 3 * blocks * width, dtype=torch.float32, device=device)
    constants = plan.constants | _block_options(width, plan.kind)
    given = (*tables, partials, inverse_norms)
    _launch(block_sums, (blocks, chunks), given, (tokens, *plan.masks), constants)
    statistics = ordered_sum(partials).view(3, blocks, width)

    cosines = torch.empty(tokens, blocks, blocks, dtype=torch.float32, device=device)
    options = _cosine_options(blocks, plan.kind, plan.config)
    given, grid = (*tables, inverse_norms, cosines), (triton.cdiv(tokens, options["TOKENS"]),)
    _launch(token_cosines, grid, given, (tokens, *plan.masks), plan.constants | options)
    return statistics, ordered_sum(cosines.flatten(1)).view(blocks, blocks), inverse_norms, cosines


def _launch(
    kernel: Any, grid: tuple[int, ...], given: Sequence[Tensor], numbers: tuple[int, ...], constants: dict[str, Any]
) -> None:
    key = (kernel.__name__, grid, numbers, *constants.values(), signature(*given))
    launch = _LAUNCHES.get(key)
    if launch is None:
        launch = _LAUNCHES.keep(key, launcher(kernel, grid, numbers, constants | {"enable_fp_fusion": True}))
    launch(*given)


def backward(
    features: Sequence[Tensor],
    inverse_norms: Tensor,
    cosines: Tensor,
    grad_statistics: Tensor,
    grad_pair_sums: Tensor,
    wanted: Sequence[int],
) -> list[Tensor]:
    """One gradient [M, D] per wanted block, contiguous, in the block's type.

    inverse_norms [K, M] and cosines [M, K, K] from `forward`; grad_statistics [3, K, D]; grad_pair_sums [K, K], any
    matrix.
    """
    features = list(features)
    blocks, (tokens, width) = len(features), features[0].shape
    grads = [torch.empty(features[k].shape, dtype=features[k].dtype, device=features[k].device) for k in wanted]
    grad_statistics, grad_pair_sums = grad_statistics.float().contiguous(), grad_pair_sums.float().contiguous()

    # Blocks that are not wanted need an entry in the tables, which is never followed.
    results = features.copy()
    for place, k in enumerate(wanted):
        results[k] = grads[place]
    touched = features + results
    plan, tables = _plan(features, touched), address_table(touched)
    mask = sum(1 << k for k in wanted)
    scales = torch.empty(tokens, 2, blocks, dtype=torch.float32, device=inverse_norms.device)
    given: Sequence[Tensor] = (cosines, inverse_norms, grad_pair_sums, scales)
    constants: dict[str, Any] = {"BLOCKS": blocks, **_projection_options(blocks)}
    _launch(projections, (triton.cdiv(tokens, PROJECTION_TOKENS),), given, (tokens, mask), constants)
    constants = plan.constants | _gradient_options(blocks, plan.config)
    grid = (triton.cdiv(width, plan.config.gradient_strip), triton.cdiv(tokens, GRADIENT_TOKENS))
    given = (*tables, scales, grad_statistics, grad_pair_sums)
    _launch(gradients, grid, given, (tokens, mask, *plan.masks), constants)
    return grads


def aot_cases(arch: int) -> list[AotCase]:
    """Widths and depths of SiT-B, L and XL, and one block alone; types in rotation to keep the compile time down."""
    shapes = [(12, 768, "bf16"), (24, 1024, "fp16"), (28, 1152, "bf16"), (28, 1152, "fp32"), (28, 1152, "mixed")]
    return [case for shape in shapes for case in _cases(arch, *shape)]


def _cases(arch: int, blocks: int, width: int, kind: str) -> list[AotCase]:
    config = CONFIGS[arch][_padded_rows(blocks), kind]
    shared = {"BLOCKS": blocks, "WIDTH": width, "TYPE": kind, "ALIGNED": True}
    plans: list[tuple[Any, str, dict[str, Any], dict[str, Any]]] = [
        (block_sums, "", _block_options(width, kind), {"wide_stores": True}),
        (token_cosines, "", _cosine_options(blocks, kind, config), {"dots": True}),
        (projections, "", _projection_options(blocks), {"wide_loads": False}),
        (gradients, "", _gradient_options(blocks, config), {"dots": True, "wide_stores": True}),
    ]
    # The other shapes would compile the same lines again.
    if (width, kind) not in ((768, "bf16"), (1152, "mixed")):
        plans = [plan for plan in plans if plan[0] is not projections]
    if kind == "fp16":
        plans = [plan for plan in plans if plan[0] in (block_sums, gradients)]
    types = {"addresses": "*i64", "strides": "*i64"}
    types |= dict.fromkeys(("tokens", "wanted", "wide_blocks", "half_blocks"), "i32")  # bits of at most 31 blocks
    cases = []
    for kernel, suffix, options, expected in plans:
        launch = {name: value for name, value in options.items() if name.islower()}
        constants = {name: value for name, value in (shared | options).items() if name in kernel.arg_names}
        signature = {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
        name = f"K={blocks} D={width} {kind}{suffix}"
        cases.append(AotCase(kernel, name, signature, constants, launch, unaligned=tuple(types)[3:], **expected))
    return cases
