"""The loss's formula in one launch against the formula in float64: values, gradients, floors, ties, odd sizes."""

import pytest
import torch

from dit_fast.kernels import diversity_terms as kernel
from dit_fast.ops import diversity, diversity_loss
from dit_fast.ops.diversity import Sums, loss_from_sums

NAMES = ("total", "orthogonality", "mutual_information", "dispersion")


def make(blocks, width, seed=0):
    """Statistics of features whose blocks share a part, so that no term is near zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(blocks, 24, width, generator=generator) + torch.randn(24, width, generator=generator) + 0.3
    x *= torch.rand(width, generator=generator) + 0.1
    unit = (x / x.norm(dim=-1, keepdim=True)).flatten(1)
    return torch.stack([x.sum(1), x.abs().sum(1), x.square().sum(1)]), unit @ unit.T


def both(statistics, pair_sums, pairs, variant):
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (statistics, pair_sums)]
        yield leaves, loss_from_sums(Sums(backend, *leaves, 24), pairs, variant, "rank")


def check(statistics, pair_sums, pairs, variant="release", names=("total",)):
    (ours, found), (exact, expected) = both(statistics, pair_sums, pairs, variant)
    for name in NAMES:
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=2e-6, atol=1e-7)
    # Factors apart, so that a gradient that goes to another term shows.
    sides = [sum((place + 1) * getattr(loss, name) for place, name in enumerate(names)) for loss in (found, expected)]
    grads = [torch.autograd.grad(*side, materialize_grads=True) for side in zip(sides, (ours, exact), strict=True)]
    for each, same in zip(*grads, strict=True):
        assert (each.double() - same).norm() <= 1e-5 * same.norm() + 1e-8


def pairs_of(blocks):
    return tuple((i, j) for i in range(blocks) for j in range(i + 1, blocks))


@pytest.mark.parametrize("variant", ["release", "paper"])
@pytest.mark.parametrize(("blocks", "width"), [(2, 1), (3, 40), (5, kernel.BLOCK + 3), (17, 2 * kernel.BLOCK), (32, 9)])
def test_values_and_gradients(blocks, width, variant):
    check(*make(blocks, width), pairs_of(blocks), variant)


@pytest.mark.parametrize("variant", ["release", "paper"])
def test_pairs_that_lack_blocks_or_come_twice(variant):
    check(*make(5, 40), ((0, 3), (3, 1), (0, 3)), variant)


@pytest.mark.parametrize("names", [(name,) for name in NAMES] + [NAMES], ids=len)
def test_the_gradient_of_each_term(names):
    check(*make(4, 70), pairs_of(4), names=names)


def test_the_spread_is_clamped_and_then_has_no_gradient():
    """No features give a spread above the bound but by rounding; statistics with signs do."""
    statistics, pair_sums = make(3, 8)
    statistics[1, :, 4:] *= -1
    (_, found), (_, expected) = both(statistics, pair_sums, pairs_of(3), "release")
    assert found.dispersion == expected.dispersion == -1
    check(statistics, pair_sums, pairs_of(3))


def test_channels_and_blocks_that_are_zero_everywhere():
    statistics, pair_sums = make(4, 40)
    statistics[:, :, 5] = 0
    check(statistics, pair_sums, pairs_of(4))
    statistics[:, 2] = 0
    pair_sums[2] = pair_sums[:, 2] = 0
    (ours, found), (exact, expected) = both(statistics, pair_sums, pairs_of(4), "release")
    torch.testing.assert_close(found.total.double(), expected.total, rtol=2e-6, atol=1e-7)
    grads = torch.autograd.grad(found.total, ours), torch.autograd.grad(expected.total, exact)
    for each, same in zip(*grads, strict=True):
        torch.testing.assert_close(each.double(), same, rtol=1e-5, atol=1e-5 * same.abs().max().item())


def test_no_gradient_goes_through_a_floor():
    statistics, pair_sums = make(3, 40)
    statistics[0, 1] *= 1e-9
    statistics[1, :, 5] *= 1e-10
    statistics[2, :, 5] *= 1e-20
    check(statistics, pair_sums, pairs_of(3))


def test_channels_that_are_used_equally_most_share_the_gradient():
    statistics, pair_sums = make(3, 12)
    statistics[1:, :, 7] = statistics[1:, :, 2] = statistics[1:].amax(-1)
    statistics[2] = 1
    check(statistics, pair_sums, pairs_of(3))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_no_number_reaches_the_total(place):
    statistics, pair_sums = make(3, 40)
    statistics[place, 1, 4] = torch.nan
    (_, found), _ = both(statistics, pair_sums, pairs_of(3), "release")
    assert found.total.isnan()


def test_the_loss_of_features_and_a_second_derivative():
    generator = torch.Generator().manual_seed(3)
    features = [torch.randn(2, 9, 24, generator=generator).requires_grad_() for _ in range(3)]
    sides = []
    for backend in ("triton", "torch"):
        total = diversity_loss(features, backend=backend).total
        sides.append((total, *torch.autograd.grad(total, features, create_graph=backend == "triton")))
    for ours, reference in zip(*sides, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
    with pytest.raises(diversity.UserError, match="no second derivative"):
        torch.autograd.grad(sides[0][1].sum(), features)
