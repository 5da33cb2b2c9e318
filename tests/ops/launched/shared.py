"""Launches of the counter-based generator; tests/ops/launches.py runs this."""

import torch

from dit_fast.kernels import philox

for kind in ("words", "uniform", "normal"):
    philox.numbers(kind, 2**64 - 1, torch.arange(4), 1, 4096)
