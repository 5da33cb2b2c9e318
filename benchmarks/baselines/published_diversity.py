"""The diversity loss as the published trainer computes it, in our words.

After DiverseDiT (arXiv 2603.04239) and the description of its code: a double loop over pairs that ends after ten, each
pair normalising its two blocks again, separate means per term, and a Python branch on the device for every test for NaN
and infinity. Features arrive in float32, because Accelerate converts a model's outputs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8
MAX_PAIRS = 10
LARGEST_LOSS = 5.0


class PublishedLoss(NamedTuple):
    """0-d tensors."""

    total: Tensor
    orthogonality: Tensor
    mutual_information: Tensor
    dispersion: Tensor


def published_diversity_loss(
    features: Sequence[Tensor], start: int = 0, max_pairs: int = MAX_PAIRS, checks: bool = True
) -> PublishedLoss:
    """features: K tensors [N, T, D]. Pairs (i, j), i >= start, j > i, the first `max_pairs` of them whose blocks are
    finite. checks=False leaves out every test for NaN and infinity and the upper bound: the same values on finite
    features, without waiting for the device."""
    features = [feature.float() for feature in features]
    orthogonality = _orthogonality(features, start, max_pairs, checks)
    mutual_information = _mutual_information(features, start, max_pairs, checks)
    dispersion = _dispersion(features, checks)
    total = (orthogonality + mutual_information + dispersion) / 3
    if checks:
        if torch.isnan(total) or torch.isinf(total):
            total = torch.zeros_like(total)
        if total > LARGEST_LOSS:
            total = total.clamp(max=LARGEST_LOSS)
    return PublishedLoss(total, orthogonality, mutual_information, dispersion)


def vectorised_diversity_loss(features: Sequence[Tensor], start: int = 0, max_pairs: int = MAX_PAIRS) -> Tensor:
    """`published_diversity_loss(..., checks=False).total` as a careful reader would write it: every block normalised
    once, all pairs by one product, nothing read on the host."""
    stacked = torch.stack([feature.float() for feature in features])
    pairs = [(i, j) for i in range(start, len(features)) for j in range(i + 1, len(features))][:max_pairs]
    first, second = ([pair[side] for pair in pairs] for side in range(2))
    means = F.normalize(stacked.mean(dim=(1, 2)), dim=1, eps=EPS)
    orthogonality = (means[first] * means[second]).sum() / len(pairs)
    tokens = F.normalize(stacked, dim=-1, eps=EPS)
    cosines = (tokens[first] * tokens[second]).sum(-1).mean(dim=(1, 2))
    usage = F.normalize(stacked.flatten(1, 2), dim=1, eps=EPS).abs().mean(dim=(0, 1))
    usage = usage / (usage.max() + EPS)
    dispersion = -((usage - usage.mean()).square().mean() / 0.25).clamp(0, 1)
    return (orthogonality + cosines.abs().mean() + dispersion) / 3


def _orthogonality(features: Sequence[Tensor], start: int, max_pairs: int, checks: bool) -> Tensor:
    total, count = features[0].new_zeros(()), 0
    for i in range(start, len(features)):
        for j in range(i + 1, len(features)):
            if count >= max_pairs:
                break
            first, second = features[i], features[j]
            if checks and (_not_finite(first) or _not_finite(second)):
                continue
            first = F.normalize(first.mean(dim=(0, 1)), dim=0, eps=EPS)
            second = F.normalize(second.mean(dim=(0, 1)), dim=0, eps=EPS)
            total = total + (first * second).sum()
            count += 1
    return total / max(count, 1)


def _mutual_information(features: Sequence[Tensor], start: int, max_pairs: int, checks: bool) -> Tensor:
    total, count = features[0].new_zeros(()), 0
    for i in range(start, len(features)):
        for j in range(i + 1, len(features)):
            if count >= max_pairs:
                break
            first, second = features[i], features[j]
            if checks and (_not_finite(first) or _not_finite(second)):
                continue
            first, second = F.normalize(first, dim=-1, eps=EPS), F.normalize(second, dim=-1, eps=EPS)
            total = total + (first * second).sum(dim=-1).mean().abs()
            count += 1
    return total / max(count, 1)


def _dispersion(features: Sequence[Tensor], checks: bool) -> Tensor:
    usages = []
    for feature in features:
        if checks and _not_finite(feature):
            continue
        columns = F.normalize(feature.reshape(-1, feature.shape[-1]), dim=0, eps=EPS)
        usages.append(columns.abs().mean(dim=0))
    if len(usages) < 2:
        return features[0].new_zeros(())
    usage = torch.stack(usages).sum(dim=0) / (len(usages) + EPS)
    usage = usage / (usage.max() + EPS)
    spread = (usage - usage.mean()).square().mean()
    return -torch.clamp(spread / 0.25, 0.0, 1.0)


def _not_finite(x: Tensor) -> bool:
    return bool(torch.isnan(x).any()) or bool(torch.isinf(x).any())
