"""Linear maps that read a weight's shadow or run by oneDNN, and products whose results are wider than their factors.

A parameter's shadow is its copy in autocast's dtype, `parameter.shadow`, which an engine keeps and the optimizer writes
with the parameter. A linear map then reads it where autocast would make that copy anew in every step: the same values.
`shadow.of_version` is the parameter's version that it is a copy of, so that whatever else writes the parameter (all but
through `.data`) makes the next reader renew it; compiled code does not look, and engines do before a step.
Gradients go to the parameter in its own dtype: on CUDA the product writes its sums so, unrounded; elsewhere they are
rounded to the dtype of the factors on the way, as autocast does.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from dit_fast.ops import onednn
from dit_fast.ops._op import Op, triton, wide
from dit_fast.ops._register import define
from dit_fast.ops.autocast import autocast_dtype

SUMS = Op("sum_of_rows", "x[M, N]", triton())
FEWEST_ROWS = 1024  # for a kernel of two launches
MOST_SUMS = 256  # parts whose partial sums are added by one launch: their addresses are among its arguments


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, from the shadows where there are some, on the CPU by oneDNN's where that pays."""
    dtype = autocast_dtype(x)
    shadow = shadow_of(weight, dtype)
    if shadow is None and dtype is None and x.dtype is weight.dtype and onednn.pays(x) and not transformed():
        shadow = weight.detach()
    if shadow is None:
        return F.linear(x, weight, bias)
    bias_shadow = None if bias is None else in_dtype(bias, shadow.dtype)
    if not torch.is_grad_enabled():
        return _linear(x, shadow, bias_shadow)
    return _Linear.apply(x.to(shadow.dtype), weight, bias, shadow, bias_shadow)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype is not weight.dtype or not onednn.pays(x):
        return F.linear(x, weight, bias)
    return onednn.linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


class PartialSums:
    """Of gradients of parts: their readers' backwards may leave them here, in the place of a gradient, and that of the
    product adds all of them in one launch (`kernels/adaln_gradients.py`)."""

    def __init__(self) -> None:
        self._task, self._left = -1, list[tuple[int, Tensor]]()

    def leave(self, first: int, partials: Tensor) -> None:
        """[N, chunks, parts, width] of parts from number `first` on, of the backward pass that runs."""
        if self._task != torch._C._current_graph_task_id():
            self._task, self._left = torch._C._current_graph_task_id(), []
        self._left.append((first, partials))

    def take(self) -> list[tuple[int, Tensor]]:
        left, self._left = self._left, []
        return left if self._task == torch._C._current_graph_task_id() else []


class Parts(tuple[Tensor, ...]):
    """Of one layer, and where partial sums of the first one's gradient may be left, with its number there."""

    home: tuple[PartialSums, int] | None = None


def linear_of_all(x: Tensor, layers: Sequence[Any], width: int) -> list[Parts] | None:
    """What each of these layers makes of x [N, D], cut into parts [N, width]; one product, and two for all gradients.

    None where the layers' shadows do not lie in one buffer, in this order, or are not what autocast would read.
    """
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    dtype = autocast_dtype(x)
    joined = _joined(weights, dtype)
    joined_bias = None if joined is None else _joined(biases, dtype)
    if joined is None or joined_bias is None:
        return None
    x, sums = x.to(joined.dtype), PartialSums()
    if grads := torch.is_grad_enabled():
        parts = _LinearOfAll.apply(x, joined, joined_bias, width, sums, *weights, *biases)
    else:
        parts = F.linear(x, joined, joined_bias).view(len(x), -1, width).unbind(1)
    made, end = [], 0
    for bias in biases:
        first, end = end, end + len(bias) // width
        made.append(each := Parts(parts[first:end]))
        if grads and end <= MOST_SUMS:
            each.home = sums, first
    return made


