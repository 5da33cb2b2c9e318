"""Launches of the diversity kernels; tests/ops/launches.py runs this."""

import torch

from dit_fast.kernels import diversity

for blocks, width, types in ((12, 768, (torch.bfloat16,)), (28, 1152, (torch.float32, torch.bfloat16))):
    features = [torch.zeros(48, width, dtype=types[k % len(types)]) for k in range(blocks)]
    diversity.forward(features)
    grads = (torch.zeros(3, blocks, width), torch.zeros(blocks, blocks))
    kept = torch.ones(blocks, 48), torch.ones(48, blocks, blocks)
    diversity.backward(features, *kept, *grads, range(blocks))
