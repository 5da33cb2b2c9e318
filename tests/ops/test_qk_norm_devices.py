"""QK-norm on every device at hand, with heads that 128-bit accesses divide and heads that they do not."""

import pytest

from dit_fast import ops
from tests.helpers.devices import STREAM, TOLERANCE, check_no_wait, check_values_and_gradients

N, T, WIDTH = STREAM
CASES = {
    f"{heads} heads of {width}": (
        lambda qkv, *parameters, heads=heads: ops.qk_norm(qkv, heads, *parameters),
        [(N, T, 3 * heads * width), *[(width,)] * 4],
    )
    for heads, width in ((4, WIDTH // 12), (3, 64), (2, 72), (1, 256))
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_values_and_gradients(name, dtype, device):
    check_values_and_gradients(*CASES[name], dtype, device)


def test_no_wait_for_the_device(device):
    check_no_wait(*CASES["3 heads of 64"], device)
