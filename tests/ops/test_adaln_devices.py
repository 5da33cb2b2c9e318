"""The adaLN family on every device at hand."""

import pytest

from dit_fast import ops
from tests.helpers.cases import loop_over
from tests.helpers.devices import STREAM, TOLERANCE, VECTOR, check_no_wait, check_values_and_gradients, several

CASES = {
    "layer_norm_modulate": (several(ops.layer_norm_modulate), [STREAM, VECTOR, VECTOR]),
    "gate_residual": (several(ops.gate_residual), [STREAM, STREAM, VECTOR]),
    "gate_residual_modulate": (several(ops.gate_residual_modulate), [STREAM, STREAM, VECTOR, VECTOR, VECTOR]),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_values_and_gradients(name, dtype, device):
    check_values_and_gradients(*CASES[name], dtype, device)


@loop_over("name", list(CASES))
def test_no_wait_for_the_device(name, device):
    check_no_wait(*CASES[name], device)