def shadow_of(parameter: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """The parameter's shadow where it is of that dtype and nothing but one derivative in reverse mode may be taken."""
    shadow = getattr(parameter, "shadow", None)
    if shadow is None or shadow.dtype is not dtype:
        return None
    if transformed():
        return None
    if not torch.compiler.is_compiling() and shadow.of_version != parameter._version:
        renew_shadows([parameter])
    return shadow


def renew_shadows(parameters: Iterable[Tensor]) -> None:
    """Writes the shadows of those that were written since theirs were, all in one pass."""
    stale = []
    for parameter in parameters:
        shadow = getattr(parameter, "shadow", None)
        if shadow is not None and shadow.of_version != parameter._version:
            stale.append((shadow, parameter))
    if stale:  # of one buffer, others may be saved for a backward: `.data` makes no new version
        torch._foreach_copy_([shadow.data for shadow, _ in stale], [parameter.detach() for _, parameter in stale])
        shadows_written(parameter for _, parameter in stale)


def shadows_written(parameters: Iterable[Tensor]) -> None:
    """To be called by whoever has written these parameters' shadows as well."""
    for parameter in parameters:
        shadow: Any = getattr(parameter, "shadow", None)
        if shadow is not None:
            shadow.of_version = parameter._version


def transformed() -> bool:
    """Whether another derivative than one in reverse mode may be taken of what is called here."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def in_dtype(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter in that dtype, without gradient: its shadow, itself or a copy."""
    shadow = shadow_of(parameter, dtype)
    return parameter.detach().to(dtype) if shadow is None else shadow


def _joined(parameters: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor | None:
    """The buffer that these parameters' shadows fill, in order."""
    if torch.compiler.is_compiling() or any(parameter is None for parameter in parameters):
        return None
    shadows = [shadow_of(parameter, dtype) for parameter in parameters]
    buffer, end = None if shadows[0] is None else shadows[0]._base, 0
    for shadow in shadows:
        if buffer is None or shadow is None or shadow._base is not buffer or shadow.storage_offset() != end:
            return None
        end += shadow.numel()
    return buffer if buffer is not None and buffer.numel() == end else None


def widens(x: Tensor) -> bool:
    """Whether a product of x can write its sums wider than its factors."""
    return x.is_cuda and not torch.is_grad_enabled()


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a [M, K] @ b [K, N] in `dtype`, which is theirs or float32."""
    if dtype is a.dtype:
        return torch.mm(a, b) if a.is_cuda else onednn.sum_of_products(a, b)
    return wide_product(a, b, dtype) if widens(a) else torch.mm(a, b).to(dtype)


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mm(a, b, out_dtype=dtype)


def sum_of_rows(x: Tensor, dtype: torch.dtype, chosen: str | None = None) -> Tensor:
    """The sum over the rows of x [M, N], in `dtype`."""
    return joined_sum([x], dtype, chosen)[1]


def joined_sum(parts: list[Tensor], dtype: torch.dtype, chosen: str | None = None) -> tuple[Tensor, Tensor]:
    """Parts [M, W] side by side and the sum over their rows, in `dtype`; on CUDA in one pass over them.

    chosen: the implementation, by who knows it and that nobody looks on.
    """
    x, run = parts[0], _joined_sum
    if chosen is None:
        chosen = "torch" if torch.is_grad_enabled() or transformed() else SUMS.choose("auto", x.device)
        run = joined_sum_op
    if chosen == "torch":
        joined = x if len(parts) == 1 else torch.cat(parts, 1)
        return joined, joined.sum(0, dtype=dtype) if dtype is x.dtype or widens(x) else joined.sum(0).to(dtype)
    joined, sums = run(parts, chosen)
    return x if len(parts) == 1 else joined, sums if sums.dtype is dtype else sums.to(dtype)


def _joined_sum(parts: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    """Of one part, nothing and its sum: a result may not be an argument."""
    x, one = parts[0], len(parts) == 1
    if backend == "triton" and x.shape[0] >= FEWEST_ROWS:
        from dit_fast.kernels import ordered_sum as kernel

        if kernel.takes(parts):
            joined, sums = kernel.sums_of(*parts)
            return x.new_empty(0) if one else joined, sums
    joined = x if one else torch.cat(parts, 1)
    return x.new_empty(0) if one else joined, joined.sum(0, dtype=wide(x))


def _joined_sum_fake(parts: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    x, width = parts[0], len(parts) * parts[0].shape[1]
    return x.new_empty((0,) if len(parts) == 1 else (len(x), width)), x.new_empty(width, dtype=wide(x))


joined_sum_op = define("joined_sum(Tensor[] parts, str backend) -> (Tensor, Tensor)", _joined_sum, _joined_sum_fake)


class _Linear(torch.autograd.Function):
    """(x, weight, bias, their shadows, or themselves again) -> the map of x by the shadows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shadow: Tensor, bias_shadow: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, shadow)
        return _linear(x, shadow, bias_shadow)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, shadow = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows, grad_x = grad.reshape(-1, grad.shape[-1]), None
        if needs_x and torch.is_grad_enabled():  # a second derivative reaches the weight
            grad_x = torch.mm(rows, weight.to(shadow.dtype)).view(x.shape)
        elif needs_x:
            grad_x = _linear(rows, shadow.t(), None).view(x.shape)
        grad_weight = product(rows.t(), x.reshape(-1, x.shape[-1]), weight.dtype) if needs_weight else None
        return grad_x, grad_weight, sum_of_rows(rows, weight.dtype) if needs_bias else None, None, None


class _LinearOfAll(torch.autograd.Function):
    """(x, joined shadows of weights and of biases, width, sums, weights, biases) -> parts of the map of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, joined: Tensor, joined_bias: Tensor, width: int, sums: PartialSums, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sums, ctx.shape = sums, (len(x), len(joined) // width, width)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, joined, *parameters[: len(parameters) // 2])
        return F.linear(x, joined, joined_bias).view(ctx.shape).unbind(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, joined, *weights = ctx.saved_tensors
        rows = _joined_gradients(grads, ctx.sums.take(), x, ctx.shape)
        if torch.is_grad_enabled():
            joined = torch.cat(weights).to(joined.dtype)  # as above
        dtype, sizes = weights[0].dtype, [len(weight) for weight in weights]
        grad_x = torch.mm(rows, joined) if ctx.needs_input_grad[0] else None
        of_weights = product(rows.t(), x, dtype).split(sizes)
        return grad_x, *(None,) * 4, *of_weights, *sum_of_rows(rows, dtype).split(sizes)


def _joined_gradients(
    grads: Sequence[Tensor | None], left: Sequence[tuple[int, Tensor]], x: Tensor, shape: tuple[int, int, int]
) -> Tensor:
    """[N, parts * width] of the gradients of parts and of partial sums."""
    if not left:
        zeros = x.new_zeros(shape[::2]) if any(grad is None for grad in grads) else None
        return torch.cat([zeros if grad is None else grad for grad in grads], 1)  # type: ignore[misc]
    from dit_fast.kernels import adaln as kernel

    rows = x.new_empty(shape)
    kernel.sum_all(left, rows)
    summed = {first + place for first, partials in left for place in range(partials.shape[2])}
    for place, grad in enumerate(grads):
        if place not in summed:
            rows[:, place] = 0 if grad is None else grad
        elif grad is not None:
            rows[:, place] += grad
    return rows.view(len(x), -1)
