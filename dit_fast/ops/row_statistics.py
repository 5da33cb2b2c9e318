"""Mean and variance of every row; ops that write rows return them for the next LayerNorm.

Both are of the row as it is stored, after rounding, and two rows' statistics join without their elements (Chan, Golub
and LeVeque 1983), so the long skip needs no pass over its inputs when their producers know them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dit_fast import kernels
from dit_fast.backend import Implementation, choose, register
from dit_fast.errors import UserError
from dit_fast.ops import _library
from dit_fast.ops._arguments import require_settings, require_tensors

register("row_statistics", Implementation("triton", kernels.devices(), kernels.unavailable))


class RowStatistics(NamedTuple):
    """mean and population variance of rows [..., D]: both [...], float32, or float64 of float64 rows; no gradient."""

    mean: Tensor
    variance: Tensor


def row_statistics(x: Tensor, backend: str = "auto") -> RowStatistics:
    """Statistics of the rows of x [..., D], floating point, taken in two passes in float32 (float64 for float64).

    They carry no gradient. Raises UserError for an x without a last dimension or not of floating point, ConfigError for
    an unknown backend or one that cannot take x.
    """
    require_tensors("row_statistics", x=x)
    require_settings("row_statistics", backend)
    if x.dim() == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise UserError(f"row_statistics: x must be floating point [..., D], not {x.dtype} {tuple(x.shape)}")
    mean, variance = op(x.detach().reshape(-1, x.shape[-1]), backend)
    return RowStatistics(mean.view(x.shape[:-1]), variance.view(x.shape[:-1]))


def supports(x: Tensor) -> list[str]:
    """Reasons why the Triton kernel cannot take these rows [M, D]; empty if it can."""
    from dit_fast.kernels import row_statistics as kernel

    return kernel.supports(x)


def of_rows(x: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """mean and variance [M] of rows [M, D]; what the op runs, for other ops' implementations."""
    x = _rows(x)
    if choose("row_statistics", backend, x.device.type, lambda name: supports(x)) == "triton":
        from dit_fast.kernels import row_statistics as kernel

        return kernel.row_statistics(x)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    first = x.mean(1)
    centred = x - first[:, None]
    # What the first mean lost to rounding, where it is much larger than the deviations.
    rest = centred.mean(1)
    return first + rest, centred.square_().mean(1) - rest.square()


def join(x: tuple[Tensor, Tensor], skip: tuple[Tensor, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """mean and 1 / sqrt(variance + eps) of two rows of one width side by side, from (mean, variance) of each."""
    (mean_x, variance_x), (mean_s, variance_s) = x, skip
    half_gap = (mean_x - mean_s) / 2
    variance = (variance_x + variance_s) / 2 + half_gap.square()
    return mean_s + half_gap, (variance + eps).rsqrt()


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _fake(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[:1], dtype=wide), x.new_empty(x.shape[:1], dtype=wide)


op = _library.define("row_statistics(Tensor x, str backend) -> (Tensor, Tensor)", of_rows, _fake)
