"""Launches of REPA's cosine kernels; tests/ops/launches.py runs this."""

import torch

from dit_fast.kernels import repa_cosine

for width, types in ((768, (torch.bfloat16, torch.float32)), (1024, (torch.float32, torch.float32))):
    for tokens in (1, 48):  # 1 is the value that Triton likes to compile in
        prediction, target = (torch.zeros(tokens, width, dtype=dtype) for dtype in types)
        _, saved = repa_cosine.forward(prediction, target)
        for needs in ((True, False), (True, True)):
            repa_cosine.backward(torch.ones(()), prediction, target, saved, needs)
