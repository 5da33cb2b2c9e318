"""Activation checkpointing beside every method and objective: not a bit of loss or gradient moves."""

import pytest
import torch

from dit_fast.models.recompute import recomputed
from tests.train.zero_patterns import FIELDS, REALS, build


def micro_batch():
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(4, 2, 12, 4, 4, generator=generator)
    batch = {"moments": moments, "label": torch.arange(4) % 3, "position": torch.arange(4)}
    moments[:, 1].abs_().mul_(0.1)
    return batch | {name: torch.randn(4, *shape, generator=generator) for name, shape in FIELDS.items()}


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_bit_of_a_method_moves(name, precision):
    found = []
    for which in ("none", "selective", "full"):
        loss, _ = build(name, precision)
        loss.model.activation_checkpointing = which
        value, _ = loss(micro_batch(), 0)
        value.backward()
        found.append([value.detach(), *(p.grad for p in loss.model.parameters() if p.grad is not None)])
    assert len(found[0]) > 20
    for others in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], others, strict=True))


def test_products_and_attention_run_once_and_all_else_twice():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            counts[str(op)] = counts.get(str(op), 0) + 1
            return op(*args, **(kwargs or {}))

    def part(x):
        x = torch.nn.functional.gelu(x @ weight)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x).exp()

    weight = torch.randn(8, 8, requires_grad=True)
    for which, products, others in (("none", 1, 1), ("selective", 1, 2), ("full", 2, 2)):
        counts = {}
        with Count():
            recomputed(which, part, torch.randn(1, 1, 4, 8)).sum().backward()
        assert counts["aten._scaled_dot_product_flash_attention_for_cpu.default"] == products
        assert counts["aten.gelu.default"] == others
