"""The MLP on every device at hand, with what the library's epilogue computes there."""

import pytest
import torch

from dit_fast import ops
from tests.helpers.cases import loop_over
from tests.helpers.devices import STREAM, TOLERANCE, check_no_wait, check_values_and_gradients, make
from tests.helpers.golden import assert_close

WIDTH = STREAM[-1]
SHAPES = [STREAM, (2 * WIDTH, WIDTH), (2 * WIDTH,), (WIDTH, 2 * WIDTH), (WIDTH,)]


def mlp(backend):
    return lambda *inputs: (ops.gelu_mlp(*inputs, backend=backend),)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("backend", ["auto", "recompute"])
def test_values_and_gradients(backend, dtype, device):
    check_values_and_gradients(mlp(backend), SHAPES, dtype, device)


@loop_over("dtype", list(TOLERANCE))
def test_values_without_gradients(dtype, device):
    """CUDA runs the GELU in the epilogue there; the erf form would differ by 1e-4 and more in fp32."""
    inputs = [x.to(device) for x in make(SHAPES, dtype)]
    expected = ops.gelu_mlp(*(x.double() for x in inputs), backend="torch").cpu()
    with torch.no_grad():
        assert_close(ops.gelu_mlp(*inputs, backend="recompute").cpu(), expected, TOLERANCE[dtype][0])
        assert_close(ops.gelu_mlp(*inputs).cpu(), expected, TOLERANCE[dtype][0])


def test_no_wait_for_the_device(device):
    check_no_wait(mlp("auto"), SHAPES, device)
