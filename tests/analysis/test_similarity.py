"""Identities that define the similarity measures, and values worked out another way."""

import itertools
import math

import pytest
import torch

from dit_fast.analysis.similarity import KERNELS, MinibatchCKA, TokenSums, gram, hsic1
from dit_fast.ops import diversity_loss
from tests.helpers.cases import loop_over, refused


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size, seed=1):
    return torch.linalg.qr(draw(size, size, seed=seed)).Q


def cka(features, kernel="linear", minibatches=1, width=1.0):
    found = MinibatchCKA(kernel, width)
    for chunk in zip(*(feature.chunk(minibatches) for feature in features), strict=True):
        found.add(chunk)
    return found.matrix()


def sums(features, chunks=1):
    found = TokenSums()
    for chunk in zip(*(feature.chunk(chunks) for feature in features), strict=True):
        found.add(chunk)
    return found


def test_hsic1_is_the_mean_over_quadruples_of_different_samples():
    # Song et al. 2012, Eq. 4: its definition as a U-statistic
    x, y = gram(draw(7, 3)), gram(draw(7, 2, seed=4), "rbf")
    quadruples = list(itertools.permutations(range(7), 4))
    total = sum(x[i, j] * (y[i, j] + y[q, r] - 2 * y[i, q]) for i, j, q, r in quadruples)
    assert hsic1(torch.stack([x, y]))[0, 1].item() == pytest.approx(total.item() / len(quadruples), abs=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_hsic1_of_independent_features_has_mean_zero(kernel):
    """Also where they are far wider than samples are many, which drives the usual estimator to 1."""
    grams = torch.stack([gram(draw(8, 64, seed=seed), kernel) for seed in range(60)])
    values = hsic1(grams)
    off = values[~torch.eye(60, dtype=torch.bool)]
    error = off.std() / math.sqrt(len(off) / 2)
    assert off.mean().abs() < 4 * error
    assert (off < 0).float().mean() > 0.3
    centred = grams - grams.mean(1, keepdim=True) - grams.mean(2, keepdim=True) + grams.mean((1, 2), keepdim=True)
    assert ((centred[0] * centred[1]).sum() / centred[0].norm() / centred[1].norm()) > 0.5  # the usual one


@pytest.mark.parametrize("kernel", KERNELS)
def test_cka_is_symmetric_one_of_itself_and_blind_to_rotation_scale_and_shift(kernel):
    x, y = draw(40, 6), draw(40, 9, seed=3)
    y[:, :6] += x
    matrix = cka([x, 3 * x @ rotation(6) + 5, y, x.float()], kernel, minibatches=2)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=0)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert matrix[0, 1].item() == pytest.approx(1, abs=1e-12)
    assert matrix[0, 3].item() == pytest.approx(1, abs=1e-6)
    assert matrix[0, 2].item() == pytest.approx(matrix[1, 2].item(), abs=1e-12)
    assert 0.05 < matrix[0, 2] < 0.95


@pytest.mark.parametrize("kernel", KERNELS)
def test_minibatches_estimate_what_all_samples_do(kernel):
    x = draw(2048, 4)
    y = x @ rotation(4)[:, :2] + 0.5 * draw(2048, 2, seed=5)
    whole, parts = (cka([x, y], kernel, minibatches) for minibatches in (1, 64))
    assert parts[0, 1].item() == pytest.approx(whole[0, 1].item(), abs=0.02)
    same = [x[:16].repeat(3, 1), y[:16].repeat(3, 1)]  # equal minibatches: the mean is each one's
    torch.testing.assert_close(cka(same, kernel, 3), cka([each[:16] for each in same], kernel), rtol=0, atol=1e-12)


def test_the_width_of_the_rbf_kernel_is_in_medians_of_the_distances():
    x = draw(9, 3)
    distances = torch.pdist(x)
    scale = 0.5 * distances.median()
    expected = torch.exp(-torch.cdist(x, x).square() / (2 * scale**2))
    torch.testing.assert_close(gram(x, "rbf", 0.5), expected, rtol=0, atol=1e-12)
    wide, linear = cka([x, draw(9, 2, seed=7)], "rbf", width=1e3), cka([x, draw(9, 2, seed=7)])
    assert wide[0, 1].item() == pytest.approx(
        linear[0, 1].item(), abs=1e-5
    )  # a wide kernel sees what a linear one does


def test_a_feature_that_does_not_vary_is_like_nothing():
    for kernel in KERNELS:
        matrix = cka([torch.ones(6, 3), draw(6, 3)], kernel)
        assert matrix.isnan().tolist() == [[True, True], [True, False]], kernel


def test_token_sums_are_those_of_all_tokens_in_any_pieces():
    features = [draw(12, 4, 6, seed=seed).float() + 0.3 for seed in range(3)]
    whole, parts = sums(features), sums(features, chunks=5)
    expected = diversity_loss([feature.double() for feature in features])
    for found in (whole, parts):
        for name in ("total", "orthogonality", "mutual_information", "dispersion"):
            assert getattr(found.diversity(), name).item() == pytest.approx(getattr(expected, name).item(), abs=1e-12)
        units = [torch.nn.functional.normalize(feature.double(), dim=-1) for feature in features]
        cosine = torch.stack([torch.stack([(a * b).sum(-1).mean() for b in units]) for a in units])
        torch.testing.assert_close(found.cosine(), cosine, rtol=0, atol=1e-12)
        rows = features[1].double().flatten(0, 1)
        values = torch.linalg.svdvals(rows - rows.mean(0))
        entropy = -(values / values.sum() * (values / values.sum()).log()).sum()
        assert found.rank()[1].item() == pytest.approx(entropy.exp().item(), rel=1e-9)


def test_token_cosine_of_known_angles():
    along, across = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    along[..., 0] = 2.0
    across[..., 1] = 5.0
    half = across.clone()
    half[..., 0] = 5.0
    matrix = sums([along, across, half, -along]).cosine()
    expected = torch.tensor([1.0, 0.0, math.sqrt(0.5), -1.0], dtype=torch.float64)
    torch.testing.assert_close(matrix[0], expected, rtol=0, atol=1e-12)


def test_effective_rank_counts_directions():
    rows = torch.cat([torch.eye(4), -torch.eye(4)]).double()[:, None]
    line = (draw(8, 1) @ draw(1, 4, seed=1))[:, None] + 100
    ranks = sums([rows, line, torch.full((8, 1, 4), 3.7)]).rank().tolist()
    assert ranks == pytest.approx([4, 1, 0], abs=1e-5)


BROKEN = draw(6, 3).index_fill(0, torch.tensor([1]), torch.nan)


@loop_over(
    ("call", "said"),
    [
        (
            lambda: MinibatchCKA().add([draw(5, 3), draw(6, 3)]),
            "feature 1 has shape (6, 3); expected [n, D] with n = 5",
        ),
        (lambda: MinibatchCKA().add([draw(3, 3)]), "with n = 4"),
        (lambda: MinibatchCKA().add([]), "at least one"),
        (lambda: MinibatchCKA().add([draw(6, 3), BROKEN]), "feature 1 holds NaN or Inf"),
        (lambda: TokenSums().add([draw(6, 1, 3), BROKEN[:, None]]), "feature 1 holds NaN or Inf"),
        (lambda: MinibatchCKA("cubic"), "valid: linear, rbf"),
        (lambda: MinibatchCKA("rbf", 0.0), "must be above 0"),
        (MinibatchCKA().matrix, "no minibatch was added"),
        (TokenSums().rank, "no features were added"),
    ],
)
def test_what_says_nothing_is_refused(call, said):
    assert said in refused(call)
