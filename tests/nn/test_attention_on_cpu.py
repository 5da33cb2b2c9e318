"""Which attention "auto" is on the CPU, and that it is as right there as torch's."""

import torch
from torch.nn import functional as F

from dit_fast.nn import attention
from tests.helpers.cases import loop_over


@loop_over(
    ("dtype", "length", "plain"),
    [(torch.bfloat16, 64, True), (torch.bfloat16, 1025, False), (torch.float32, 64, False)],
)
def test_plain_products_where_the_table_says_so(dtype, length, plain, monkeypatch):
    called = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: called.append(1) or v)
    attention.Attention(8, 2).to(dtype)(torch.randn(1, length, 8, dtype=dtype))
    assert called == ([] if plain else [1])


def test_in_bfloat16_their_error_is_that_of_rounding():
    """Against float64: within three times of torch's, which keeps logits in fp32."""
    query, key, value, grad = (torch.randn(2, 3, 256, 64).bfloat16().requires_grad_() for _ in range(4))
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected = F.scaled_dot_product_attention(*wide)
    exact = [expected, *torch.autograd.grad(expected, wide, grad.double())]
    errors = []
    for run in (attention._plain_attention, F.scaled_dot_product_attention):
        y = run(query, key, value)
        found = [y, *torch.autograd.grad(y, (query, key, value), grad)]
        errors.append([(x - same).norm() / same.norm() for x, same in zip(found, exact, strict=True)])
    assert all(plain < 3 * fused for plain, fused in zip(*errors, strict=True))
