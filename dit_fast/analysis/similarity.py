"""How alike representations are, and in how many directions they vary: CKA, token cosines, effective rank.

DiverseDiT (arXiv 2603.04239, Sec. 2) compares blocks by centred kernel alignment of their features, with an RBF kernel
whose width it does not give. Here a kernel is "linear", x.y, which needs no width, or "rbf", exp(-|x - y|^2 / 2s^2),
whose s is `width` times the median distance between two different samples of a minibatch (Kornblith et al. 2019, Sec.
4; scaling the features then changes nothing).

HSIC is estimated by HSIC_1 (Song et al. 2012, Eq. 5; Nguyen et al. 2021, arXiv 2010.15327, Eq. 3), whose mean is the
true value for every n >= 4, so that its mean over minibatches is one estimate of all samples. The estimator without
this correction is far above 0 for independent features that are wider than samples are many. All sums are float64: near
1 the interesting differences are small.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from dit_fast.errors import UserError
from dit_fast.ops.diversity import DiversityLoss, Sums, check_options, loss_from_sums, sums_of

Kernel = Literal["linear", "rbf"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
LEAST = 4  # samples of a minibatch
TINY = torch.finfo(torch.float64).tiny


def gram(x: Tensor, kernel: Kernel = "linear", width: float = 1.0) -> Tensor:
    """Kernel matrix [n, n] of x [n, D], float64."""
    x = x.double()
    x = x - x.mean(dim=0)  # changes no HSIC_1, and keeps digits
    products = x @ x.T
    if kernel == "linear":
        return products
    squares = products.diagonal()
    distances = (squares[:, None] + squares - 2 * products).clamp_min(0)
    first, second = torch.triu_indices(len(x), len(x), 1, dtype=torch.int64, device=x.device)
    scale = (width * distances[first, second].sqrt().median()).square()
    return torch.exp(-distances / (2 * scale).clamp_min(TINY))


def hsic1(grams: Tensor) -> Tensor:
    """HSIC_1 of every pair of kernel matrices [K, n, n] of the same n >= 4 samples: float64 [K, K], symmetric.

    Unbiased, so that a pair of independent ones has mean 0 and values on both sides of it.
    """
    count, n = len(grams), grams.shape[-1]
    grams = grams.double()
    means = grams.mean(dim=2)
    means = means - means.mean(dim=1, keepdim=True) / 2
    grams = grams - means[:, :, None] - means[:, None, :]  # changes nothing, and keeps digits
    grams.diagonal(dim1=1, dim2=2).zero_()
    flat, rows = grams.reshape(count, -1), grams.sum(dim=2)
    totals = rows.sum(dim=1)
    value = flat @ flat.T + torch.outer(totals, totals) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ rows.T)
    return (value + value.T) / (2 * n * (n - 3))


class MinibatchCKA:
    """CKA of every pair of K representations, from the mean of their HSIC_1 over minibatches.

    Minibatches of one size; one that holds all samples gives the unbiased estimate of the whole set.
    """

    def __init__(self, kernel: Kernel = "linear", width: float = 1.0):
        if kernel not in KERNELS:
            raise UserError(f"unknown kernel '{kernel}'; valid: {', '.join(KERNELS)}")
        if not width > 0:
            raise UserError(f"the width of the RBF kernel must be above 0, not {width}")
        self.kernel, self.width = kernel, width
        self._sum: Tensor | None = None
        self._n = 0

    def add(self, features: Sequence[Tensor]) -> None:
        """A minibatch: K tensors [n, D] (D may differ), n >= 4. Raises UserError for other shapes, and NaN or Inf."""
        if not features:
            raise UserError("block similarity needs the features of at least one block")
        n = self._n or len(features[0])
        for index, feature in enumerate(features):
            if feature.ndim != 2 or len(feature) != n or n < LEAST:
                raise UserError(
                    f"feature {index} has shape {tuple(feature.shape)}; expected [n, D] with n = {max(n, LEAST)}"
                )
            check_finite(f"feature {index}", feature)
        value = hsic1(torch.stack([gram(feature, self.kernel, self.width) for feature in features]))
        self._n, self._sum = n, value if self._sum is None else self._sum + value

    def matrix(self) -> Tensor:
        """float64 [K, K] on the CPU, symmetric, 1 on the diagonal; at most a little above 1, and 0 on average for
        independent ones. NaN in the row of one that does not vary (or too few samples to tell)."""
        if self._sum is None:
            raise UserError("no minibatch was added")
        own = self._sum.diagonal()
        return (self._sum / torch.outer(own, own).sqrt().where(torch.outer(own > 0, own > 0), torch.nan)).cpu()


class TokenSums:
    """Sums over the tokens of K block outputs of one width D: `add` them sample by sample or all at once.

    cosine(): mean cosine of the tokens of two blocks at equal places, float64 [K, K], what the diversity loss pushes
    down. diversity(): its terms over all pairs of blocks ("release"). rank(): effective rank of each block's tokens,
    float64 [K]: exp of the entropy of the normalised singular values of the centred rows (Roy and Vetterli 2007), in
    how many directions they vary; from 1 to min(rows, D), or 0 where all rows are equal.
    """

    def __init__(self) -> None:
        self._sums: Sums | None = None
        self._products: Tensor | None = None

    def add(self, features: Sequence[Tensor]) -> None:
        """K tensors [n, T, D]. Raises UserError for other shapes, NaN or Inf."""
        for index, feature in enumerate(features):
            check_finite(f"feature {index}", feature)
        new = sums_of([feature.double() for feature in features], "torch")
        rows = torch.stack([feature.double().flatten(0, -2) for feature in features])
        products = rows.transpose(1, 2) @ rows
        if self._sums is None or self._products is None:
            self._sums, self._products = new, products
            return
        old = self._sums
        tokens = old.tokens + new.tokens
        self._sums = Sums(old.backend, old.statistics + new.statistics, old.pair_sums + new.pair_sums, tokens)
        self._products += products

    def _known(self) -> Sums:
        if self._sums is None:
            raise UserError("no features were added")
        return self._sums

    def cosine(self) -> Tensor:
        return (self._known().pair_sums / self._known().tokens).cpu()

    def diversity(self) -> DiversityLoss:
        sums = self._known()
        return loss_from_sums(sums, check_options("all", len(sums.pair_sums), "release", "rank"), "release", "rank")

    def rank(self) -> Tensor:
        stats = self._known().named()
        assert self._products is not None
        products, means = self._products, stats.sums / stats.count
        scatter = products - stats.count * means[:, :, None] * means[:, None, :]
        noise = torch.finfo(torch.float64).eps * products.shape[-1] * products.diagonal(dim1=1, dim2=2).sum(1)
        values = torch.linalg.eigvalsh(scatter)
        values = values.where(values > noise[:, None], 0).sqrt()
        return torch.stack([_entropy_rank(each) for each in values]).cpu()


def _entropy_rank(values: Tensor) -> Tensor:
    share = values / values.sum().clamp_min(TINY)
    entropy = -torch.special.xlogy(share, share).sum()
    return torch.where(values.sum() > 0, entropy.exp(), torch.zeros_like(entropy))


def check_finite(name: str, value: Tensor) -> None:
    if not value.isfinite().all():
        raise UserError(f"{name} holds NaN or Inf, so nothing can be said about its similarity or rank")
