"""The numbers of features against their definitions, the goldens and scipy."""

import numpy as np
import pytest
import scipy.linalg
import torch

from dit_fast.errors import UserError
from dit_fast.evaluation import metrics
from dit_fast.evaluation.metrics import (
    MomentSums,
    frechet_distance,
    gaussian_mmd,
    inception_score,
    kernel_distance,
    moments,
    precision_recall,
)
from tests.helpers.deterministic_fill import fill


def hashed(n, d, k):
    i, j = np.arange(n)[:, None], np.arange(d)[None]
    value = 43758.5453 * np.sin(12.9898 * (i * d + j) + k)
    return torch.from_numpy(value - np.floor(value) - 0.5)


A, B = 2 * hashed(64, 6, 1), 2 * hashed(48, 6, 2) + 0.1


def test_goldens_of_the_numbers():
    assert frechet_distance(moments(A), moments(B)) == pytest.approx(0.20716251, abs=5e-9)
    assert precision_recall(A, B) == (54 / 64, 46 / 48)
    # the golden's softmax is the distribution
    logits = torch.as_tensor(fill("golden.logits", (20, 10), 8)).double()
    assert inception_score(logits, split=10) == pytest.approx(2.75173525, abs=5e-9)
    assert inception_score(logits) == pytest.approx(2.78759360, abs=5e-9)
    assert inception_score(logits, splits=2) == inception_score(logits, split=10)


def test_frechet_distance_is_that_of_scipys_root():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(600, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    x, y = x @ torch.randn(64, 64, generator=generator, dtype=torch.float64), 1.5 * y + 0.2
    a, b = moments(x), moments(y)
    np.testing.assert_allclose(a.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-10, atol=1e-10)
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    wanted = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(float(wanted), rel=1e-6)
    few = moments(x[:20])  # fewer images than channels
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6 * float(few.covariance.trace()))
    with pytest.raises(UserError, match="width 64 and 6"):
        frechet_distance(a, moments(A))


def test_moments_of_chunks_are_those_of_the_whole_even_far_from_zero():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(700, 12))) + 1e4
    whole = moments(x)
    for size in (1, 64, 333):
        sums = MomentSums()
        for chunk in x.split(size):
            sums.add(chunk)
        torch.testing.assert_close(sums.moments().mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(sums.moments().covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    with pytest.raises(UserError, match="1 images have no covariance"):
        moments(x[:1])


def test_precision_and_recall_do_not_depend_on_blocks(monkeypatch):
    monkeypatch.setattr(metrics, "BALLS", 7)
    assert precision_recall(A, B) == (54 / 64, 46 / 48)
    with pytest.raises(UserError, match="3 samples have no 3 neighbours"):
        precision_recall(A[:3], B)


def test_kernel_distances_are_their_sums_over_pairs(monkeypatch):
    n, m, d = len(A), len(B), A.shape[1]
    cubic = {name: (x @ y.T / d + 1) ** 3 for name, x, y in (("aa", A, A), ("bb", B, B), ("ab", A, B))}
    wanted = (cubic["aa"].sum() - cubic["aa"].trace()) / (n * (n - 1)) - 2 * cubic["ab"].mean()
    wanted += (cubic["bb"].sum() - cubic["bb"].trace()) / (m * (m - 1))
    x, y = (torch.nn.functional.normalize(each, dim=1) for each in (A, B))
    gauss = [(-torch.cdist(u, v).square() / 200).exp().mean() for u, v in ((x, x), (y, y), (x, y))]
    for block in (1024, 13):
        monkeypatch.setattr(metrics, "BLOCK", block)
        assert kernel_distance(A, B) == pytest.approx(float(wanted), rel=1e-10)
        assert gaussian_mmd(A, B) == pytest.approx(float(1000 * (gauss[0] + gauss[1] - 2 * gauss[2])), rel=1e-6)
    assert gaussian_mmd(A, A) == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="no pairs"):
        kernel_distance(A[:1], B)


def test_scores_need_images_for_every_part():
    with pytest.raises(UserError, match="too few for 10 parts"):
        inception_score(torch.zeros(5, 3), splits=10)
