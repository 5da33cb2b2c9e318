"""Launches of the GELU backward kernels; tests/ops/launches.py runs this."""

import torch

from dit_fast.kernels import gelu

for width, dtype in ((3072, torch.bfloat16), (4096, torch.float16), (4608, torch.float32)):
    for rows in (80, 1):  # 1 is the value that Triton likes to compile in
        gelu.backward(torch.zeros(rows, width, dtype=dtype), torch.zeros(rows, width, dtype=dtype), True)
hidden = torch.zeros(80, 4608, dtype=torch.bfloat16)
gelu.backward(hidden, hidden, False)
