"""Mean and variance of every row; ops that write rows return them for the next LayerNorm.

Both are of the row as it is stored, after rounding, and two rows' statistics join without their elements (Chan, Golub
and LeVeque 1983), so the long skip needs no pass over its inputs when their producers know them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import forward_ad

from dit_fast.errors import UserError
from dit_fast.ops._op import Op, require_tensor, rows, triton, wide
from dit_fast.ops._register import define


class RowStatistics(NamedTuple):
    """mean and population variance of rows [..., D]: both [...], float32, or float64 of float64 rows; no gradient."""

    mean: Tensor
    variance: Tensor


def _refuses(x: Tensor) -> Sequence[str]:
    from dit_fast.kernels import row_statistics as kernel

    return kernel.supports(x)


OP = Op("row_statistics", "x[..., D]", triton(_refuses))


def row_statistics(x: Tensor, backend: str = "auto") -> RowStatistics:
    """Statistics of the rows of x [..., D], floating point, taken in two passes in float32 (float64 for float64).

    They carry no gradient. Raises UserError for an x without a last dimension or not of floating point, ConfigError for
    an unknown backend or one that cannot take x.
    """
    given = OP.check(backend, x=x)
    flat = rows(x.detach().reshape(-1, x.shape[-1]))
    mean, variance = row_statistics_op(flat, OP.choose(backend, x.device, flat, given=given))
    return RowStatistics(mean.view(x.shape[:-1]), variance.view(x.shape[:-1]))


def statistics_by_kernel(x: Tensor) -> RowStatistics | None:
    """Those of x [..., D] where one launch takes them; else None."""
    given = OP.check("auto", x=x)
    return None if OP.choose("auto", x.device, x, given=given) == "torch" else row_statistics(x)


def _run(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from dit_fast.kernels import row_statistics as kernel

        return kernel.row_statistics(x)
    x = x.to(wide(x))
    first = x.mean(1)
    centred = x - first[:, None]
    # What the first mean lost to rounding, where it is much larger than the deviations.
    rest = centred.mean(1)
    return first + rest, centred.square_().mean(1) - rest.square()


def _fake(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:1], dtype=wide(x)), x.new_empty(x.shape[:1], dtype=wide(x))


row_statistics_op = define("row_statistics(Tensor x, str backend) -> (Tensor, Tensor)", _run, _fake)


def of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean and variance [M] of rows [M, D] inside another op's implementation."""
    return _run(x, OP.choose("auto", x.device, x))


def join(x: tuple[Tensor, Tensor], skip: tuple[Tensor, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """mean and 1 / sqrt(variance + eps) of two rows of one width side by side, from (mean, variance) of each."""
    (mean_x, variance_x), (mean_s, variance_s) = x, skip
    half_gap = (mean_x - mean_s) / 2
    variance = (variance_x + variance_s) / 2 + half_gap.square()
    return mean_s + half_gap, (variance + eps).rsqrt()


def known(op: str, name: str, stats: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """mean and variance [...] without gradient of what a caller gives as the statistics of x [..., D]; None for None.

    Raises UserError naming what is not as `row_statistics` would return it.
    """
    if stats is None:
        return None
    if not isinstance(stats, tuple) or len(stats) != 2:
        raise UserError(f"{op}: {name} must be what row_statistics returns, not {type(stats).__name__}")
    shape, dtype = x.shape[:-1], wide(x)
    first, second = stats
    if type(first) is type(second) is Tensor and not (first.requires_grad or second.requires_grad):
        alike = first.shape == second.shape == shape and first.dtype is second.dtype is dtype
        if alike and first.device == second.device == x.device and forward_ad._current_level < 0:
            return first, second  # as our own nodes hand them out; the rest takes longer than the node
    for field, value in zip(RowStatistics._fields, stats, strict=True):
        require_tensor(op, f"{name}.{field}", value)
        if value.shape != shape or value.dtype is not dtype or value.device != x.device:
            raise UserError(
                f"{op}: {name}.{field} must be {dtype} {list(shape)} on {x.device}, not {value.dtype} "
                f"{list(value.shape)} on {value.device}; take it from row_statistics"
            )
    return stats[0].detach(), stats[1].detach()
