"""The long skip on every device at hand."""

import functools

import pytest

from dit_fast import ops
from tests.helpers.cases import loop_over
from tests.helpers.devices import STREAM, TOLERANCE, D, check_no_wait, check_values_and_gradients, several

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
