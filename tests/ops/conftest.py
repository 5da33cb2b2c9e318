"""`device`: the CPU, and CUDA where there is one."""

import pytest
import torch

absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=absent)])
def device(request):
    return torch.device(request.param)
