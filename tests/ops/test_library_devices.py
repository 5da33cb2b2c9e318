"""opcheck of every registered op on the device, by the implementation that runs there."""

import pytest
import torch

from tests.helpers.op_cases import REGISTERED

ELSEWHERE = {"torch", "gemm", "recompute", "cpp"}


def moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    return "triton" if device.type == "cuda" and value in ELSEWHERE else value


@pytest.mark.parametrize("name", REGISTERED)
@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")
def test_opcheck(name, device):
    if device.type == "cpu":
        pytest.skip("test_library.py checks it there")
    op = getattr(torch.ops.dit_fast, name).default
    if all(argument.name != "backend" for argument in op._schema.arguments):
        pytest.skip("C++ for the CPU is its one implementation")
    torch.library.opcheck(op, moved(REGISTERED[name](), device))
