"""Launches of the adaLN kernels; tests/ops/launches.py runs this."""

import torch

from dit_fast.kernels import adaln

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FUSED, NORM, RESIDUAL = (True, True), (False, True), (True, False)  # residual, norm


def launch(batch, tokens, width, stream, branch, residual, norm, known=False, rms=False, shifted=True, passes=False):
    x, y = torch.zeros(batch, tokens, width, dtype=stream), torch.zeros(batch, tokens, width, dtype=branch)
    gate, shift, scale = torch.zeros(batch, 6 * width, dtype=branch).chunk(6, dim=1)[:3]
    statistics = [torch.zeros(batch, tokens)] * 2
    y, gate = (y, gate) if residual else (None, None)
    shift, scale, grad_out = (shift, scale, torch.zeros_like(x, dtype=branch)) if norm else (None, None, None)
    shift = shift if shifted else None
    adaln.forward(x, y, gate, shift, scale, 1e-6, rms, statistics if known else None, branch, True)
    above = x if residual or passes else None
    adaln.backward(above, grad_out, x, y, gate, scale, *statistics, 1e-6, rms, shifted, stream, branch, [branch] * 3)


for sizes in ((2, 256), (1, 1)):  # 1 is the value that Triton likes to compile in
    launch(*sizes, 768, BF16, BF16, *FUSED)
    launch(*sizes, 1024, FP16, FP16, *FUSED)
    launch(*sizes, 1152, BF16, BF16, *FUSED)
    launch(*sizes, 1152, FP32, BF16, *FUSED)
    launch(*sizes, 1152, FP32, FP32, *FUSED)
    launch(*sizes, 1152, FP32, BF16, *NORM, known=True)
    launch(*sizes, 1152, FP32, BF16, *NORM)
    launch(*sizes, 1152, FP32, BF16, *NORM, passes=True)
    launch(*sizes, 1152, FP32, BF16, *RESIDUAL)
    launch(*sizes, 1152, FP32, BF16, *FUSED, rms=True)
    launch(*sizes, 1152, FP32, BF16, *NORM, rms=True, shifted=False)

firsts = [first + 6 * block for block in range(28) for first in (0, 2, 5)]
partials = [torch.zeros(2, 8, parts, 1152) for parts in (2, 3, 1) * 28]
adaln.sum_all([*zip(firsts, partials, strict=True)], torch.zeros(2, 170, 1152, dtype=BF16))
