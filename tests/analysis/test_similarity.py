"""Properties that define the similarity measures, and one value worked out by hand."""

import math

import pytest
import torch

from dit_fast.analysis.similarity import cka_matrix, effective_rank, token_cosine_matrix
from dit_fast.errors import UserError


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size, seed=1):
    return torch.linalg.qr(draw(size, size, seed=seed)).Q


def test_cka_against_kernel_form():
    # methods.md 2.9: HSIC(K, L) = Tr(KHLH) / (n - 1)^2
    x, y = draw(9, 3), draw(9, 5, seed=4)
    centre = torch.eye(9, dtype=torch.float64) - 1 / 9

    def hsic(k, other):
        return torch.trace(k @ centre @ other @ centre) / 64

    k, other = x @ x.T, y @ y.T
    expected = hsic(k, other) / (hsic(k, k) * hsic(other, other)).sqrt()
    assert cka_matrix([x[:, None], y[:, None]])[0, 1].item() == pytest.approx(expected.item(), abs=1e-12)


def test_constant_feature_gives_zero_not_nan():
    assert cka_matrix([torch.ones(5, 1, 3), draw(5, 1, 3)])[0].tolist() == [0.0, 0.0]


def test_matrix_is_symmetric_pools_tokens_and_takes_strided_input():
    wide = draw(12, 6, 10)
    features = [wide[..., ::2], draw(12, 3, 5, seed=5).float(), wide[..., ::2] @ rotation(5)]
    matrix = cka_matrix(features)
    assert matrix.shape == (3, 3)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=0)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    pooled = cka_matrix([feature.double().mean(1, keepdim=True) for feature in features])
    torch.testing.assert_close(matrix, pooled, rtol=0, atol=1e-12)
    assert matrix[0, 2].item() == pytest.approx(1.0, abs=1e-12)


def test_token_cosine_of_known_angles():
    along, across = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    along[..., 0] = 2.0
    across[..., 1] = 5.0
    half = across.clone()
    half[..., 0] = 5.0
    matrix = token_cosine_matrix([along, across, half, -along])
    expected = torch.tensor([1.0, 0.0, math.sqrt(0.5), -1.0], dtype=torch.float64)
    torch.testing.assert_close(matrix[0], expected, rtol=0, atol=1e-12)


def test_effective_rank_counts_directions():
    rows = torch.cat([torch.eye(4), -torch.eye(4)])
    assert effective_rank(rows).item() == pytest.approx(4.0, abs=1e-9)
    assert effective_rank(draw(30, 1) @ draw(1, 6, seed=1)).item() == pytest.approx(1.0, abs=1e-6)
    assert effective_rank(torch.ones(2, 3, 4)).item() == 0.0


def test_features_of_different_sample_counts_are_refused():
    with pytest.raises(UserError, match="feature 1"):
        cka_matrix([draw(4, 2, 3), draw(5, 2, 3)])
    with pytest.raises(UserError, match="feature 1"):
        token_cosine_matrix([draw(4, 2, 3), draw(4, 2, 2)])
    with pytest.raises(UserError, match="at least one"):
        cka_matrix([])


def test_features_that_are_not_finite_are_refused():
    """NaN would pass as a CKA of 0, or end inside the singular values."""
    broken = draw(4, 2, 3)
    broken[1, 0, 2] = float("nan")
    calls = [
        lambda: cka_matrix([draw(4, 2, 3), broken]),
        lambda: token_cosine_matrix([draw(4, 2, 3), broken]),
        lambda: effective_rank(broken),
    ]
    for call in calls:
        with pytest.raises(UserError, match="NaN or Inf"):
            call()
