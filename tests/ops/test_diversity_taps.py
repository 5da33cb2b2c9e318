"""Taps: same values and gradients as the plain loss, one fused gradient per block, and nothing left behind."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_fast.errors import UserError
from dit_fast.ops import DiversityTaps, diversity_loss
from dit_fast.ops.diversity_descent import through_mixture
from tests.helpers.golden import assert_close

SHAPE = (2, 40, 12)  # larger than any statistic or table of six blocks
SIZE = 2 * 40 * 12
ANCHOR = [(1, j) for j in range(2, 6)]


class Chain(torch.nn.Module):
    """Blocks in a row, as a transformer has them: each output feeds the next block and the loss."""

    def __init__(self, depth=6, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(SHAPE[2], SHAPE[2], dtype=dtype) for _ in range(depth))

    def forward(self, x, taps=None, checkpoint=False):
        outputs = []
        for layer in self.layers:
            block = lambda x, layer=layer: x + layer(x).tanh()  # noqa: E731
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if checkpoint else block(x)
            x = x if taps is None else taps.tap(x)
            outputs.append(x)
        return x, outputs


def data(dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(chain, pairs, variant, tapped, checkpoint=False):
    taps = DiversityTaps() if tapped else None
    x, outputs = chain(data(next(chain.parameters()).dtype), taps, checkpoint)
    loss = taps.loss(pairs, variant) if tapped else diversity_loss(outputs, pairs, variant)
    chain.zero_grad()
    (x.square().mean() + 3 * loss.total).backward()
    return loss.total.detach(), torch.cat([p.grad.flatten() for p in chain.parameters()])


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", ["release", "paper"])
@pytest.mark.parametrize("pairs", ["all", ANCHOR, [(0, 3)]])
def test_values_and_gradients_of_a_model_equal_those_of_the_plain_loss(pairs, variant, dtype, checkpoint):
    """Through the mixture ("all", ANCHOR) and without; under activation checkpointing with the taps outside."""
    chain = Chain(dtype=dtype)
    value, ours = gradients(chain, pairs, variant, tapped=True, checkpoint=checkpoint)
    expected_value, expected = gradients(chain, pairs, variant, tapped=False)
    tol = 1e-5 if dtype == torch.float32 else 1e-12
    assert_close(value, expected_value, tol)
    assert_close(ours, expected, tol)


def test_cosines_of_both_signs_go_through_the_mixture_exactly():
    features = [s * data(torch.float64) + 0.3 * torch.randn(SHAPE, dtype=torch.float64) for s in (1, 1, -1, 1, -1, 1)]
    features = [x.requires_grad_() for x in features]
    taps = DiversityTaps()
    for x in features:
        taps.tap(x)
    ours = torch.autograd.grad(taps.loss().mutual_information, features)
    expected = torch.autograd.grad(diversity_loss(features, backend="torch").mutual_information, features)
    for grad, reference in zip(ours, expected, strict=True):
        assert_close(grad, reference, 1e-12)


def test_all_pairs_of_one_sign_need_the_own_row_and_the_mixture_only():
    """Two weights other than zero in each block's row, whatever the number of blocks; one more per odd sign."""
    rows = [torch.randn(4, 3) for _ in range(6)]
    gradient = torch.full((6, 6), 0.1).triu(1)
    gradient[1, 4] = -0.1
    sources, norms, statistics, per_block = through_mixture(
        rows, torch.rand(6, 4), sum(rows), torch.randn(3, 6, 3), gradient
    )
    assert len(sources) == norms.shape[0] == statistics.shape[1] == 7
    used = [int((pairs + pairs.T)[k].count_nonzero()) for k, pairs in enumerate(per_block)]
    assert used == [2, 3, 2, 2, 3, 2]


