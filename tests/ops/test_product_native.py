"""csrc/product_cpu.cpp against float64: every instruction set, any number of threads, when products run by it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_fast import _C
from dit_fast.ops import linear, onednn, product_cpp
from tests.helpers.cases import loop_over

pytestmark = pytest.mark.skipif(_C.unavailable() is not None, reason=str(_C.unavailable()))
native = torch.ops.dit_fast_native


def seeded(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def product(a, b, bias, level):
    c = torch.full((len(a) + 100, b.shape[1]), torch.nan)
    native.product(a, b, bias, c[: len(a)], level)
    assert c[len(a) :].isnan().all(), "rows past the last"
    return c[: len(a)]


@loop_over("shape", [(1, 1, 16), (6, 5, 32), (53, 320, 48), (100, 321, 16), (97, 700, 160), (205, 640, 32)])
@loop_over("layout", ["rows", "columns"])
@loop_over("transposed", [False, True])
@loop_over("biased", [False, True])
def test_values_on_every_level_and_the_same_bits_with_fused_multiply_add(shape, layout, transposed, biased):
    rows, depth, columns = shape
    a = seeded(rows, depth + 3)[:, 2:-1] if layout == "rows" else seeded(depth, rows + 3)[:, 2:-1].t()
    b = seeded(columns, depth + 5)[:, 3:-2].t() if transposed else seeded(depth, columns + 5)[:, 3:-2]
    bias = seeded(columns) if biased else None
    expected = a.double() @ b.double() + (bias.double() if biased else 0)
    found = [product(a, b, bias, level) for level in range(native.isa_level() + 1)]
    for each in found:
        assert (each - expected).norm() <= 1e-6 * expected.norm()
    assert all(torch.equal(found[1], other) for other in found[2:])


def test_the_bits_depend_on_neither_threads_nor_rows_beside_nor_layouts():
    before, a, b = torch.get_num_threads(), seeded(211, 700), seeded(700, 96)
    try:
        torch.set_num_threads(1)
        alone = product(a, b, None, -1)
        torch.set_num_threads(3)
        by_columns = a.t().contiguous().t()
        for first, second in ((a, b), (by_columns, b), (a, b.t().contiguous().t())):
            assert torch.equal(product(first, second, None, -1), alone)
        assert torch.equal(product(a[7:20], b, None, -1), alone[7:20])
        assert torch.equal(product(by_columns[7:20], b, None, -1), alone[7:20])
    finally:
        torch.set_num_threads(before)


def test_errors_do_not_grow_with_thousands_of_rows():
    a, b = torch.rand(2, 100_000, generator=torch.Generator().manual_seed(0)), torch.ones(100_000, 16)
    exact = a.double() @ b.double()
    for each in (a, a.t().contiguous().t()):
        assert ((product(each, b, None, -1) - exact) / exact).abs().max() < 2e-6


def test_what_does_not_fit_is_refused_by_name():
    a, b = seeded(4, 8), seeded(8, 16)
    for odd, words in (
        ((a.double(), b, None), "a must be a float32|a must be float32"),
        ((a[:, ::2], b[:4], None), "a must have contiguous rows or columns"),
        ((a[:, :0], b[:0], None), "b must be"),
        ((a, seeded(8, 15), None), "b must be"),
        ((a, seeded(9, 16), None), "b must be"),
        ((a, b, seeded(15)), "bias has 15 elements"),
    ):
        with pytest.raises(RuntimeError, match=words):
            native.product(*odd, torch.empty(len(odd[0]), odd[1].shape[1]), -1)


@pytest.mark.skipif(not onednn._has(torch.float32), reason="torch without oneDNN")
def test_linear_maps_run_by_it_where_it_pays(monkeypatch):
    x, weight, bias = seeded(300, 24), seeded(48, 24), seeded(48)
    by_onednn = {}
    for pays in (False, True):
        monkeypatch.setattr(product_cpp, "_pays", lambda pays=pays: pays)
        with FlopCounterMode(display=False) as counter:
            y = onednn.linear(x, weight, bias)
            onednn.linear(x[:, :23], weight[:33, :23], None)  # 33 are no multiple of 16: always by oneDNN
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
        counts = counter.get_flop_counts()["Global"]
        by_onednn[pays] = counts[torch.ops.mkldnn._linear_pointwise], counter.get_total_flops()
    first, second = 2 * 300 * 24 * 48, 2 * 300 * 23 * 33
    assert by_onednn == {False: (first + second, first + second), True: (second, first + second)}


def test_gradients_of_weights_run_by_it_where_it_pays(monkeypatch):
    monkeypatch.setattr(product_cpp, "_pays", lambda: True)
    grad, x = seeded(300, 33), seeded(300, 48)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        found = linear.product(grad.t(), x, torch.float32)
        few = linear.product(grad[:200].t(), x[:200], torch.float32)
        odd = linear.product(x.t(), grad, torch.float32)  # 33 are no multiple of 16
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.dit_fast.product] == 2 * 300 * 33 * 48
    assert counts[torch.ops.aten.mm] == 2 * 500 * 33 * 48
    for each, expected in ((found, grad.t() @ x), (few, grad[:200].t() @ x[:200]), (odd, x.t() @ grad)):
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-4)
    grad.requires_grad_()
    linear.product(grad.t(), x, torch.float32).sum().backward()  # a second derivative
    torch.testing.assert_close(grad.grad, x.sum(1, keepdim=True).expand(300, 33))
