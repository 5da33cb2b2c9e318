"""Diversity loss of DiverseDiT (arXiv 2603.04239, Sec. 3.2) as a function of statistics.

The three terms need no features, only sums per block and channel and one K x K matrix of summed token cosines. A
choice of pairs is a weight matrix on top, so all pairs cost as much as ten. backend="torch" is the reference: plain
torch, float32 inside (float64 stays float64). No backend synchronises with the host or branches on a tensor.

A NaN or infinity in any feature makes the total NaN; the caller decides what a step with such a loss does.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dit_fast.errors import UserError
from dit_fast.ops import diversity_op
from dit_fast.ops._op import wide
from dit_fast.ops.autocast import without_autocast
from dit_fast.ops.diversity_op import EPS, OP
from dit_fast.ops.row_statistics import RowStatistics, known
from dit_fast.world import ranks, sum_over_ranks

PAPER_COEFFICIENT = 0.33


@dataclass(frozen=True)
class DiversityStats:
    """Sums over the M = N * T tokens of K blocks of width D; float32, or float64 for float64 features.

    sums, abs_sums, square_sums [K, D]: of x, |x| and x^2 per channel. pair_sums [K, K]: cosines of the same token in
    two blocks. count, 0-d: M.
    """

    sums: Tensor
    abs_sums: Tensor
    square_sums: Tensor
    pair_sums: Tensor
    count: Tensor


@dataclass(frozen=True)
class DiversityLoss:
    """0-d tensors, each differentiable, and the pairs (i, j) that entered the first two terms."""

    total: Tensor
    orthogonality: Tensor
    mutual_information: Tensor
    dispersion: Tensor
    pairs: tuple[tuple[int, int], ...]


# Block features, and what is known of their rows: in block order, or by block index.
Features = Sequence[Tensor] | Tensor | Mapping[int, Tensor]
Statistics = Sequence[RowStatistics | None] | Mapping[int, RowStatistics | None]


def diversity_stats(
    features: Features,
    backend: str = "auto",
    stats: Statistics | None = None,
) -> DiversityStats:
    """Statistics of K block features [N, T, D] of one shape: a sequence, stacked [K, N, T, D], or by block index.

    Dtypes may differ from block to block. Token norms below 1e-8 count as 1e-8. Every backend differentiates in forward
    mode and, once, in reverse mode, of the statistics or of their forward-mode derivative; "torch", the reference, any
    number of times. Raises UserError for other shapes and for a backend
    that is unknown or cannot take these tensors.

    stats: what the caller promises to be `row_statistics` of each block, [N, T] each, without gradient. With those of
    all blocks "triton" reads the features once instead of twice (norm^2 = D (variance + mean^2)); values then agree to
    float32 rounding and gradients follow the same rule. Other backends and torch.compile do not use them. Raises
    UserError naming the block for statistics of another shape, dtype or device.
    """
    ordered = in_block_order("features", features)
    check_features(ordered)
    OP.check(backend)
    given = known_rows(ordered, _stats_in_order(stats, features))
    blocks = [feature.flatten(0, 1) for feature in ordered]
    chosen = OP.choose(backend, blocks[0].device, *blocks)
    if chosen == "torch":
        return _reference(blocks)
    return stats_from_sums(*diversity_op.statistics(chosen, blocks, given), len(blocks[0]))


def known_rows(
    features: Sequence[Tensor] | Tensor, stats: Sequence[RowStatistics | None] | None
) -> diversity_op.Known | None:
    """(means, variances) of all blocks' rows, [M] each, or None unless all blocks have them. Checks them."""
    if stats is None:
        return None
    if len(stats) != len(features):
        raise UserError(f"stats has {len(stats)} entries for {len(features)} blocks; give one, or None, per block")
    pairs = [
        known("diversity", f"stats[{block}]", given, feature)
        for block, (feature, given) in enumerate(zip(features, stats, strict=True))
    ]
    if any(pair is None for pair in pairs):
        return None
    flat = [(pair[0].reshape(-1), pair[1].reshape(-1)) for pair in pairs if pair]
    return [mean for mean, _ in flat], [variance for _, variance in flat]


