"""Diversity loss of DiverseDiT (arXiv 2603.04239, Sec. 3.2) as a function of statistics.

The three terms need no features, only sums per block and channel and one K x K matrix of summed token cosines. A
choice of pairs is a weight matrix on top, so all pairs cost as much as ten. backend="torch" is the reference: plain
torch, float32 inside (float64 stays float64). No backend synchronises with the host or branches on a tensor.

A NaN or infinity in any feature makes the total NaN; the caller decides what a step with such a loss does.
"""

import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dit_fast.errors import UserError
from dit_fast.ops import diversity_op, diversity_terms
from dit_fast.ops._op import wide
from dit_fast.ops.autocast import without_autocast
from dit_fast.ops.diversity_op import EPS, OP
from dit_fast.world import ranks, sum_over_ranks


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


Features = Sequence[Tensor] | Tensor | Mapping[int, Tensor]  # in block order, or by block index


def diversity_stats(features: Features, backend: str = "auto") -> DiversityStats:
    """Statistics of K block features [N, T, D] of one shape: a sequence, stacked [K, N, T, D], or by block index.

    Dtypes may differ from block to block. Token norms below 1e-8 count as 1e-8. Every backend differentiates in forward
    mode and, once, in reverse mode, of the statistics or of their forward-mode derivative; "torch", the reference, any
    number of times. Raises UserError for other shapes and for a backend
    that is unknown or cannot take these tensors.
    """
    return sums_of(in_block_order("features", features), backend).named()


class Sums(NamedTuple):
    """Statistics [3, K, D] and pair_sums [K, K] over so many tokens, and the implementation that summed."""

    backend: str
    statistics: Tensor
    pair_sums: Tensor
    tokens: int

    def named(self) -> DiversityStats:
        sums, abs_sums, square_sums = self.statistics.unbind(0)
        count = self.pair_sums.new_full((), self.tokens)
        return DiversityStats(sums, abs_sums, square_sums, self.pair_sums, count)


def sums_of(ordered: Any, backend: str) -> Sums:
    """As `diversity_stats`, of features in block order."""
    check_features(ordered)
    OP.check(backend)
    blocks = [feature.flatten(0, 1) for feature in ordered]
    chosen = OP.choose(backend, blocks[0].device, *blocks)
    summed = _reference(blocks) if chosen == "torch" else diversity_op.statistics(chosen, blocks)
    return Sums(chosen, *summed, len(blocks[0]))


def _reference(blocks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    with without_autocast(blocks[0]):
        x = torch.stack(tuple(blocks))
        x = x.to(wide(x))
        directions = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(EPS)).flatten(1)
        sums = torch.stack([x.sum(1), x.abs().sum(1), x.square().sum(1)])
        return sums, directions @ directions.T


def diversity_loss(
    features: Features,
    pairs: Literal["all"] | Sequence[tuple[int, int]] = "all",
    variant: Literal["release", "paper"] = "release",
    scope: Literal["rank", "global"] = "rank",
    backend: str = "auto",
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

    Fewer than two blocks give zeros. Raises UserError for wrong shapes, for an unknown variant, scope or backend, and
    for pairs that are empty, out of range, or join a block with itself.
    """
    ordered = in_block_order("features", features)
    chosen = check_options(pairs, len(ordered), variant, scope)
    if not len(ordered):
        return _no_loss(torch.zeros((), dtype=torch.float32))
    return loss_from_sums(sums_of(ordered, backend), chosen, variant, scope)


def loss_from_sums(sums: Sums, pairs: tuple[tuple[int, int], ...], variant: str, scope: str) -> DiversityLoss:
    """The loss as a function of the statistics; other arguments as for `diversity_loss`, already checked."""
    statistics, pair_sums = sums.statistics, sums.pair_sums
    if statistics.shape[1] < 2:
        return _no_loss(statistics.new_zeros(()))
    weights, members, count = _constants(pairs, sums.tokens, statistics)
    if scope == "global" and ranks() > 1:
        parts = [statistics, pair_sums, count]
        flat = sum_over_ranks(torch.cat([part.reshape(-1) for part in parts]))
        pieces = flat.split([part.numel() for part in parts])
        statistics, pair_sums, count = (piece.view_as(part) for piece, part in zip(pieces, parts, strict=True))
    known = (statistics, pair_sums, weights, members, count, variant == "release")
    terms = diversity_terms.fused if diversity_terms.takes(sums.backend, statistics) else diversity_terms.formula
    total, orthogonality, mutual_information, dispersion = terms(*known)
    return DiversityLoss(total, orthogonality, mutual_information, dispersion, pairs)


def _no_loss(zero: Tensor) -> DiversityLoss:
    return DiversityLoss(zero, zero, zero, zero, ())


_sent: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]] = OrderedDict()  # the last tables
_captured: list[tuple[Tensor, Tensor, Tensor]] = []  # those that a CUDA graph reads, which may live as long as we do
SENT = 16


def _constants(pairs: tuple[tuple[int, int], ...], count: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[K, K] weights 1/|P| per listed pair, [K] ones for blocks that occur in one, and 0-d `count`; do not write into
    them. Kept, for the same pairs come back at every step; sent without waiting for the device."""
    blocks = like.shape[1]
    if torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return _table(pairs, count, blocks, like)
    key = (pairs, count, blocks, like.dtype, like.device, torch.is_inference_mode_enabled())
    found = _sent.get(key)
    if found is None:
        found = _sent[key] = _table(pairs, count, blocks, like)
        if len(_sent) > SENT:
            _sent.popitem(last=False)
    else:
        _sent.move_to_end(key)
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.append(found)
    return found


def _table(pairs: tuple[tuple[int, int], ...], count: int, blocks: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    table = [0.0] * (blocks * blocks + blocks + 1)
    for i, j in pairs:
        table[i * blocks + j] += 1 / len(pairs)
        table[blocks * blocks + i] = table[blocks * blocks + j] = 1.0
    table[-1] = count
    sent = torch.tensor(table, dtype=like.dtype).to(like.device, non_blocking=True)
    weights, members, tokens = sent.split([blocks * blocks, blocks, 1])
    return weights.view(blocks, blocks), members, tokens[0]


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


def check_features(features: Sequence[Tensor] | Tensor) -> None:
    """Raises UserError unless features are one or more non-empty [N, T, D], floating point, of one shape and device."""
    if not len(features):
        raise UserError("features is empty; give K block features [N, T, D]")
    OP.check("auto", **{f"features[{block}]": feature for block, feature in enumerate(features)})
