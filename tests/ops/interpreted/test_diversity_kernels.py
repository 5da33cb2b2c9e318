"""Diversity kernels against float64 on equally rounded inputs: odd sizes, three types, strides, floors, masks."""

import pytest
import torch

from dit_fast.errors import UserError
from dit_fast.kernels import diversity
from dit_fast.ops import DiversityTaps, diversity_loss
from dit_fast.ops.diversity_op import backward_op, forward_op

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LIMITS = {FP32: 1e-6, FP16: 1e-3, BF16: 6e-3}  # relative RMS error of a gradient, which is rounded to its type
CASES = {  # tokens, width, types of the blocks
    "fp32": (37, 96, [FP32] * 3),
    "bf16": (37, 200, [BF16] * 5),
    "fp16": (19, 96, [FP16] * 12),
    "types differ": (21, 200, [FP32, BF16, FP16, BF16]),
    "two chunks, one token over": (257, 40, [BF16] * 2),
    "one block": (9, 33, [FP32]),
    "real width, 32 rows": (5, 1152, [BF16] * 17),
}


def error(ours, exact):
    exact = exact.double()
    return ((ours.double() - exact).norm() / exact.norm()).item()


def make(tokens, width, types, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(width, generator=generator)
    features = [(torch.randn(tokens, width, generator=generator) + shift).to(dtype) for dtype in types]
    for x in features:
        x[1::3, ::5] = 0  # where the slope of the absolute value is zero
    return features


def exact_statistics(features):
    x = torch.stack([feature.double() for feature in features])
    norms = torch.linalg.vector_norm(x, dim=-1).clamp_min(1e-8)
    directions = (x / norms[..., None]).flatten(1)
    return torch.stack([x.sum(1), x.abs().sum(1), x.square().sum(1)]), directions @ directions.T, 1 / norms


def exact_cosines(features):
    x = torch.stack([feature.double() for feature in features], 1)
    directions = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-8)
    return directions @ directions.mT


def exact_gradients(features, grad_statistics, grad_pairs):
    wide = [feature.double().requires_grad_() for feature in features]
    statistics, pairs, _ = exact_statistics(wide)
    ((statistics * grad_statistics).sum() + (pairs * grad_pairs).sum()).backward()
    return [x.grad for x in wide]


def make_gradients(features, seed=1):
    generator = torch.Generator().manual_seed(seed)
    blocks, width = len(features), features[0].shape[1]
    pairs = 10 * torch.randn(blocks, blocks, generator=generator)
    return torch.randn(3, blocks, width, generator=generator), pairs


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "types differ", "one block", "real width, 32 rows"])
def test_gradients(name):
    features = make(*CASES[name])
    grads = make_gradients(features)
    ours = diversity.backward(features, *diversity.forward(features)[2:], *grads, range(len(features)))
    for k, exact in enumerate(exact_gradients(features, *grads)):
        assert ours[k].dtype == features[k].dtype
        assert ours[k].is_contiguous()
        assert error(ours[k], exact) < LIMITS[features[k].dtype]
        if features[k].dtype != FP32:  # rounded once
            assert error(ours[k], exact) <= 1.02 * error(exact.to(features[k].dtype), exact) + 1e-6


def test_gradients_of_the_pairs_alone_are_rounded_once():
    """Beside those of the statistics they are too small to be seen."""
    features = make(19, 96, [BF16] * 5)
    grads = (torch.zeros(3, 5, 96), make_gradients(features)[1])
    made = diversity.backward(features, *diversity.forward(features)[2:], *grads, range(5))
    for ours, exact in zip(made, exact_gradients(features, *grads), strict=True):
        assert error(ours, exact) <= 1.02 * error(exact.to(BF16), exact)


def test_any_strides_and_addresses():
    # Blocks inside one buffer, at an odd offset, with an odd row stride: no 128-bit access is possible.
    buffer = torch.randn(23, 4 * 51 + 1)
    features = [buffer[:, 1 + 51 * k : 1 + 51 * k + 48] for k in range(4)]
    features[1] = features[1][::2].repeat_interleave(2, 0)[:23]
    features[2] = features[2][:1].expand(23, 48)
    *made, cosines = diversity.forward(features)
    for ours, exact in zip(made, exact_statistics(features), strict=True):
        assert error(ours, exact) < 1e-6
    grads = make_gradients(features)
    strided = [grad.transpose(0, 1).contiguous().transpose(0, 1) for grad in grads]
    ours = diversity.backward(features, made[2], cosines, *strided, [0, 1, 2, 3])
    for each, exact in zip(ours, exact_gradients(features, *grads), strict=True):
        assert error(each, exact) < 1e-6


def test_gradients_of_padded_features_are_not_aligned(monkeypatch):
    answers, decide = [], diversity.is_aligned
    monkeypatch.setattr(diversity, "is_aligned", lambda tensors: answers.append(decide(tensors)) or answers[-1])
    features = [torch.randn(6, 20)[:, :18] for _ in range(2)]
    diversity.backward(features, *diversity.forward(features)[2:], *make_gradients(features), [0, 1])
    assert answers == [True, False]


