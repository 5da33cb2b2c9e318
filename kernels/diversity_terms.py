r"""The three terms of the diversity loss from its statistics, and their gradients: one launch each.

With S, A, Q [K, D] the sums of x, |x| and x^2 over M tokens, C [K, K] those of cosines (kernels/diversity.py), w the
weights of the pairs, f_k = max(|S_k| / M, e) M, b_k = 1 (paper: 0 for a block in no pair), n the sum of b, e = 1e-8,

    orthogonality       o = sum_kl w_kl S_k . S_l / (f_k f_l)
    mutual information  m = sum_kl w_kl |C_kl| / M            (paper: without the absolute value)
    usage               r_c = sum_k b_k A_kc / (M sqrt(max(Q_kc, e^2))) / (n + e)
    spread              s = Var(r) / (max(r) + e)^2           dispersion  d = -min(4 s, 1)   (paper: -s)
    total               (o + m + d) / 3                       (paper: 0.33 (o + m + d))

and, for gradients go, gm, gd of the terms with the total's share in them, W = w + w^T, R = max(r) + e,

    dS_k = go (sum_l W_kl S_l / (f_k f_l) - S_k / f_k^2 sum_l W_kl S_k . S_l / (f_k f_l)), without the second sum at e
    dC_kl = gm w_kl sgn(C_kl) / M
    dr_c = gs (2 (r_c - mean r) / (D R^2) - [r_c = max(r)] 2 s / (R ties)),  gs = -4 gd where 4 s <= 1  (paper: -gd)

dA and dQ follow from dr. NaN stays NaN. The forward is one program, which also leaves S S^T and r for the backward, of
which a program has BLOCK channels. Everything is summed in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.aot import AotCase
from dit_fast.kernels.launch import Kept, launcher, signature

BLOCK = 64  # channels of a step, and of a program of the backward
WARPS = 8  # with 4 the forward spills
EPS = 1e-8
_EPS = tl.constexpr(EPS)
_SQUARE = tl.constexpr(EPS**2)
_TERMS, _GRADIENTS = Kept(), Kept()


@triton.jit
def _at_least(x, least):
    """max(x, least), where NaN stays NaN."""
    return tl.where(x < least, least, x)


@triton.jit
def _diagonal(gram, AXIS: tl.constexpr, PADDED: tl.constexpr):
    i = tl.arange(0, PADDED)
    return tl.sum(tl.where(i[:, None] == i[None, :], gram, 0.0), AXIS)


@triton.jit
def _products(gram, weights, tokens, PADDED: tl.constexpr):
    """S_k . S_l / (f_k f_l), and f along rows and along columns; 1 for blocks past the last."""
    down = _at_least(tl.sqrt(_diagonal(gram, 1, PADDED)) / tokens, _EPS) * tokens
    across = _at_least(tl.sqrt(_diagonal(gram, 0, PADDED)) / tokens, _EPS) * tokens
    return gram / (down[:, None] * across[None, :]), down, across


@triton.jit
def diversity_terms(statistics, pair_sums, weights, members, count, total, orthogonality, information, dispersion,
                    gram, usage, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
                    RELEASE: tl.constexpr):  # fmt: skip
    """The four terms, 0-d; gram [PADDED, PADDED]; usage [WIDTH]. statistics [3, BLOCKS, WIDTH]; members [BLOCKS]; count
    0-d. One program."""
    k, l = tl.arange(0, PADDED), tl.arange(0, PADDED)
    here = k < BLOCKS
    both = here[:, None] & (l < BLOCKS)[None, :]
    tokens = tl.load(count)
    counts = here.to(tl.float32) if RELEASE else tl.load(members + k, mask=here, other=0.0)
    others = tl.sum(counts, 0) + _EPS
    products = tl.zeros([PADDED, PADDED], tl.float32)
    largest, mean, squares = 0.0, 0.0, 0.0
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = here[:, None] & (column < WIDTH)[None, :]
        place = statistics + k[:, None] * WIDTH + column[None, :]
        sums = tl.load(place, mask=inside, other=0.0)
        products = tl.dot(sums, tl.trans(sums), products, input_precision="ieee")
        shares = tl.load(place + BLOCKS * WIDTH, mask=inside, other=0.0) / tokens
        shares = shares / tl.sqrt(_at_least(tl.load(place + 2 * BLOCKS * WIDTH, mask=inside, other=1.0), _SQUARE))
        used = tl.sum(shares * counts[:, None], 0) / others
        tl.store(usage + column, used, mask=column < WIDTH)
        # Mean and squares of the deviations of all columns so far, joined with those of this step.
        size = tl.minimum(WIDTH - start, BLOCK).to(tl.float32)
        own = tl.sum(used, 0) / size
        apart = tl.where(column < WIDTH, used - own, 0.0)
        between = own - mean
        squares += tl.sum(apart * apart, 0) + between * between * (start * size / (start + size))
        mean += between * (size / (start + size))
        largest = tl.maximum(largest, tl.max(used, 0))
    tl.store(gram + k[:, None] * PADDED + l[None, :], products)
    weight = tl.load(weights + k[:, None] * BLOCKS + l[None, :], mask=both, other=0.0)
    cosine = tl.load(pair_sums + k[:, None] * BLOCKS + l[None, :], mask=both, other=0.0) / tokens
    alike, _, _ = _products(products, weight, tokens, PADDED)
    first = tl.sum(tl.sum(weight * alike, 1), 0)
    second = tl.sum(tl.sum(weight * (tl.abs(cosine) if RELEASE else cosine), 1), 0)
    third = squares / WIDTH / ((largest + _EPS) * (largest + _EPS))
    if RELEASE:
        third = third / 0.25
        third = tl.where(third > 1.0, 1.0, third)
    tl.store(orthogonality, first)
    tl.store(information, second)
    tl.store(dispersion, -third)
    tl.store(total, (first + second - third) / 3 if RELEASE else 0.33 * (first + second - third))


@triton.jit
def diversity_term_gradients(statistics, pair_sums, weights, members, count, gram, usage, grad_total,
                             grad_orthogonality, grad_information, grad_dispersion, grad_statistics, grad_pair_sums,
                             BLOCKS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                             PADDED_WIDTH: tl.constexpr, BLOCK: tl.constexpr, RELEASE: tl.constexpr,
                             GIVEN: tl.constexpr):  # fmt: skip
    """grad_statistics and grad_pair_sums like those. GIVEN: bits of the gradients of the four terms that there are.
    A program has BLOCK channels."""
    k, l = tl.arange(0, PADDED), tl.arange(0, PADDED)
    here = k < BLOCKS
    both = here[:, None] & (l < BLOCKS)[None, :]
    pair = k[:, None] * BLOCKS + l[None, :]
    tokens = tl.load(count)
    of_orthogonality, of_information, of_dispersion = 0.0, 0.0, 0.0
    if GIVEN & 1:
        share = tl.load(grad_total) / 3 if RELEASE else tl.load(grad_total) * 0.33
        of_orthogonality, of_information, of_dispersion = share, share, share
    if GIVEN & 2:
        of_orthogonality += tl.load(grad_orthogonality)
    if GIVEN & 4:
        of_information += tl.load(grad_information)
    if GIVEN & 8:
        of_dispersion += tl.load(grad_dispersion)
    weight = tl.load(weights + pair, mask=both, other=0.0)
    mirrored = tl.load(weights + l[None, :] * BLOCKS + k[:, None], mask=both, other=0.0)
    if tl.program_id(0).to(tl.int64) == 0:
        slope = weight * of_information / tokens
        if RELEASE:
            cosine = tl.load(pair_sums + pair, mask=both, other=0.0)
            slope = tl.where(cosine > 0, slope, tl.where(cosine < 0, -slope, cosine * 0.0))
        tl.store(grad_pair_sums + pair, slope, mask=both)
    alike, down, across = _products(tl.load(gram + k[:, None] * PADDED + l[None, :]), weight, tokens, PADDED)
    weight = (weight + mirrored) * of_orthogonality
    along = tl.sum(weight * alike, 1) / (down * down)
    along = tl.where(down > _EPS * tokens, along, along * 0.0)
    weight = weight / (down[:, None] * across[None, :])

    channel = tl.arange(0, PADDED_WIDTH)
    present = channel < WIDTH
    used = tl.load(usage + channel, mask=present, other=0.0)
    mean = tl.sum(used, 0) / WIDTH
    apart = tl.where(present, used - mean, 0.0)
    top = tl.max(used, 0)
    ties = tl.sum((present & (used == top)).to(tl.float32), 0)
    largest = top + _EPS
    spread = tl.sum(apart * apart, 0) / WIDTH / (largest * largest)
    slope = -of_dispersion
    if RELEASE:
        slope = tl.where(spread / 0.25 > 1.0, 0.0, slope / 0.25)

    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = here[:, None] & (column < WIDTH)[None, :]
    place = k[:, None] * WIDTH + column[None, :]
    sums = tl.load(statistics + place, mask=inside, other=0.0)
    grad = tl.dot(weight, sums, input_precision="ieee") - along[:, None] * sums
    tl.store(grad_statistics + place, grad, mask=inside)

    used = tl.load(usage + column, mask=column < WIDTH, other=0.0)
    of_usage = 2.0 * (used - mean) / (WIDTH * largest * largest)
    of_usage = slope * tl.where(used == top, of_usage - 2.0 * spread / (largest * ties), of_usage)
    counts = here.to(tl.float32) if RELEASE else tl.load(members + k, mask=here, other=0.0)
    of_usage = of_usage[None, :] * (counts / (tl.sum(counts, 0) + _EPS) / tokens)[:, None]
    square = tl.load(statistics + 2 * BLOCKS * WIDTH + place, mask=inside, other=1.0)
    root = tl.sqrt(_at_least(square, _SQUARE))
    tl.store(grad_statistics + BLOCKS * WIDTH + place, of_usage / root, mask=inside)
    absolute = tl.load(statistics + BLOCKS * WIDTH + place, mask=inside, other=0.0)
    of_square = -0.5 * of_usage * absolute / root / root / root
    of_square = tl.where(square < _SQUARE, 0.0, of_square)
    tl.store(grad_statistics + 2 * BLOCKS * WIDTH + place, of_square, mask=inside)


def _padded(blocks: int) -> int:
    return 16 if blocks <= 16 else 32


def _constants(statistics: Tensor, release: bool) -> dict[str, Any]:
    _, blocks, width = statistics.shape
    constants = {"BLOCKS": blocks, "WIDTH": width, "PADDED": _padded(blocks), "BLOCK": BLOCK, "RELEASE": release}
    return constants | {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": True}


def forward(
    statistics: Tensor, pair_sums: Tensor, weights: Tensor, members: Tensor, count: Tensor, release: bool
) -> tuple[Tensor, ...]:
    """total, orthogonality, mutual information, dispersion, all 0-d; and what the backward wants, gram and usage.

    statistics [3, K, D], pair_sums and weights [K, K], members [K], count [1]: float32, contiguous; K <= 32.
    """
    padded, new = _padded(statistics.shape[1]), statistics.new_empty
    made = (*(new(()) for _ in range(4)), new(padded, padded), new(statistics.shape[2]))
    key = (signature(statistics), release)
    launch = _TERMS.get(key)
    if launch is None:
        launch = _TERMS.keep(key, launcher(diversity_terms, (1,), (), _constants(statistics, release)))
    launch(statistics, pair_sums, weights, members, count, *made)
    return made


def backward(
    statistics: Tensor, pair_sums: Tensor, weights: Tensor, members: Tensor, count: Tensor, gram: Tensor, usage: Tensor,
    grads: tuple[Tensor | None, ...], release: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of statistics and pair_sums. grads: of the four terms, float32, 0-d, None for zero."""
    given = sum(1 << place for place, grad in enumerate(grads) if grad is not None)
    key = (signature(statistics), release, given)
    launch = _GRADIENTS.get(key)
    if launch is None:
        width = statistics.shape[2]
        constants = _constants(statistics, release) | {"PADDED_WIDTH": triton.next_power_of_2(width), "GIVEN": given}
        grid = (triton.cdiv(width, BLOCK),)
        launch = _GRADIENTS.keep(key, launcher(diversity_term_gradients, grid, (), constants))
    grad_statistics, grad_pair_sums = torch.empty_like(statistics), torch.empty_like(pair_sums)
    places = [count if grad is None else grad for grad in grads]
    launch(
        statistics, pair_sums, weights, members, count, gram, usage, *places, grad_statistics, grad_pair_sums
    )  # fmt: skip
    return grad_statistics, grad_pair_sums


def aot_cases(arch: int) -> list[AotCase]:
    """Depths and widths of SiT-B, L and XL, both variants; the total's gradient, and that of all terms."""
    cases = []
    for blocks, width, release in ((12, 768, True), (24, 1024, True), (28, 1152, True), (28, 1152, False)):
        constants: dict[str, Any] = {"BLOCKS": blocks, "WIDTH": width, "PADDED": _padded(blocks), "BLOCK": BLOCK}
        constants["RELEASE"] = release
        padded = {"PADDED_WIDTH": triton.next_power_of_2(width)}
        name = f"K={blocks} D={width}{'' if release else ' paper'}"
        cases.append(_case(diversity_terms, name, constants))
        for given in (1, 15):
            more = constants | padded | {"GIVEN": given}
            cases.append(_case(diversity_term_gradients, f"{name} given={given}", more))
    return cases


def _case(kernel: Any, name: str, constants: dict[str, Any]) -> AotCase:
    signature = {argument: "*fp32" for argument in kernel.arg_names if argument not in constants}
    return AotCase(kernel, name, signature, constants, {"num_warps": WARPS, "num_stages": 1}, wide_loads=False)
