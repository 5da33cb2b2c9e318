r"""Long skip y = Linear(LayerNorm([x, s])) without the joined tensor, its normalised copy, or a gradient of width 2D.

Source: DiverseDiT (arXiv 2603.04239) Sec. 3.1, Eq. 8; the algebra is derived here.

Forward. For z = [x, s] with row mean m and reciprocal deviation r over 2D, and the linear map (W, b) after the affine
(gamma, beta), fold once per step

    W' = round(gamma W),   u = W' 1 (row sums of the ROUNDED W'),   b' = b + W beta,
    y = r (x W'_1^T + s W'_2^T - m u^T) + b':

two products into one accumulator, and a rank-1 correction after them. The correction cancels m W' 1 exactly only if u
is made of the numbers that were multiplied; with u of the unrounded weights the error grows with m / sigma. x and s are
exact in 16 bits, so there is one rounding fewer than in normalise, round, multiply.

That holds if both are stored in the type that is multiplied. Rounding a float32 x as it is would leave an error
relative to |x|, not to its deviation: with m = 100 sigma a hundred times too much, and float16 could overflow. Then
round((z - m) r), which is what autocast rounds, is made in a pass over the rows (long_skip_rows.py), and the library
multiplies it, without correction.

Backward, given g = dL/dy, with zhat = (z - m) r:

    dz = r (g W' - c2 - zhat c1),   c2 = sum_j (g W')_j / 2D = g . u / 2D,
    c1 = sum_j zhat_j (g W')_j / 2D = g . (W' zhat) / 2D = g . (y - b') / 2D.

c1 and c2 are sums over rows of [M, D] tensors, so they are known before the product g W' begins, and its epilogue can
finish the gradient: it reads the tile of x or s, writes dx or ds, and leaves round(zhat), which it has at hand, for the
library product P. `prepare_backward` makes c1, c2 and the sum of g over rows, and in the same pass rounds a wider g,
that of an fp32 result, to what is multiplied.

    P = g^T zhat,   dW = P diag(gamma) + (sum g) beta^T,   dgamma = colsum(W P),   dbeta = W^T sum g,

the last three in one read of P and W, and one write of dW over P, by `backward_parameters`.
"""

import math

import torch
from torch import Tensor

from dit_fast.kernels import unavailable as unavailable
from dit_fast.kernels.long_skip_backward import backward_input as backward_input
from dit_fast.kernels.long_skip_backward import backward_parameters as backward_parameters
from dit_fast.kernels.long_skip_backward import prepare_backward as prepare_backward
from dit_fast.kernels.long_skip_forward import fold as fold
from dit_fast.kernels.long_skip_forward import forward as forward

_ROWS = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 8192  # the backward keeps a row of the gradient and of the output in registers
MAX_ROWS = 2**31 - 256  # a bulk copy has int32 coordinates


def supports(x: Tensor, skip: Tensor, dtype: torch.dtype) -> list[str]:
    """Why x, skip [..., D] cannot go through the kernels with products in dtype; empty if they can, as
    rows [M, D] that start at multiples of 16 bytes. Looks at no address or stride: a traced graph knows none."""
    reasons, count = [], math.prod(x.shape[:-1])
    if dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"the products are in {dtype}, not bfloat16 or float16")
    if x.shape[-1] % 16 or x.shape[-1] == 0:  # other rows would be written element by element, by too many registers
        reasons.append(f"width {x.shape[-1]} is not a multiple of 16")
    if x.shape[-1] > MAX_WIDTH:
        reasons.append(f"width {x.shape[-1]} is more than {MAX_WIDTH}")
    if count > MAX_ROWS:
        reasons.append(f"{count} rows are more than {MAX_ROWS}")
    for name, rows in (("x", x), ("skip", skip)):
        if rows.dtype not in _ROWS:
            reasons.append(f"{name} is {rows.dtype}, not float32, bfloat16 or float16")
    return reasons
