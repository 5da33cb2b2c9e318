"""HASTE: its two losses, and as a method."""

import pytest
import torch

from dit_fast.errors import UserError
from dit_fast.methods import haste
from dit_fast.methods.repa import repa_loss
from dit_fast.nn.attention import Heads
from tests.helpers.cases import loop_over
from tests.helpers.golden import assert_close, golden, golden_names

GOLDEN = golden_names("haste_")


def test_golden_files_are_there():
    assert GOLDEN


@pytest.mark.parametrize("name", GOLDEN)
def test_published_attention_and_feature_losses(name):
    case = golden(name)
    given = {side: [case.tensor(f"in/{side}_{part}") for part in "qk"] for side in ("student", "teacher")}
    query, prediction = given["student"][0].requires_grad_(), case.tensor("in/prediction").requires_grad_()
    logits = {side: [case.meta["scale"] * q @ k.mT for q, k in zip(*each, strict=True)] for side, each in given.items()}
    attention = haste.attention_loss(logits["student"], logits["teacher"], heads=case.meta["heads_used"])
    projection = repa_loss(prediction, case.tensor("in/z"))
    assert_close(attention, case.tensor("out/attention"), 2e-5)
    assert_close(projection, case.tensor("out/projection"), 2e-5)
    (case.meta["attn_coeff"] * attention + case.meta["proj_coeff"] * projection).backward()
    assert_close(query.grad, case.tensor("grad/student_q"), 2e-4)
    assert_close(prediction.grad, case.tensor("grad/prediction"), 2e-4)
    stop = case.meta["stop_step"]
    assert [haste.active(step, stop) for step in (0, stop - 1, stop, stop + 1)] == [True, True, False, False]


def heads(count, seed, layers=2, tokens=5, width=4):
    generator = torch.Generator().manual_seed(seed)
    make = lambda: torch.randn(2, count, tokens, width, generator=generator, dtype=torch.float64)  # noqa: E731
    return [Heads(make(), make()) for _ in range(layers)]


def test_layer_by_layer_from_queries_and_keys_it_is_the_same_loss_and_gradient():
    student, teacher = heads(3, 0), heads(2, 1)
    leaves = [leaf.requires_grad_() for layer in student for leaf in layer]
    whole = haste.attention_loss([q @ k.mT / 2 for q, k in student], [q @ k.mT / 2 for q, k in teacher])
    parts = haste.heads_loss(student, teacher)
    assert_close(parts, whole, 1e-14)
    for ours, theirs in zip(torch.autograd.grad(parts, leaves), torch.autograd.grad(whole, leaves), strict=True):
        assert_close(ours, theirs, 1e-12)


def test_no_more_than_one_layers_logits_is_kept_for_the_backward_pass():
    student, teacher = heads(2, 0, tokens=64), heads(2, 1, tokens=64)
    kept = []
    for layer in student:
        layer.query.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        haste.heads_loss(student, teacher)
    assert max(kept, default=0) < 2 * 2 * 64 * 64


@loop_over(
    ("student", "teacher", "heads", "message"),
    [
        ((3, 5), (3, 5), 4, "heads=4: the student has 3 heads and the teacher 3; at most 3"),
        ((3, 5), (2, 5), 3, "at most 2 can be compared"),
        ((3, 5), (3, 5), 0, "heads=0"),
        ((3, 5), (3, 6), None, r"alike but for H, not \[2, 3, 5, 5\]"),
    ],
)
def test_logits_that_cannot_be_compared(student, teacher, heads, message):
    ours, theirs = (torch.zeros(2, count, tokens, tokens) for count, tokens in (student, teacher))
    with pytest.raises(UserError, match=message):
        haste.attention_loss([ours], [theirs], heads=heads)


def test_layers_are_paired():
    with pytest.raises(UserError, match="at least one: not 0 with 0"):
        haste.attention_loss([], [])
    with pytest.raises(UserError, match="not 1 with 2"):
        haste.attention_loss([torch.zeros(1, 1, 2, 2)], [torch.zeros(1, 1, 2, 2)] * 2)
