"""Launches of the long skip's kernels and of the row statistics; tests/ops/launches.py runs this."""

import torch

from dit_fast.kernels import long_skip, long_skip_rows, row_statistics

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

for width, dtype in ((768, BF16), (1024, FP16), (1152, BF16), (1152, FP32), (2304, BF16), (4608, BF16)):
    for rows in (1, 48):  # 1 is the value that Triton likes to compile in
        row_statistics.row_statistics(torch.zeros(rows, width, dtype=dtype))

wide = torch.zeros(1000, 1152)  # an fp32 stream: the result is written so, and its gradient comes so
plans = [(64, 1, FP16, FP16), (1024, 48, FP16, FP16), (768, 1000, BF16, BF16), (1152, 1000, FP32, BF16)]
for width, rows, x_dtype, dtype in plans:
    parts = [torch.ones(2 * width), torch.zeros(2 * width), torch.zeros(width, 2 * width), torch.zeros(width)]
    x, skip = torch.zeros(rows, width, dtype=x_dtype), torch.zeros(rows, width, dtype=dtype)
    mean, rstd = torch.zeros(rows), torch.ones(rows)
    folded, *sums = long_skip.fold(*parts, dtype)
    y = long_skip.forward(x.to(dtype), skip, mean, rstd, folded, *sums, dtype)
    long_skip.backward_parameters(torch.zeros(width, 2 * width), *parts[3:], *parts[:3])
    if width > 64:  # which is here for the tiles of few rows, and is no width of a model
        long_skip.prepare_backward(y, y, *sums, dtype)
        long_skip_rows.finish(torch.zeros(rows, 2 * width, dtype=dtype), x, x.clone(), mean, rstd)
        long_skip_rows.normalise(x, x.clone(), mean, rstd, dtype)
    for needs in ((True, False), (False, True), (True, True)):
        for unit in (True, False):
            long_skip.backward_input(y, x, skip, mean, rstd, folded, mean, mean, needs, unit)
    if width == 1152:
        long_skip.forward(x.to(dtype), skip, mean, rstd, folded, *sums, FP32)
        long_skip.prepare_backward(wide, wide, *sums, dtype)
