"""Launches of the QK-norm kernels; tests/ops/launches.py runs this."""

import torch

from dit_fast.kernels import qk_norm

for heads, width, dtype in (
    (12, 64, torch.bfloat16),
    (16, 64, torch.float16),
    (16, 72, torch.bfloat16),
    (16, 72, torch.float32),
):
    for batch, tokens in ((2, 16), (1, 1)):  # 1 is the value that Triton likes to compile in
        qkv, parameters = torch.zeros(batch, tokens, 3 * heads * width, dtype=dtype), [torch.zeros(width)] * 4
        qk_norm.forward(qkv, heads, *parameters, 1e-5)
        grads = [torch.zeros(batch, heads, tokens, width, dtype=dtype).transpose(1, 2)] * 3
        qk_norm.backward(*grads, qkv, parameters[0], parameters[2], 1e-5, True, True)
qkv = torch.zeros(2, 16, 3 * 16 * 72, dtype=torch.bfloat16)
grads = [qkv.unflatten(-1, (3, 16, 72))[:, :, 0]] * 3
for needs in ((True, False), (False, True)):
    qk_norm.backward(*grads, qkv, torch.zeros(72), torch.zeros(72), 1e-5, *needs)
