"""Launches of the kernels of taps; tests/ops/launches.py runs this."""

import torch

from dit_fast.kernels import diversity_taps

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
for blocks, types, gated, given, mix in (
    (12, (BF16,), True, True, True),
    (24, (FP16,), True, True, False),
    (28, (FP32,), True, True, True),
    (28, (FP32,), True, True, False),
    (28, (FP32,), False, True, False),
    (28, (BF16,), True, True, False),
    (28, (BF16, FP32), False, True, True),
):
    width = {12: 768, 24: 1024, 28: 1152}[blocks]
    features = [torch.zeros(2, 48, width, dtype=types[k % len(types)]) for k in range(blocks)]
    flat = [x.flatten(0, 1) for x in features]
    shared = diversity_taps.partners(flat, torch.zeros(blocks, blocks), mix)
    branch = BF16 if types[0] is FP32 else types[0]
    y, gate = (torch.zeros(2, 48, width, dtype=branch), torch.zeros(2, width, dtype=branch)) if gated else (None, None)
    mixture = torch.zeros(96, width) if mix else None
    known = (torch.ones(blocks, 96), torch.zeros(3, blocks, width), mixture, tuple(x.dtype for x in flat))
    for k in (0, 1):  # 1 is the value that Triton likes to compile in
        x = features[2 * k]
        diversity_taps.backward(x, x if given else None, y, gate, k, shared, *known)
