"""Launches of the flow-matching kernels; tests/ops/launches.py runs this."""

import torch

from dit_fast.kernels import flow

for samples, path in ((1, "linear"), (3, "cosine")):  # 1 is the value that Triton likes to compile in
    draw = (torch.rand(samples), torch.arange(samples), 2**64 - 1, 4, path)
    latents, prediction = torch.zeros(samples, 4096), torch.zeros(samples, 4096, dtype=torch.bfloat16)
    flow.noised(latents, *draw)
    flow.error(prediction, latents, *draw)
    flow.backward(torch.ones(()).expand(samples), prediction, latents, *draw, (True, False))
flow.backward(torch.ones(3), prediction, latents, *draw, (True, True))
