"""Launches of the GELU backward kernels; tests/ops/launches.py runs this."""

import torch

from dit_fast.kernels import gelu

for width, dtype in ((3072, torch.bfloat16), (4096, torch.float16), (4608, torch.float32)):
    for rows in (80, 1):  # 1 is the value that Triton likes to compile in
        gelu.backward(torch.zeros(rows, width, dtype=dtype), torch.zeros(rows, width, dtype=dtype), True)
hidden = torch.zeros(80, 4608, dtype=torch.bfloat16)
gelu.backward(hidden, hidden, False)
for inner, width, dtype in ((768, 3072, torch.bfloat16), (1024, 4096, torch.float16), (1152, 4608, torch.bfloat16)):
    for rows in (80, 1):
        hidden, grad = (torch.zeros(rows, size, dtype=dtype) for size in (width, inner))
        gelu.product(hidden, grad, torch.zeros(inner, width, dtype=dtype), True)
gelu.product(hidden, grad, torch.zeros(inner, width, dtype=dtype), False)
