"""The analytic gradient of the diversity loss's terms against autograd's of the formula, in float64."""

import pytest
import torch

from dit_fast.ops import diversity, diversity_loss
from dit_fast.ops.diversity_terms import formula, fused

NAMES = 4


def make(blocks=4, width=9):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(blocks, 12, width, generator=generator, dtype=torch.float64) + 0.4
    unit = (x / x.norm(dim=-1, keepdim=True)).flatten(1)
    weights = torch.triu(torch.rand(blocks, blocks, generator=generator, dtype=torch.float64), 1)
    weights[0] = 0
    members = torch.ones(blocks, dtype=torch.float64)
    members[0] = 0
    statistics = torch.stack([x.sum(1), x.abs().sum(1), x.square().sum(1)])
    return statistics, unit @ unit.T, weights, members, torch.tensor(12.0, dtype=torch.float64)


@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)], ids=str)
def test_gradients_are_those_of_the_formula(wanted, release):
    statistics, pair_sums, *constants = make()
    statistics[:, :, 2] = 0  # a channel that nothing uses
    sides = []
    for function, options in ((fused, ("torch",)), (formula, ())):
        leaves = [statistics.clone().requires_grad_(), pair_sums.clone().requires_grad_()]
        terms = function(*leaves, *constants, release, *options)
        loss = sum((place + 1) * terms[place] for place in wanted)
        sides.append((loss, *torch.autograd.grad(loss, leaves, materialize_grads=True)))
    for ours, expected in zip(*sides, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_constants_are_sent_once(monkeypatch):
    """The same tables at every step, and a graph that reads them keeps them."""
    features = [torch.randn(2, 5, 8) for _ in range(3)]
    monkeypatch.setattr(diversity, "_sent", type(diversity._sent)())
    made = []
    table = diversity._table
    monkeypatch.setattr(diversity, "_table", lambda *given: made.append(given) or table(*given))
    for _ in range(3):
        diversity_loss(features)
    assert len(made) == 1
    diversity_loss(features, pairs=[(0, 2)])
    diversity_loss([x[:1] for x in features])
    assert len(made) == 3
    for place in range(diversity.SENT + 3):
        diversity_loss([torch.randn(1, 1 + place, 8) for _ in range(3)])
    assert len(diversity._sent) == diversity.SENT
