"""The field's numbers as functions of features, on the CPU in float64; no network and no file is known here.

Features are tensors [N, D], one row per image. Sums over many rows run over fixed blocks in order.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dit_fast.errors import UserError

BLOCK = 1024  # rows of a kernel matrix at a time
BALLS = 10_000  # rows whose k-th neighbours are searched at once, as published
NEIGHBOURS = 3


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] (divided by N - 1), float64; count: N, None where a file does not say."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None


class MomentSums:
    """Moments of features that come in chunks; equal chunks in equal order give equal bits.

    Sums are of the differences from the first chunk's mean, so that nothing is lost to large means.
    """

    def __init__(self) -> None:
        self._count, self._origin = 0, torch.zeros(0, dtype=torch.float64)
        self._sum, self._products = self._origin, self._origin

    def add(self, features: Tensor) -> None:
        """features [n, D] of any dtype."""
        x = features.double()
        if not self._count:
            self._origin = x.mean(0)
            self._sum, self._products = torch.zeros_like(self._origin), x.new_zeros(x.shape[1], x.shape[1])
        x = x - self._origin
        self._count += len(x)
        self._sum = self._sum + x.sum(0)
        self._products.addmm_(x.T, x)

    def moments(self) -> Moments:
        """Raises UserError for fewer than two images."""
        if self._count < 2:
            raise UserError(f"{self._count} images have no covariance; evaluate two or more, usually 50,000")
        shift = self._sum / self._count
        covariance = (self._products - self._count * torch.outer(shift, shift)) / (self._count - 1)
        return Moments(self._origin + shift, covariance, self._count)


def moments(features: Tensor) -> Moments:
    """Of [N, D] at once, as np.mean and np.cov."""
    sums = MomentSums()
    sums.add(features)
    return sums.moments()


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2) (arXiv 1706.08500, eq. 6).

    The last trace is the sum of the roots of the eigenvalues of S_a S_b, which are those of the symmetric
    S_a^(1/2) S_b S_a^(1/2); it needs no root of a matrix that has none, and no offset where images are few.
    Raises UserError for moments of another width.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"features of width {len(a.mean)} and {len(b.mean)} cannot be compared; use one network for both"
        )
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ b.covariance @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace
    return float(distance)


def inception_score(logits: Tensor, split: int | None = None, splits: int | None = None) -> float:
    """exp(mean over images of KL(p(y|x) | p(y))), averaged over consecutive parts in file order (arXiv 1606.03498).

    logits [N, classes]. split: images of a part, the last of which may have fewer (ADM: 5,000); or splits: number of
    equal parts (torch-fidelity: 10); neither: one part.
    """
    count = len(logits)
    if splits is not None:
        edges = [part * count // splits for part in range(splits + 1)]
    else:
        edges = [*range(0, count, split or max(count, 1)), count]
    if min(after - before for before, after in pairwise(edges)) < 1:
        raise UserError(f"{count} images are too few for {splits} parts; evaluate more")
    scores = []
    for before, after in pairwise(edges):
        log_p = logits[before:after].double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(after - before)
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(samples: Tensor, reference: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Precision: share of samples [N, D] within a ball of the reference [M, D]; recall: the other way round.

    The ball around a feature reaches to the k-th nearest other one of its own set (arXiv 1904.06991). Squared distances
    are float32, in blocks, as published (ADM computes products in half precision where that is fast).
    Raises UserError where a set has too few features for k neighbours.
    """
    for name, features in (("samples", samples), ("reference images", reference)):
        if len(features) <= k:
            raise UserError(f"{len(features)} {name} have no {k} neighbours each; evaluate more")
    samples, reference = samples.float(), reference.float()
    centre = reference.mean(0)  # distances of points far from the origin lose digits
    samples, reference = samples - centre, reference - centre
    return _covered(samples, reference, _radii(reference, k)), _covered(reference, samples, _radii(samples, k))


def _radii(features: Tensor, k: int) -> Tensor:
    """Squared distance [N] of each feature to its k-th nearest other one."""
    radii = []
    for _, rows in _blocks(features, BALLS):
        nearest: Tensor | None = None  # k + 1 smallest so far: one is the feature itself
        for _, columns in _blocks(features, BALLS):
            found = _squared_distances(rows, columns).topk(min(k + 1, len(columns)), 1, largest=False).values
            nearest = found if nearest is None else torch.cat([nearest, found], 1).sort(1).values[:, : k + 1]
        assert nearest is not None
        radii.append(nearest[:, k])
    return torch.cat(radii)


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of points within any ball."""
    inside = 0
    for _, rows in _blocks(points, BALLS):
        found = torch.zeros(len(rows), dtype=torch.bool)
        for start, columns in _blocks(centres, BALLS):
            found |= (_squared_distances(rows, columns) <= radii[start : start + len(columns)]).any(1)
        inside += int(found.sum())
    return inside / len(points)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(a.square().sum(1)[:, None] + b.square().sum(1), a, b.T, alpha=-2).clamp_(min=0)


def _blocks(x: Tensor, size: int = BLOCK) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(x), size):
        yield start, x[start : start + size]


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3, over all pairs of [N, D] and [M, D] (arXiv 1801.01401).

    KID is its mean over random subsets of 1,000, which has the same expectation and more noise.
    """
    for features in (a, b):
        if len(features) < 2:
            raise UserError(f"{len(features)} images have no pairs; evaluate two or more")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    return _mmd(a, b, kernel, unbiased=True)


def gaussian_mmd(a: Tensor, b: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """scale * squared MMD with exp(-|x - y|^2 / (2 sigma^2)) between features of length 1, all pairs counted.

    CMMD's estimator (arXiv 2401.09603), whose features are CLIP's embeddings of images; [N, D] are normalised here.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (-(2 - 2 * x @ y.T) / (2 * sigma**2)).exp()

    def unit(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x.double(), dim=1)

    return scale * _mmd(unit(a), unit(b), kernel, unbiased=False)


def _mmd(a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], unbiased: bool) -> float:
    """The kernel's sums over pairs within each set, of an image with itself or not, and between them."""
    within = [_kernel_mean(x, x, kernel, unbiased) for x in (a, b)]
    return within[0] + within[1] - 2 * _kernel_mean(a, b, kernel, False)


def _kernel_mean(a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], others: bool) -> float:
    """others: of each row with itself not."""
    total = torch.zeros((), dtype=torch.float64)
    for start, rows in _blocks(a):
        for other, columns in _blocks(b):
            values = kernel(rows.double(), columns.double())
            total += values.sum() - (values.diagonal().sum() if others and start == other else 0)
    return float(total / (len(a) * (len(b) - others)))