def stats_from_sums(statistics: Tensor, pair_sums: Tensor, count: int) -> DiversityStats:
    """Names for statistics [3, K, D] and pair_sums [K, K] over `count` tokens."""
    sums, abs_sums, square_sums = statistics.unbind(0)
    return DiversityStats(sums, abs_sums, square_sums, pair_sums, pair_sums.new_full((), count))


def _reference(blocks: Sequence[Tensor]) -> DiversityStats:
    x = torch.stack(tuple(blocks))
    with without_autocast(x):
        x = x.to(wide(x))
        directions = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(EPS)).flatten(1)
        sums = torch.stack([x.sum(1), x.abs().sum(1), x.square().sum(1)])
        return stats_from_sums(sums, directions @ directions.T, x.shape[1])


def diversity_loss(
    features: Features,
    pairs: Literal["all"] | Sequence[tuple[int, int]] = "all",
    variant: Literal["release", "paper"] = "release",
    scope: Literal["rank", "global"] = "rank",
    backend: str = "auto",
    stats: Statistics | None = None,
) -> DiversityLoss:
    """Mean cosine of block means, mean token cosine, and minus the spread of channel usage.

    features: K tensors [N, T, D], as a sequence, stacked, or as a mapping {block index: feature} such as DiverseDiT's
    "block_feas", taken in the order of its keys. pairs: "all", or places (i, j) in that sequence, from 0.
    variant "release" (published code): |mean token cosine| per pair, spread over all blocks clamp(4 Var, 0, 1), total =
    sum / 3.
    variant "paper" (Eq. 10-15): signed mean cosine, spread over the blocks that occur in the pairs, Var without factor
    or clamp (the absolute value inside the usage is kept: without it the division by the maximum is ill-posed), total =
    0.33 * sum.
    scope "global": statistics of all ranks of the default process group. Gradients are then those of the whole batch
    once the ranks' gradients are averaged. Without an initialised process group it equals "rank".
    stats: the blocks' row statistics where they are known, as for `diversity_stats`.

    Fewer than two blocks give zeros. Raises UserError for wrong shapes, for an unknown variant, scope or backend, and
    for pairs that are empty, out of range, or join a block with itself.
    """
    ordered = in_block_order("features", features)
    chosen = check_options(pairs, len(ordered), variant, scope)
    if not len(ordered):
        return _no_loss(torch.zeros((), dtype=torch.float32))
    in_order = _stats_in_order(stats, features)
    return loss_from_stats(diversity_stats(ordered, backend, in_order), chosen, variant, scope)


def loss_from_stats(
    stats: DiversityStats, pairs: tuple[tuple[int, int], ...], variant: str, scope: str
) -> DiversityLoss:
    """The loss as a function of the statistics; other arguments as for `diversity_loss`, already checked."""
    if len(stats.sums) < 2:
        return _no_loss(stats.sums.new_zeros(()))
    return _combine(_reduce_over_ranks(stats) if scope == "global" else stats, pairs, variant)


def _reduce_over_ranks(stats: DiversityStats) -> DiversityStats:
    if ranks() == 1:
        return stats
    parts = [stats.sums, stats.abs_sums, stats.square_sums, stats.pair_sums, stats.count]
    flat = sum_over_ranks(torch.cat([part.reshape(-1) for part in parts]))
    pieces = flat.split([part.numel() for part in parts])
    return DiversityStats(*(piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)))


def _combine(stats: DiversityStats, pairs: tuple[tuple[int, int], ...], variant: str) -> DiversityLoss:
    weights, members = _pair_weights(pairs, stats.sums)
    means = stats.sums / stats.count
    directions = means / torch.linalg.vector_norm(means, dim=-1, keepdim=True).clamp_min(EPS)
    with without_autocast(means):
        orthogonality = (weights * (directions @ directions.T)).sum()
    cosines = stats.pair_sums / stats.count
    # sqrt(max(x, eps^2)) is max(sqrt(x), eps) with a finite gradient at a channel that is zero everywhere.
    usage = stats.abs_sums / stats.count / stats.square_sums.clamp_min(EPS**2).sqrt()
    if variant == "release":
        mutual_information = (weights * cosines.abs()).sum()
        spread = _spread(usage.sum(0) / (len(usage) + EPS))
        dispersion = -(spread / 0.25).clamp(0, 1)
        total = (orthogonality + mutual_information + dispersion) / 3
    else:
        mutual_information = (weights * cosines).sum()
        dispersion = -_spread((members[:, None] * usage).sum(0) / (members.sum() + EPS))
        total = PAPER_COEFFICIENT * (orthogonality + mutual_information + dispersion)
    return DiversityLoss(total, orthogonality, mutual_information, dispersion, pairs)


