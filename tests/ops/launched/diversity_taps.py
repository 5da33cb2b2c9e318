"""Launches of the kernels of taps; tests/ops/launches.py runs this."""

import torch

from dit_fast.kernels import diversity_taps

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
for width, own, branch in ((768, BF16, BF16), (1024, FP16, FP16), (1152, BF16, BF16), (1152, FP32, BF16)):
    x, y = torch.zeros(2, 48, width, dtype=own), torch.zeros(2, 48, width, dtype=branch)
    diversity_taps.backward(x, x, y, y[:, 0])
