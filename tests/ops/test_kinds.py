"""Calls of a kind are those whose tensors nothing of torch can tell apart but their values."""

import pytest
import torch

from dit_fast.ops import _kinds
from dit_fast.ops._kinds import Kinds

OTHERS = {
    "a shape": lambda x: x[:2].clone(),
    "strides": lambda x: x.t().contiguous().t(),
    "a dtype": lambda x: x.double(),
    "a device": lambda x: x.to("meta"),
    "a gradient": lambda x: x.clone().requires_grad_(),
    "a class": lambda x: torch.nn.Parameter(x.clone(), requires_grad=False),
    "a sign still to be changed": torch._neg_view,
    "inference": lambda x: torch.inference_mode()(torch.clone)(x),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("place", [0, 1])
def test_tensors_are_of_another_kind_by(other, place):
    kinds, x, y = Kinds(), torch.randn(3, 4), torch.randn(3, 4)
    kinds.keep("key", (x, y), "these")
    assert kinds.find("key", (y, x)) == "these"
    given = [x, y]
    given[place] = OTHERS[other](x)
    assert kinds.find("key", given, "another") == "another"
    assert kinds.find("other key", (x, y)) is None


def test_the_last_kinds_of_a_key_are_kept_once_each(monkeypatch):
    monkeypatch.setattr(_kinds, "_KINDS", 3)
    kinds = Kinds()
    for found in ("first", "second"):
        for size in (1, 2, 3, 4):
            kinds.keep("key", (torch.randn(size),), found)
    assert kinds.items() == [("key", "second")] * 3
    assert kinds.find("key", (torch.randn(1),)) is None


def test_keys_that_change_all_the_time_fill_no_memory(monkeypatch):
    monkeypatch.setattr(_kinds, "REMEMBERED", 4)
    kinds = Kinds()
    for key in range(10):
        kinds.keep(key, (torch.randn(1),), key)
    assert len(kinds.items()) <= 4
    assert kinds.find(9, (torch.randn(1),)) == 9