def _spread(usage: Tensor) -> Tensor:
    return (usage / (usage.amax() + EPS)).var(correction=0)


def _no_loss(zero: Tensor) -> DiversityLoss:
    return DiversityLoss(zero, zero, zero, zero, ())


def _pair_weights(pairs: tuple[tuple[int, int], ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """[K, K] weights 1/|P| per listed pair, and [K] ones for blocks that occur; sent without waiting for the device."""
    count = len(like)
    table = [[0.0] * count for _ in range(count + 1)]
    for i, j in pairs:
        table[i][j] += 1 / len(pairs)
        table[count][i] = table[count][j] = 1.0
    both = torch.tensor(table, dtype=like.dtype).to(like.device, non_blocking=True)
    return both[:-1], both[-1]


def check_options(
    pairs: Literal["all"] | Sequence[tuple[int, int]], count: int, variant: str, scope: str
) -> tuple[tuple[int, int], ...]:
    """The pairs of `count` blocks as a tuple. Raises UserError for what `diversity_loss` does not take."""
    if variant not in ("release", "paper"):
        raise UserError(f"unknown diversity variant '{variant}'; valid: release, paper")
    if scope not in ("rank", "global"):
        raise UserError(f"unknown diversity scope '{scope}'; valid: rank, global")
    if isinstance(pairs, str):
        if pairs != "all":
            raise UserError(f"pairs='{pairs}' is not a list of (i, j); valid name here: all (others: select_pairs)")
        return tuple((i, j) for i in range(count) for j in range(i + 1, count))
    try:
        chosen = tuple((operator.index(i), operator.index(j)) for i, j in pairs)
    except (TypeError, ValueError, RuntimeError):  # what an entry that cannot be unpacked or is no integer raises
        raise UserError('pairs must be "all" or a list of places (i, j), whole numbers from 0') from None
    if not chosen:
        raise UserError('pairs is empty; give at least one (i, j) or "all"')
    for i, j in chosen:
        if i == j or not (0 <= i < count and 0 <= j < count):
            raise UserError(f"pair ({i}, {j}) is not two different blocks of 0..{count - 1}")
    return chosen


def in_block_order(name: str, given: Any) -> Any:
    """The values of a mapping in the order of its keys, which are block indices; a sequence or tensor as it is."""
    if isinstance(given, Mapping):
        for key in given:
            if not isinstance(key, int) or isinstance(key, bool):
                inner = next((key for key, value in given.items() if isinstance(value, Mapping)), None)
                hint = "" if inner is None else f"; the block features are under {inner!r}"
                raise UserError(f"diversity: the keys of {name} must be block indices, not {key!r}{hint}")
        if not given:
            raise UserError(f"diversity: {name} is an empty mapping; give {{block index: value}}")
        return [given[key] for key in sorted(given)]
    if (
        not isinstance(given, (Tensor, Sequence))
        or isinstance(given, str)
        or (isinstance(given, Tensor) and not given.dim())
    ):
        raise UserError(f"diversity: {name} must be a sequence, a tensor or a mapping, not {type(given).__name__}")
    return given


def _stats_in_order(stats: Statistics | None, features: Features) -> Sequence[RowStatistics | None] | None:
    """A mapping of statistics must be of the blocks that the features are of."""
    if isinstance(stats, Mapping):
        blocks = list(features) if isinstance(features, Mapping) else list(range(len(features)))
        if set(stats) != set(blocks):
            raise UserError(f"diversity: stats are of blocks {list(stats)}, features of {blocks}; give the same ones")
    return None if stats is None else in_block_order("stats", stats)


def check_features(features: Sequence[Tensor] | Tensor) -> None:
    """Raises UserError unless features are one or more non-empty [N, T, D], floating point, of one shape and device."""
    if not len(features):
        raise UserError("features is empty; give K block features [N, T, D]")
    OP.check("auto", **{f"features[{block}]": feature for block, feature in enumerate(features)})
