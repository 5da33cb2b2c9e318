"""Similarity of the blocks of a transformer: linear CKA, mean token cosine, effective rank.

DiverseDiT (arXiv 2603.04239, Sec. 2) compares blocks by the centred kernel alignment of their features. The paper shows
an RBF kernel whose width it does not give; the linear kernel needs no width and is what the authors' own analysis code
uses on token-pooled features. All sums are taken in float64: near 1 the interesting differences are small.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_fast.errors import UserError


def cka_matrix(features: Sequence[Tensor]) -> Tensor:
    """Linear CKA of every pair of blocks on token-pooled features.

    features: K tensors [N, T, D] (one per block, same N; T and D may differ). Returns float64 [K, K] in [0, 1],
    symmetric, with ones on the diagonal (zeros where a block's pooled feature does not vary).
    """
    _check(features)
    pooled = [_centred(feature.double().mean(dim=1)) for feature in features]
    count = len(pooled)
    result = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i, count):
            result[i, j] = result[j, i] = _cka(pooled[i], pooled[j])
    return result


def token_cosine_matrix(features: Sequence[Tensor]) -> Tensor:
    """Mean cosine between the tokens of two blocks at equal places: what the diversity loss pushes down.

    features: K tensors [N, T, D] of one shape. Returns float64 [K, K] in [-1, 1], symmetric.
    """
    _check(features, same_width=True)
    units = [torch.nn.functional.normalize(feature.double(), dim=-1) for feature in features]
    rows = [torch.stack([(a * b).sum(dim=-1).mean() for b in units]) for a in units]
    return torch.stack(rows).cpu()


def effective_rank(feature: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007): in how many directions x varies.

    feature: [..., D], flattened to rows and centred. Returns a 0-d float64 tensor in [1, min(rows, D)], or 0 when all
    rows are equal. Raises UserError for NaN or Inf.
    """
    _check_finite("effective_rank: the feature", feature)
    rows = feature.double().reshape(-1, feature.shape[-1])
    values = torch.linalg.svdvals(rows - rows.mean(dim=0))
    share = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    entropy = -torch.special.xlogy(share, share).sum()
    return torch.where(values.sum() > 0, entropy.exp(), torch.zeros_like(entropy))


def _centred(x: Tensor) -> Tensor:
    x = x.double()
    return x - x.mean(dim=0)


def _cka(x: Tensor, y: Tensor) -> Tensor:
    """||X'Y||_F^2 / (||X'X||_F ||Y'Y||_F) of centred columns [n, P], [n, Q] (Kornblith et al. 2019, Eq. 4; biased).

    1 for equal representations up to rotation, scale and shift; 0 when one of them does not vary at all.
    """
    cross = (x.T @ y).square().sum()
    norms = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return torch.where(norms > 0, cross / norms.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(cross))


def _check(features: Sequence[Tensor], same_width: bool = False) -> None:
    if not features:
        raise UserError("block similarity needs the features of at least one block")
    first = features[0]
    for index, feature in enumerate(features):
        fits = feature.ndim == 3 and feature.shape[0] == first.shape[0]
        if not fits or (same_width and feature.shape != first.shape):
            raise UserError(
                f"feature {index} has shape {tuple(feature.shape)}; expected [N, T, D] like {tuple(first.shape)}"
            )
        _check_finite(f"feature {index}", feature)


def _check_finite(name: str, value: Tensor) -> None:
    if not value.isfinite().all():
        raise UserError(f"{name} holds NaN or Inf, so nothing can be said about its similarity or rank")
