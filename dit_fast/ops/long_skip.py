"""Long residual connection: the later stream and the stored one, normalised together and projected back to one width.

DiverseDiT (arXiv 2603.04239) Sec. 3.1, Eq. 8, with the details of the released code: concatenation order (x, skip),
affine LayerNorm over both, linear map with bias; the result replaces x. "torch" is the reference, plain autograd;
"gemm" and "triton" (long_skip_rows.py) have an analytic gradient for all six inputs and a forward-mode rule.

With z = [x, skip] in R^{M x 2D}, mean m and r = 1/sqrt(variance + eps) per row, zn = r (z - m), weight W, gamma, beta:

    W' = round(gamma * W), u = W' 1 (row sums of the rounded W'), b' = b + W beta          y = zn W'^T + b'

and for dY, with c1 = dY . (y - b') / 2D and c2 = dY . u / 2D per row (the means of zn dzn and dzn, without dzn):

    dz = r (dY W' - c2 - zn c1)       P = dY^T zn       dW = P diag(gamma) + db beta^T, db = sum of dY
    dgamma = column sums of W * P     dbeta = W^T db

Saved for the backward: the inputs, y, m and r. W', u and b' are made again from the parameters, so nothing of size D^2
is kept and engines that free parameters between the passes can. An engine that holds them gives the weight a `Folded`,
which keeps the three between the steps.
"""

from collections.abc import Iterable, Sequence
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dit_fast.backend import Implementation
from dit_fast.ops import long_skip_rows
from dit_fast.ops._op import Op, differentiable, spread, triton, wide
from dit_fast.ops._register import define
from dit_fast.ops.autocast import autocast_dtype, linear_dtype, without_autocast
from dit_fast.ops.layer_norm import layer_norm
from dit_fast.ops.linear import linear, transformed
from dit_fast.ops.row_statistics import RowStatistics, known


def _gemm_refuses(*tensors: Tensor) -> list[str]:
    mixed = len({tensor.dtype == torch.float64 for tensor in tensors}) > 1
    return ["float64 and other dtypes are mixed"] if mixed else []


def _triton_refuses(x: Tensor, skip: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, *_: Tensor) -> Any:
    from dit_fast.kernels import long_skip as kernel

    return kernel.supports(x, skip, linear_dtype(x, weight.dtype))


# On an H200 (sm_90, bf16), forward and backward of "triton" were faster than the reference and those of "gemm" slower,
# which since then has one kernel for each pass over the rows there (not measured). On the CPU, where the GEMMs are the
# same, "gemm" is slower too. It needs less memory than the reference, on request.
OP = Op(
    "long_skip",
    "x[..., D] skip[..., D] norm_weight[2D] norm_bias[2D] weight[D, 2D] bias[D]",
    triton(_triton_refuses, automatic=("cuda",)),
    Implementation("gemm", (), lambda: None, automatic=(), refuses=_gemm_refuses),
)


