"""A fixture that hides the GPUs from the tests of the file that imports it, and from the processes that they start: for
several ranks, which one GPU does not hold, and for what is equal to a bit, or written at once, on a CPU alone.
"""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def no_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield
