"""The restated baselines compute what they stand for: values equal ours to 1e-5, gradients to 1e-4."""

from types import SimpleNamespace

import torch

from dit_fast.benchmarks.baselines.published_diversity import published_diversity_loss, vectorised_diversity_loss
from dit_fast.benchmarks.baselines.published_step import CarefulDiversity, PublishedDiversity
from dit_fast.methods.diversedit import DiverseDiT, select_pairs
from dit_fast.models import Taps
from dit_fast.ops import diversity_loss
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close, golden, golden_names


def features(blocks=7, seed=0):
    """Every third block points against the others, so that mean cosines have both signs."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(3, 11, 24, generator=generator)
    signs = [-1 if block % 3 == 2 else 1 for block in range(blocks)]
    return [(sign * common + torch.randn(3, 11, 24, generator=generator)).requires_grad_() for sign in signs]


@loop_over("checks", [True, False])
@loop_over(("blocks", "depth"), [(12, None), (12, 8), (12, 4), (7, None), (2, None), (3, None)])
def test_values_and_gradients_equal_ours(blocks, depth, checks):
    x = features(blocks)
    pairs = select_pairs("release", blocks, encoder_depth=depth)
    theirs = published_diversity_loss(x, start=pairs[0][0], checks=checks)
    ours = diversity_loss(x, pairs)
    for name in ("total", "orthogonality", "mutual_information", "dispersion"):
        assert_close(getattr(ours, name), getattr(theirs, name), 1e-5)
    expected = torch.stack(torch.autograd.grad(theirs.total, x))
    assert_close(torch.stack(torch.autograd.grad(ours.total, x)), expected, 1e-4)


@loop_over("blocks", [12, 7, 2])
def test_the_careful_loss_equals_the_published_one(blocks):
    x = features(blocks)
    theirs, careful = published_diversity_loss(x).total, vectorised_diversity_loss(x)
    assert_close(careful, theirs, 1e-5)
    gradients = [torch.stack(torch.autograd.grad(total, x)) for total in (careful, theirs)]
    assert_close(*gradients, 1e-4)


@loop_over("name", golden_names("diversity_"))
def test_equals_the_recorded_values_of_the_original(name):
    data = golden(name)
    theirs = published_diversity_loss(list(data.tensor("in/features")), start=data.meta["pairs"][0][0])
    for field, key in (("total", "diversity"), ("mutual_information", "mutual_information")):
        assert_close(getattr(theirs, field), data.tensor(f"out/{key}"), 1e-5)


def test_blocks_that_are_not_finite_are_passed_over():
    x = [value.detach() for value in features(5)]
    x[2][0, 0, 0] = float("nan")
    without = [value for index, value in enumerate(x) if index != 2]
    assert torch.equal(published_diversity_loss(x, max_pairs=6).total, published_diversity_loss(without).total)


@loop_over("scale", [0.0, 0.4, 4.0])
def test_the_published_weight_is_ours_undetached(scale):
    generator = torch.Generator().manual_seed(1)
    common = scale * torch.randn(2, 16, 160, generator=generator)
    x = [(common + torch.randn(2, 16, 160, generator=generator)).requires_grad_() for _ in range(6)]
    model = SimpleNamespace(depth=6)
    method = DiverseDiT(DiverseDiT.Config(detach_weight=False), model, None)
    taps = Taps((), {"diversedit": (method.collector(), method.blocks)})
    features = {block: taps(block, feature) for block, feature in enumerate(x)}
    (theirs,) = PublishedDiversity(model, None).terms(SimpleNamespace(features=features)).values()
    (careful,) = CarefulDiversity(model, None).terms(SimpleNamespace(features=features)).values()
    assert_close(careful.weight * careful.value, theirs.weight * theirs.value, 1e-4, extra=1e-9)
    (ours,) = method.terms(SimpleNamespace(taps=taps)).values()
    weights = [torch.as_tensor(term.weight).detach() for term in (ours, theirs)]
    assert_close(*weights, 1e-4)
    gradients = [torch.autograd.grad(term.weight * term.value, x, retain_graph=True) for term in (ours, theirs)]
    assert_close(torch.stack(gradients[0]), torch.stack(gradients[1]), 1e-4, extra=1e-9)