def long_skip(
    x: Tensor,
    skip: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    backend: str = "auto",
    x_stats: RowStatistics | None = None,
    skip_stats: RowStatistics | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear(layer_norm(concat(x, skip)))`.

    x, skip: [..., D], floating point, possibly of two dtypes (fp32 stream, half-precision skip or the reverse);
    norm_weight, norm_bias: [2D]; weight: [D, 2D]; bias: [D]. x_stats, skip_stats: what `row_statistics` says of x and
    of skip, where the caller knows it ("torch" ignores it); gradients are the same with and without.
    Statistics are taken in fp32 (fp64 for fp64 input). Returns [..., D] in out_dtype, by default that of the linear
    map: autocast's where autocast is on, else that of `weight`; "triton" writes its sums so, the others convert what
    the map gives. Every backend differentiates in forward mode and, once, in reverse mode, of the result or of its
    forward-mode derivative; "torch" twice in any combination of the modes. x, skip and the result must not be changed
    in place before the backward pass (autograd raises).
    Raises UserError for shapes, dtypes or devices that do not fit, ConfigError for a backend that is unknown or cannot
    take these tensors.
    """
    given = OP.check(
        backend, eps, x=x, skip=skip, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias
    )
    OP.check_dtype(out_dtype)
    stats = (known(OP.name, "x_stats", x_stats, x), known(OP.name, "skip_stats", skip_stats, skip))
    parameters = (norm_weight, norm_bias, weight, bias)
    chosen = OP.choose(backend, x.device, x, skip, *parameters, given=given)
    if chosen == "torch":
        y = _reference(x, skip, *parameters, eps)
        return y if out_dtype is None else y.to(out_dtype)
    pair = (x.reshape(-1, x.shape[-1]), skip.reshape(-1, x.shape[-1]))
    flat = [None if part is None else part.reshape(-1) for given in stats for part in given or (None, None)]
    dtype = linear_dtype(x, weight.dtype)
    kept: Folded | None = getattr(weight, "folded", None)
    folds = _NONE if kept is None else kept.read(parameters, dtype, chosen)
    return _fused(*pair, *parameters, *flat, *folds, eps, dtype, out_dtype or dtype, chosen)[0].view(x.shape)


_NONE = (None, None, None)


class Folded:
    """W', u and b' of one long skip, kept as its weight's `folded`, so that a step makes them once.

    The first reader makes them; the optimizer's step makes those that were read anew, where the parameters are
    (`refold`). Whatever else writes a parameter (all but through `.data`) makes the next reader do so.
    """

    def __init__(self, *parameters: Tensor):
        self.parameters = parameters
        self._form: tuple[torch.dtype, str] | None = None
        self._tensors: tuple[Tensor, ...] = ()
        self._versions: list[int] = []

    def read(
        self, parameters: tuple[Tensor, ...], dtype: torch.dtype, backend: str
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
        """The three in dtype, as `backend` makes them, or None for each where a call cannot have them: compiled, under
        another derivative than one in reverse mode, with other parameters or such as are no float32."""
        if torch.compiler.is_compiling() or transformed() or any(map(is_not, parameters, self.parameters)):
            return _NONE
        weight = parameters[2]
        if weight.dtype is not torch.float32:
            return _NONE
        if self._form != (dtype, backend):
            with torch.inference_mode(False):
                sums = (torch.empty_like(weight[:, 0]), torch.empty_like(weight[:, 0]))
                self._tensors = (torch.empty_like(weight, dtype=dtype, requires_grad=False), *sums)
            self._form, self._versions = (dtype, backend), []
        if self.is_stale:
            _fold_anew([self], backend)
        return self._tensors  # type: ignore[return-value]

    @property
    def is_stale(self) -> bool:
        """Whether it has been read, and a parameter written since."""
        return self._form is not None and self._versions != [each._version for each in self.parameters]


def refold(parameters: Iterable[Tensor]) -> None:
    """Makes what these weights keep folded anew where it is stale."""
    stale: dict[str, list[Folded]] = {}
    for parameter in parameters:
        kept: Folded | None = getattr(parameter, "folded", None)
        if kept is not None and kept._form is not None and kept.is_stale:
            stale.setdefault(kept._form[1], []).append(kept)
    for backend, every in stale.items():
        _fold_anew(every, backend)


@torch.no_grad()
def _fold_anew(every: Sequence[Folded], backend: str) -> None:
    fold_op([x for kept in every for x in kept._tensors], [x for kept in every for x in kept.parameters], backend)
    for kept in every:
        kept._versions = [each._version for each in kept.parameters]


def _reference(
    x: Tensor, skip: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """As released: the normalised value is rounded to the wider dtype of the two inputs before the map."""
    joined = torch.cat([x, skip], dim=-1)
    statistics = torch.promote_types(joined.dtype, torch.float32)
    affine = norm_weight.to(statistics), norm_bias.to(statistics)
    normalised = layer_norm(joined.to(statistics), eps, *affine).to(joined.dtype)
    if autocast_dtype(x) is None:
        normalised = normalised.to(weight.dtype)
    return linear(normalised, weight, bias)


def _fake_forward(
    x: Tensor, skip: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mean, rstd = (x.new_empty(x.shape[:1], dtype=wide(x, skip)) for _ in range(2))
    return x.new_empty(x.shape, dtype=rest[-2]), mean, rstd


def _fake_backward(
    grad: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, skip: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, weight: Tensor, bias: Tensor, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    inputs = (x, skip, norm_weight, norm_bias, weight, bias)
    return [tensor.new_empty(tensor.shape) for tensor, needed in zip(inputs, rest[-2], strict=True) if needed]


_FOLDS = "Tensor? folded, Tensor? row_sums, Tensor? folded_bias"
forward_op = define(
    "long_skip_forward(Tensor x, Tensor skip, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, "
    f"Tensor? x_mean, Tensor? x_variance, Tensor? skip_mean, Tensor? skip_variance, {_FOLDS}, "
    "float eps, ScalarType dtype, ScalarType out_dtype, str backend) -> (Tensor, Tensor, Tensor)",
    long_skip_rows.forward,
    _fake_forward,
)
backward_op = define(
    "long_skip_backward(Tensor grad, Tensor y, Tensor mean, Tensor rstd, Tensor x, Tensor skip, Tensor norm_weight, "
    f"Tensor norm_bias, Tensor weight, Tensor bias, {_FOLDS}, ScalarType dtype, bool[] needs, str backend) -> Tensor[]",
    long_skip_rows.backward,
    _fake_backward,
)
fold_op = define(
    "long_skip_fold(Tensor(a!)[] folds, Tensor[] parameters, str backend) -> ()",
    long_skip_rows.fold,
    lambda folds, parameters, backend: None,
)


@register_flop_formula(torch.ops.dit_fast.long_skip_forward)
def _forward_flops(x: torch.Size, *rest: Any, **options: Any) -> int:
    """Of the GEMM, multiply-add = 2, as torch's counter counts a linear layer."""
    return 4 * x[0] * x[1] ** 2


@register_flop_formula(torch.ops.dit_fast.long_skip_backward)
def _backward_flops(grad: torch.Size, *rest: Any, **options: Any) -> int:
    needs = rest[-2]
    halves = int(needs[0]) + int(needs[1]) + 2 * int(needs[2] or needs[4])
    return 2 * grad[0] * grad[1] ** 2 * halves


class _LongSkip(torch.autograd.Function):
    """(x, skip [M, D], four parameters, four statistics [M], W', u, b', eps, dtype, out_dtype, backend)
    -> y, mean, rstd."""

    @staticmethod
    def forward(
        x: Tensor, skip: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor,
        x_mean: Tensor | None, x_variance: Tensor | None, skip_mean: Tensor | None, skip_variance: Tensor | None,
        folded: Tensor | None, row_sums: Tensor | None, folded_bias: Tensor | None,
        eps: float, dtype: torch.dtype, out_dtype: torch.dtype, backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        # No *arguments: where nothing requires a gradient, the compiler tells by their number whether there is a ctx.
        return forward_op(
            x, skip, norm_weight, norm_bias, weight, bias, x_mean, x_variance, skip_mean, skip_variance,
            folded, row_sums, folded_bias, eps, dtype, out_dtype, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.eps, ctx.dtype, _, ctx.backend = inputs[13:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *inputs[:6], *inputs[10:13])
        ctx.save_for_forward(*output, *inputs[:6])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 17
        needs = ctx.needs_input_grad[:6]
        return spread(backward_op(grad, *ctx.saved_tensors, ctx.dtype, needs, ctx.backend), needs, 17)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None, None]:
        y, _, _, *inputs = ctx.saved_tensors[:9]
        return _tangent(inputs, tangents[:6], ctx.eps, y.dtype), None, None


_fused = differentiable(_LongSkip, "long_skip")


def _tangent(inputs: list[Tensor], tangents: tuple[Tensor | None, ...], eps: float, dtype: torch.dtype) -> Tensor:
    """Directional derivative of y [M, D] along tangents of the six inputs (None: zero), in `dtype`."""
    x, skip, norm_weight, norm_bias, weight, _ = inputs
    with without_autocast(x):
        z = torch.cat([x, skip], 1)
        wide = torch.promote_types(z.dtype, torch.float32)
        variance, mean = torch.var_mean(z.to(wide), 1, correction=0, keepdim=True)
        rstd = (variance + eps).rsqrt()
        normalised = (z - mean) * rstd
        dx, dskip, dgamma, dbeta, dweight, dbias = (
            torch.zeros_like(value, dtype=wide) if change is None else change.to(wide)
            for value, change in zip(inputs, tangents, strict=True)
        )
        dz = torch.cat([dx, dskip], 1)
        turned = rstd * (dz - dz.mean(1, keepdim=True) - normalised * (normalised * dz).mean(1, keepdim=True))
        affine = normalised * norm_weight + norm_bias
        change = (turned * norm_weight + normalised * dgamma + dbeta) @ weight.to(wide).T
        return (change + affine @ dweight.T + dbias).to(dtype)
