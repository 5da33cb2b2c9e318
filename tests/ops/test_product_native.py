"""csrc/product_cpu.cpp against float64: every instruction set, any number of threads, when linear maps run by it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_fast import _C
from dit_fast.ops import onednn, product_cpp
from tests.helpers.cases import loop_over

pytestmark = pytest.mark.skipif(_C.unavailable() is not None, reason=str(_C.unavailable()))
native = torch.ops.dit_fast_native


def seeded(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def product(a, b, bias, level):
    c = torch.empty(len(a), b.shape[1])
    native.product(a, b, bias, c, level)
    return c


@loop_over("shape", [(1, 1, 16), (6, 5, 32), (53, 320, 48), (100, 321, 16), (97, 700, 160)])
@loop_over("transposed", [False, True])
@loop_over("biased", [False, True])
def test_values_on_every_level_and_the_same_bits_with_fused_multiply_add(shape, transposed, biased):
    rows, depth, columns = shape
    wide = seeded(rows, depth + 3)
    a, b, bias = wide[:, 2:-1], seeded(depth, columns), seeded(columns) if biased else None
    expected = a.double() @ b.double() + (bias.double() if biased else 0)
    b = b.t().contiguous().t() if transposed else b
    found = [product(a, b, bias, level) for level in range(native.isa_level() + 1)]
    for each in found:
        assert (each - expected).norm() <= 1e-6 * expected.norm()
    assert all(torch.equal(found[1], other) for other in found[2:])


def test_the_bits_depend_on_neither_threads_nor_rows_beside(monkeypatch):
    before, a, b = torch.get_num_threads(), seeded(211, 400), seeded(400, 96)
    try:
        torch.set_num_threads(1)
        alone = product(a, b, None, -1)
        torch.set_num_threads(3)
        assert torch.equal(product(a, b, None, -1), alone)
        assert torch.equal(product(a[7:20], b, None, -1), alone[7:20])
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused_by_name():
    a, b = seeded(4, 8), seeded(8, 16)
    for odd, words in (
        ((a.double(), b, None), "a must be a float32|a must be float32"),
        ((a.t(), b[:4], None), "a must have contiguous rows"),
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