class FeatureSized(TorchDispatchMode):
    """Names of the operators that hand out a new tensor of at least the features' size, with how many each."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)}
        for x in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(x) and x.numel() >= SIZE and x.untyped_storage().data_ptr() not in known:
                name = func.overloadpacket.__name__
                self.seen[name] = self.seen.get(name, 0) + 1
        return result


def backward_operators(kind):
    chain = Chain()
    taps = DiversityTaps("auto") if kind == "taps" else None
    x, outputs = chain(data(), taps)
    value = x.square().mean()
    if kind == "taps":
        value = value + taps.loss().total
    if kind == "loss":
        value = value + diversity_loss(outputs).total
    with FeatureSized() as mode:
        value.backward()
    return mode.seen


def test_no_feature_gradient_of_its_own_is_allocated():
    """Beside what the model's own backward makes, taps make one fused gradient per block, and add none up."""
    alone, tapped, plain = (backward_operators(kind) for kind in ("none", "taps", "loss"))
    assert tapped.pop("diversity_backward") == 6
    assert tapped == alone
    # The plain loss: six gradients too, but beside those from above, to which autograd then adds them.
    assert plain.pop("diversity_backward") == 6
    assert plain == {**alone, "add": alone["add"] + 6}


def test_the_features_are_read_in_one_forward_and_kept_as_they_are():
    x = [data() + k for k in range(5)]
    taps = DiversityTaps()
    outputs = [taps.tap(feature.requires_grad_()) for feature in x]
    assert all(same.data_ptr() == feature.data_ptr() for same, feature in zip(outputs, x, strict=True))
    assert taps.stats() is taps.stats()


def test_backward_twice_and_backward_without_the_loss():
    features = [(data() + k).requires_grad_() for k in range(5)]
    taps = DiversityTaps()
    outputs = [taps.tap(x) for x in features]
    total = taps.loss().total
    above = sum(x.sum() for x in outputs)
    first = torch.autograd.grad(total, features, retain_graph=True)
    both = torch.autograd.grad(total + above, features, retain_graph=True)
    alone = torch.autograd.grad(above, features, retain_graph=True)
    again = torch.autograd.grad(total, features)
    for one, two, three, four in zip(first, both, alone, again, strict=True):
        assert torch.equal(one, four)
        assert_close(two, one + 1, 1e-6)
        assert torch.equal(three, torch.ones_like(three))


def test_some_features_without_a_gradient():
    features = [(data() + k).requires_grad_(k != 2) for k in range(5)]
    taps = DiversityTaps()
    for x in features:
        taps.tap(x)
    wanted = [x for x in features if x.requires_grad]
    ours = torch.autograd.grad(taps.loss().total, wanted)
    expected = torch.autograd.grad(diversity_loss(features).total, wanted)
    for grad, reference in zip(ours, expected, strict=True):
        assert_close(grad, reference, 1e-5)


def test_without_gradients_nothing_is_kept():
    taps = DiversityTaps()
    with torch.no_grad():
        features = [taps.tap(data() + k) for k in range(5)]
        total = taps.loss().total
    assert not total.requires_grad
    watched = weakref.ref(features[0])
    del features
    gc.collect()
    assert watched() is None


def test_features_are_freed_with_the_graph():
    features = [(data() + k).requires_grad_() * 1 for k in range(5)]
    taps = DiversityTaps()
    outputs = [taps.tap(x) for x in features]
    value = taps.loss().total + outputs[-1].sum()
    gc.collect()
    gc.disable()
    try:
        watched = [weakref.ref(feature) for feature in features]
        value.backward()
        del features, outputs, value, taps
        assert [ref() for ref in watched] == [None] * 5
    finally:
        gc.enable()


def test_a_feature_changed_in_place_is_noticed():
    features = [(data() + k).requires_grad_() for k in range(5)]
    taps = DiversityTaps()
    outputs = [taps.tap(x) for x in features]
    total = taps.loss().total
    with torch.no_grad():
        outputs[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_misuse_is_named():
    taps = DiversityTaps()
    with pytest.raises(UserError, match="features is empty"):
        taps.stats()
    taps.tap(data())
    with pytest.raises(UserError, match="variant 'code'"):
        taps.loss(variant="code")
    assert taps.loss().total == 0
    with pytest.raises(UserError, match="new DiversityTaps"):
        taps.tap(data())
    uneven = DiversityTaps()
    uneven.tap(data())
    uneven.tap(data()[:, :4])
    with pytest.raises(UserError, match=r"features\[1\] must be \[N, T, D\] = \[2, 40, 12\], not \[2, 4, 12\]"):
        uneven.loss()
