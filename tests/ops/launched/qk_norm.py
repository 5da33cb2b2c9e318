"""Launches of the QK-norm kernels; tests/ops/launches.py runs this."""

import torch

from dit_fast.kernels import qk_norm

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
AFFINE, RMS, NONE = ("layer", True, True), ("rms", True, False), ("none", False, False)  # norm, weights, biases


def launch(heads, width, dtype, form, rotary, batch=2, tokens=16, needs=(True, True)):
    norm, weights, biases = form
    parameters = [torch.zeros(width) if here else None for here in (weights, biases) * 2]
    tables = [torch.zeros(tokens, width) if rotary else None] * 2
    qkv = torch.zeros(batch, tokens, 3 * heads * width, dtype=dtype)
    qk_norm.forward(qkv, heads, *parameters, *tables, 1e-5, norm)
    grads = [torch.zeros(batch, heads, tokens, width, dtype=dtype).transpose(1, 2)] * 3
    needs = (needs[0], needs[1] and weights)
    qk_norm.backward(*grads, qkv, parameters[0], parameters[2], *tables, 1e-5, norm, biases, *needs)


for sizes in ((2, 16), (1, 1)):  # 1 is the value that Triton likes to compile in
    for heads, width, dtype in ((12, 64, BF16), (16, 64, FP16), (16, 72, BF16), (16, 72, FP32)):
        launch(heads, width, dtype, AFFINE, False, *sizes)
    for dtype in (BF16, FP32):
        launch(16, 72, dtype, AFFINE, True, *sizes)
        launch(16, 72, dtype, RMS, True, *sizes)
    launch(16, 72, BF16, RMS, False, *sizes)
    launch(16, 72, BF16, NONE, True, *sizes)
for needs in ((True, False), (False, True)):
    launch(16, 72, BF16, AFFINE, False, needs=needs)
