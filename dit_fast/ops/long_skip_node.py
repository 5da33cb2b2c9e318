"""The long skip as one node of autograd's graph, as training runs it; the op is the definition (`long_skip.py`)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fast import backend
from dit_fast.ops import long_skip_rows
from dit_fast.ops._kinds import Kinds
from dit_fast.ops._register import lies_plain
from dit_fast.ops.branches import dtype_alone, node
from dit_fast.ops.long_skip import OP
from dit_fast.ops.row_statistics import RowStatistics, known
from dit_fast.ops.traced import traced

_REFUSAL = "long_skip: no second derivative here; for one use dit_fast.backend.force('torch')"
_FUSES = Kinds()  # False, or what stands for the signature among `traced`'s facts


def fuses(
    x: Tensor, skip: Tensor, parameters: tuple[Tensor, Tensor, Tensor, Tensor], eps: float,
    x_stats: RowStatistics | None, skip_stats: RowStatistics | None, out_dtype: torch.dtype | None,
) -> Tensor | None:  # fmt: skip
    """`long_skip` by "triton" with known statistics and with weights that are kept folded; None: by the op, which runs
    otherwise, and where `plan` says so."""
    folded: Any = getattr(parameters[2], "folded", None)
    if folded is None or x_stats is None or skip_stats is None or (dtype := dtype_alone(x)) is None:
        return None
    if (x.data_ptr() | skip.data_ptr()) % 16:
        return None
    key, tensors = (backend.forced(), dtype, out_dtype, eps), (x, skip, *parameters)
    takes = _FUSES.find(key, tensors)
    if takes is None:
        takes = _FUSES.keep(key, tensors, _is_taken(x, skip, parameters, eps) and object())
    folds = folded.read(parameters, dtype, "triton") if takes else (None,)
    if folds[0] is None:
        return None
    given: Any = known("long_skip", "x_stats", x_stats, x), known("long_skip", "skip_stats", skip_stats, skip)
    moments = [part for pair in given for part in pair]
    return _fuses(x, skip, *parameters, moments, folds, takes, eps, dtype, out_dtype or dtype)


def _is_taken(x: Tensor, skip: Tensor, parameters: Sequence[Tensor], eps: float) -> bool:
    if not all(each.requires_grad and lies_plain(each) for each in (x, skip, *parameters)):
        return False
    named = zip(("norm_weight", "norm_bias", "weight", "bias"), parameters, strict=True)
    OP.check("auto", eps, x=x, skip=skip, **dict(named))
    takes = OP.choose("auto", x.device, x, skip, *parameters) == "triton" and x.numel() > 0
    return takes and x.is_contiguous() and skip.is_contiguous()


class _Fuses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, skip: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor,
        moments: Sequence[Tensor], folds: Sequence[Tensor], *facts: Any,
    ) -> Tensor:  # fmt: skip
        given = (x, skip, norm_weight, norm_bias, weight, bias)
        out, y, mean, rstd = traced(_fuse, facts, *given, *folds, *moments)
        ctx.facts = facts
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, mean, rstd, *given, *folds)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 12
        return *traced(_fuse_back, ctx.facts, *ctx.saved_tensors, grad), *(None,) * 6


def _fuse(_: Any, eps: float, dtype: torch.dtype, out_dtype: torch.dtype, *given: Any) -> tuple[Tensor, ...]:
    (x, skip, *parameters), folds, moments = given[:6], given[6:9], given[9:]
    halves, stats = [half.view(-1, x.shape[-1]) for half in (x, skip)], [part.reshape(-1) for part in moments]
    made = long_skip_rows.forward(*halves, *parameters, *stats, *folds, eps, dtype, out_dtype, "triton")  # type: ignore[call-arg]
    return made[0].view(x.shape), *made


def _fuse_back(_: Any, eps: float, dtype: torch.dtype, out_dtype: torch.dtype, *given: Any) -> tuple[Tensor, ...]:
    (y, mean, rstd, x, skip, *parameters), grad = given[:9], given[-1]
    grad_rows, *halves = [each.reshape(-1, x.shape[-1]) for each in (grad, x, skip)]
    of_all: Any = (*halves, *parameters, *given[9:-1], dtype, (True,) * 6, "triton")
    made = long_skip_rows.backward(grad_rows, y, mean, rstd, *of_all)
    return made[0].view(x.shape), made[1].view(x.shape), *made[2:]


_fuses = node(_Fuses, _REFUSAL)