def test_some_blocks_and_a_subset_of_pairs():
    features = make(18, 64, [BF16] * 6)
    grad_statistics, pairs = make_gradients(features)
    anchored = torch.zeros_like(pairs)
    anchored[1, 3:5] = pairs[1, 3:5]
    exact = exact_gradients(features, grad_statistics, anchored)
    # Blocks that no pair joins with a wanted one are not even read.
    features[0] = torch.full_like(features[0], torch.nan)
    features[5] = features[0]
    kept = diversity.forward(features)[2:]
    for wanted in ([4], [3, 4], [4, 1]):
        made = diversity.backward(features, *kept, grad_statistics, anchored, wanted)
        for k, ours in zip(wanted, made, strict=True):
            assert error(ours, exact[k]) < LIMITS[BF16]


@pytest.mark.usefixtures("approximate_division")
def test_tokens_below_the_norm_floor():
    features = make(20, 32, [FP32] * 3)
    features[0][4] = 0
    features[1][7] *= 7e-9 / features[1][7].norm()  # close to the floor: far below it, a projection would not show
    _, pairs, inverse_norms, cosines = diversity.forward(features)
    assert inverse_norms[0, 4] == inverse_norms[1, 7] == 1e8
    assert error(pairs, exact_statistics(features)[1]) < 1e-6
    grads = make_gradients(features)
    exact = exact_gradients(features, *grads)
    for wanted in ([0, 1, 2], [1]):
        made = diversity.backward(features, inverse_norms, cosines, *grads, wanted)
        for k, ours in zip(wanted, made, strict=True):
            torch.testing.assert_close(ours.double(), exact[k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_features_show(bad):
    features = make(10, 32, [FP32] * 2)
    features[1][3, 5] = bad
    statistics, pairs, *_ = diversity.forward(features)
    assert not statistics[:, 1, 5].isfinite().any()
    assert pairs[0, 0].isfinite()
    assert pairs[0, 1].isnan()


def test_configuration_does_not_enter_the_result(monkeypatch):
    features = make(37, 96, [BF16] * 3)
    grads = make_gradients(features)
    results = []
    for config in (None, diversity.Config(4, 2, 8, 2, 32)):
        if config:
            monkeypatch.setitem(diversity.CONFIGS, 80, {(16, "bf16"): config})
        forward = diversity.forward(features)
        results.append([*forward, *diversity.backward(features, *forward[2:], *grads, [0, 1, 2])])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_supports_names_what_it_refuses():
    assert diversity.supports(make(4, 32, [BF16, FP32])) == []
    refused = diversity.supports([torch.zeros(4, 5000, dtype=torch.float64)] * 33)
    assert [reason.split()[0] for reason in refused] == ["33", "width", "torch.float64"]
    assert "contiguous" in diversity.supports([torch.zeros(8, 8).T])[0]
    assert diversity.supports([torch.zeros(1, 8).expand(64 * 65535, 8)]) == []
    assert "4194241 tokens" in diversity.supports([torch.zeros(1, 8).expand(64 * 65535 + 1, 8)])[0]


@pytest.mark.parametrize("name", CASES)
def test_statistics(name):
    features = make(*CASES[name])
    expected = (*exact_statistics(features), exact_cosines(features))
    # A token's own cosines keep what the sums over tokens average out.
    for ours, exact, limit in zip(diversity.forward(features), expected, (1e-6, 1e-6, 1e-6, 2e-6), strict=True):
        assert ours.dtype == FP32
        assert ours.shape == exact.shape
        assert error(ours, exact) < limit


@pytest.mark.parametrize("types", [[FP32] * 5, [BF16, FP32] * 3])
def test_taps_end_to_end(types):
    """Of blocks that no gate wrote, against the reference in float64."""
    features = [x.view(3, 7, 40).requires_grad_() for x in make(21, 40, types)]
    above = [x.view(3, 7, 40) for x in make(21, 40, types, seed=5)]
    taps = DiversityTaps("triton")
    outputs = [taps.tap(x) for x in features]
    total = taps.loss("all").total
    value = 1000 * total + sum((x.float() * y.float()).sum() for x, y in zip(outputs, above, strict=True))
    ours = torch.autograd.grad(value, features)
    wide = [x.detach().double().requires_grad_() for x in features]
    exact_total = diversity_loss(wide, "all", backend="torch").total
    exact_value = 1000 * exact_total + sum((x * y.double()).sum() for x, y in zip(wide, above, strict=True))
    assert abs(total.item() - exact_total.item()) < 1e-6
    for grad, exact in zip(ours, torch.autograd.grad(exact_value, wide), strict=True):
        assert error(grad, exact) < (5 * LIMITS[FP32] if grad.dtype == FP32 else LIMITS[grad.dtype])


def test_opcheck():
    features = make(9, 33, [FP32, BF16])
    torch.library.opcheck(forward_op.registered, (features, False, "triton"))
    given = (features, *forward_op(features, False, "triton")[2:], *make_gradients(features))
    torch.library.opcheck(backward_op.registered, (*given, [], [1], "triton"))
    with pytest.raises(UserError, match="adds nothing"):
        backward_op(*given, features[:1], [1], "triton")
