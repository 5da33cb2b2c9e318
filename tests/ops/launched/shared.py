"""Launches of the counter-based generator; tests/ops/launches.py runs this."""

import torch

from dit_fast.kernels import philox

STREAMS = [1, 2**31, 3, 4, 5, 6]
for draws in (1, 3, 6):
    kinds, counts = [True, False] * 3, [4096, 1] * 3
    philox.draws(torch.arange(4), 2**64 - 1, kinds[:draws], STREAMS[:draws], counts[:draws])
