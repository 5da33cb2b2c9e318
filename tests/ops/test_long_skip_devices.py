"""The long skip on every device at hand."""

import functools

import pytest
import torch

from dit_fast import ops
from tests.helpers.cases import loop_over
from tests.helpers.devices import STREAM, TOLERANCE, D, check_no_wait, check_values_and_gradients, several
from tests.helpers.golden import assert_close

SHAPES = [STREAM, STREAM, (2 * D,), (2 * D,), (D, 2 * D), (D,)]
CASES = {
    "long_skip": (several(ops.long_skip), SHAPES),
    "long_skip, gemm": (several(functools.partial(ops.long_skip, backend="gemm")), SHAPES),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_values_and_gradients(name, dtype, device):
    check_values_and_gradients(*CASES[name], dtype, device)


@loop_over("name", list(CASES))
def test_no_wait_for_the_device(name, device):
    check_no_wait(*CASES[name], device)


@pytest.mark.parametrize("width", [160, 1152])
@pytest.mark.parametrize(
    ("stream", "stored", "out"),
    [("float32", "bfloat16", "float32"), ("float32", "bfloat16", None), ("float32", "float32", None),
     ("bfloat16", "bfloat16", "float32"), ("bfloat16", "bfloat16", None)],
)  # fmt: skip
def test_the_streams_of_a_model_under_autocast(stream, stored, out, width, device):
    """The widths of SiT-Nano and XL, with tiles that end in the middle; what takes turns gives the same bits."""
    rows = 1000 if device.type == "cuda" else 40
    generator = torch.Generator().manual_seed(7)
    shapes = [(rows, width)] * 2 + [(2 * width,)] * 2 + [(width, 2 * width), (width,)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs[4] /= width**0.5
    types = [getattr(torch, stream), getattr(torch, stored), *[torch.float32] * 4]
    inputs = [x.to(dtype) for x, dtype in zip(inputs, types, strict=True)]
    upstream = torch.randn(rows, width, generator=generator).bfloat16()

    def run(given, **options):
        leaves = [x.clone().requires_grad_() for x in given]
        y = ops.long_skip(*leaves, **options)
        return [y, *torch.autograd.grad(y, leaves, upstream.to(y.device, y.dtype))]

    exact = run([x.double() for x in inputs], backend="torch")
    there = [x.to(device) for x in inputs]
    with torch.autocast(device.type, torch.bfloat16):
        first, *again = (run(there, out_dtype=out and getattr(torch, out)) for _ in range(4))
    for ours, theirs, tolerance in zip(first, exact, [8e-3, *[1.2e-2] * 6], strict=True):
        assert_close(ours.cpu(), theirs, tolerance)
    assert all(torch.equal(x, y) for other in again for x, y in zip(first, other, strict=True))
