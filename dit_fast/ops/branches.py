"""A transformer block's halves, each as one node of autograd's graph, checked once for both, and the long skip.

    reads    x, qkv = x, W (norm(x) (1 + scale) + shift) + b            into queries, keys and values
    joins    x' = x + gate (W y + b),   x'' = x' + gate' mlp(norm(x') (1 + scale') + shift')
    fuses    x' = W norm(x, skip) + b

A block of ops has a check, a choice, a node and a dozen Python calls for each of six of them, in both directions; those
take longer than the device at 32 samples. The launches here are the ops' own, in the same order: the same bits. The
ops are the definition, and what runs wherever someone looks on (`plan`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dit_fast import backend
from dit_fast.ops import adaln, gelu_cpp, long_skip_rows
from dit_fast.ops._op import guarded, remember
from dit_fast.ops._register import is_elsewhere, is_watched, lies_plain
from dit_fast.ops.gelu_mlp import OP as MLP
from dit_fast.ops.gelu_mlp import _gelu, _gelu_backward, _input_gradient, _linear, kept_for_backward
from dit_fast.ops.linear import SUMS, PartialSums, joined_sum, product, sum_of_rows
from dit_fast.ops.long_skip import OP as SKIP
from dit_fast.ops.row_statistics import RowStatistics, known

EPS = 1e-6
_REFUSAL = "a transformer block: no second derivative here; for one use dit_fast.backend.force('torch')"
Home = tuple[PartialSums, int] | None  # where gradients of vectors may be left as partial sums, with their number


class Layer(NamedTuple):
    """A linear layer's parameters, and their shadows, which are what products read."""

    weight: Tensor
    bias: Tensor
    shadow: Tensor
    bias_shadow: Tensor


class Plan(NamedTuple):
    """What is decided about blocks of one signature. norms: module with the adaLN kernels' forward and backward."""

    chosen: str
    norms: Any
    mlp: str  # implementation of gelu_mlp
    sums: str  # and of sums over rows
    rms: bool
    dtype: torch.dtype  # of the products


_PLANS: dict[Any, Plan | None] = {}


def plan(x: Tensor, parts: Sequence[Tensor | None], layers: Sequence[Layer], norm: str) -> Plan | None:
    """How to run both halves; None: op by op.

    parts: shift, scale, gate, shift, scale, gate [N, D] of the stream x [N, T, D]. Op by op it is without autocast,
    where something has no gradient, where a second derivative, a tangent, the compiler, a mode or a tensor of another
    class is about, and for what the kernels do not take. Raises what the ops raise.
    """
    dtype = _dtype_alone(x)
    if dtype is None:
        return None
    found: list[Any] = [backend.forced(), dtype, norm, x.device]
    for tensor in (x, *parts):
        if tensor is None:
            found.append(None)
            continue
        if not tensor.requires_grad or not lies_plain(tensor):
            return None
        found += (tensor.shape, tensor.stride(), tensor.dtype)
    for layer in layers:
        if layer.shadow.dtype is not dtype or not (layer.weight.requires_grad and layer.bias.requires_grad):
            return None
    key = tuple(found)
    if key in _PLANS:
        return _PLANS[key]
    return _choose(key, x, parts, norm, dtype)


def _dtype_alone(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype; None where it is off or someone looks on."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not torch.is_grad_enabled() or is_watched():
        return None
    if forward_ad._current_level >= 0 or is_elsewhere(x):
        return None
    return torch.get_autocast_dtype(kind)


def _choose(key: Any, x: Tensor, parts: Sequence[Tensor | None], norm: str, dtype: torch.dtype) -> Plan | None:
    shift, scale, gate, shift_m, scale_m, gate_m = parts
    branch = x.new_empty(x.shape, dtype=dtype)
    chosen = set()
    for op, y, each in (
        (adaln.MODULATE, None, (None, shift, scale)),
        (adaln.BOTH, branch, (gate, shift_m, scale_m)),
        (adaln.RESIDUAL, branch, (gate_m, None, None)),
    ):
        named = {"x": x, "y": y, **dict(zip(("gate", "shift", "scale"), each, strict=True))}
        op.check("auto", EPS, **{name: tensor for name, tensor in named.items() if tensor is not None})
        chosen.add(op.choose("auto", x.device, x, y, *each, dtype if each[2] is not None else x.dtype))
    mlp = MLP.choose("auto", x.device, branch)
    name = chosen.pop()
    made: Plan | None = None
    if not chosen and "torch" not in (name, mlp) and x.numel():
        made = Plan(name, adaln._runner(name), mlp, SUMS.choose("auto", x.device), norm == "rms", dtype)
    remember(_PLANS, key, made)
    return made


def home_of(plan: Plan, modulation: Any, parts: Sequence[Tensor | None]) -> Home:
    """Where gradients of all parts may be left: those of a modulation as they are, which nobody else looks at."""
    home: Home = getattr(modulation, "home", None)
    if home is None or plan.chosen != "triton":
        return None
    for part, own in zip([part for part in parts if part is not None], modulation, strict=True):
        if part is not own or part._backward_hooks or part.retains_grad:
            return None
    return home


def reads(
    plan: Plan, x: Tensor, shift: Tensor | None, scale: Tensor, stats: Any, layer: Layer, heads: int, home: Home = None
) -> tuple[Tensor, ...]:
    """x, for those who read it after this, and queries, keys, values [N, H, T, d], or with heads=0 all [N, T, 3D].

    home: of shift and scale.
    """
    mean, variance = known("block", "stats", stats, x) or (None, None)
    return _reads(x, shift, scale, layer.weight, layer.bias, mean, variance, plan, layer, heads, home)


def joins(
    plan: Plan, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor | None, scale: Tensor, gate_m: Tensor,
    layer: Layer, first: Layer, second: Layer, *, home: Home = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x'' [N, T, D] and its rows' mean and variance [N, T]; y: what attention made, [N, T, H, d]; home: of the gate and
    of what follows it."""
    parameters = (*layer[:2], *first[:2], *second[:2])
    return _joins(x, y, gate, shift, scale, gate_m, *parameters, plan, (layer, first, second), home)


_FUSES: dict[Any, bool] = {}


def fuses(
    x: Tensor, skip: Tensor, parameters: tuple[Tensor, Tensor, Tensor, Tensor], eps: float,
    x_stats: RowStatistics | None, skip_stats: RowStatistics | None, out_dtype: torch.dtype | None,
) -> Tensor | None:  # fmt: skip
    """`long_skip` by "triton" with known statistics and with weights that are kept folded; None: by the op, which runs
    otherwise, and where `plan` says so."""
    folded: Any = getattr(parameters[2], "folded", None)
    if folded is None or x_stats is None or skip_stats is None or (dtype := _dtype_alone(x)) is None:
        return None
    found: list[Any] = [backend.forced(), dtype, out_dtype, eps, x.device, parameters[2].shape]
    for tensor in (x, skip):
        if not tensor.requires_grad or not lies_plain(tensor) or tensor.data_ptr() % 16:
            return None
        found += (tensor.shape, tensor.stride(), tensor.dtype)
    if not all(parameter.requires_grad for parameter in parameters):
        return None
    key = tuple(found)
    takes = _FUSES.get(key)
    if takes is None:
        named = zip(("norm_weight", "norm_bias", "weight", "bias"), parameters, strict=True)
        SKIP.check("auto", eps, x=x, skip=skip, **dict(named))
        takes = SKIP.choose("auto", x.device, x, skip, *parameters) == "triton" and x.numel() > 0
        remember(_FUSES, key, takes := takes and x.is_contiguous() and skip.is_contiguous())
    folds = folded.read(parameters, dtype, "triton") if takes else (None,)
    if folds[0] is None:
        return None
    moments = (known("long_skip", "x_stats", x_stats, x), known("long_skip", "skip_stats", skip_stats, skip))
    return _fuses(x, skip, *parameters, moments, folds, eps, dtype, out_dtype or dtype)


class _Fuses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, skip: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor,
        moments: Any, folds: tuple[Tensor, ...], eps: float, dtype: torch.dtype, out_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        given = (x.view(-1, x.shape[-1]), skip.view(-1, x.shape[-1]), norm_weight, norm_bias, weight, bias)
        stats = [part.reshape(-1) for pair in moments for part in pair]
        y, mean, rstd = long_skip_rows.forward(*given, stats, eps, dtype, out_dtype, "triton", folds)
        ctx.dtype = dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, mean, rstd, *given, *folds)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 11
        saved, rows = ctx.saved_tensors, grad.reshape(-1, grad.shape[-1])
        given: Any = (rows, *saved[:9], ctx.dtype, "triton", [True] * 6, saved[9:])
        made = long_skip_rows.backward(*given)
        return made[0].view(grad.shape), made[1].view(grad.shape), *made[2:], *(None,) * 5


class _Reads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, scale: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None,
        variance: Tensor | None, plan: Plan, layer: Layer, heads: int, home: Home,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        stats = None if mean is None or variance is None else (mean, variance)
        forms = (EPS, plan.rms, stats, plan.dtype, stats is None)
        _, modulated, *measured = plan.norms.forward(x, None, None, shift, scale, *forms)
        mean, variance = measured if stats is None else stats
        rows = modulated.view(-1, x.shape[-1])
        qkv = torch.addmm(layer.bias_shadow, rows, layer.shadow.t())
        ctx.plan, ctx.shifted, ctx.heads, ctx.home = plan, shift is not None, heads, home
        ctx.vectors = (scale.dtype, scale.dtype if shift is None else shift.dtype, scale.dtype)
        ctx.own = weight.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, scale, mean, variance, rows, layer.shadow)
        batch, tokens, _ = x.shape
        if not heads:
            return x.view_as(x), qkv.view(batch, tokens, -1)
        query, key, value = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return x.view_as(x), query, key, value

    @staticmethod
    def backward(ctx: Any, above: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, scale, mean, variance, rows, shadow = ctx.saved_tensors
        plan, none = ctx.plan, (None,) * 6
        if all(grad is None for grad in grads):
            return above, *(None,) * 4, *none
        if ctx.heads:
            shape = next(grad.transpose(1, 2).shape for grad in grads if grad is not None)
            parts = [rows.new_zeros(shape) if grad is None else grad.transpose(1, 2) for grad in grads]
            if not all(part.is_contiguous() for part in parts):
                parts = [torch.stack(parts, 2)]
        else:
            parts = [grads[0]]
        grad, grad_bias = joined_sum([part.reshape(rows.shape[0], -1) for part in parts], ctx.own, plan.sums)
        grad_rows, grad_weight = torch.mm(grad, shadow).view(x.shape), product(grad.t(), rows, ctx.own)
        given = (above, grad_rows, x, None, None, scale, mean, variance, EPS, plan.rms, ctx.shifted, x.dtype, None)
        grad_x, _, _, grad_shift, grad_scale = _of_norm(plan, given, ctx.vectors, ctx.home)
        return grad_x, grad_shift, grad_scale, grad_weight, grad_bias, *none


class _Joins(torch.autograd.Function):
    """The first three arguments are a gate's, and `tap` is what `gate_residual`'s node has of that name."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor | None, scale: Tensor, gate_m: Tensor,
        weight: Tensor, bias: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor,
        plan: Plan, layers: tuple[Layer, Layer, Layer], home: Home,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        norms, (layer, first, second), width = plan.norms, layers, x.shape[-1]
        attended = y.reshape(-1, width)
        branch = torch.addmm(layer.bias_shadow, attended, layer.shadow.t()).view(x.shape)
        x_new, modulated, mean, variance = norms.forward(
            x, branch, gate, shift, scale, EPS, plan.rms, None, plan.dtype, True
        )
        rows = modulated.view(-1, width)
        hidden = _linear(rows, first.shadow, first.bias_shadow, plan.mlp)
        activation: Any = _gelu(hidden, plan.mlp)
        mixed = _linear(activation, second.shadow, second.bias_shadow, plan.mlp).view(x.shape)
        if kept_for_backward(plan.mlp) < 2:
            activation = None
        out, _, *measured = norms.forward(x_new, mixed, gate_m, None, None, EPS, plan.rms, None, x.dtype, True)
        ctx.plan, ctx.own, ctx.shape, ctx.shifted = plan, weight.dtype, y.shape, shift is not None
        ctx.vectors = (gate.dtype, scale.dtype if shift is None else shift.dtype, scale.dtype)
        ctx.tap, ctx.home = None, home
        # The gate, what it has beside it, and the second gate, whose own number comes after those.
        ctx.last = home and (home[0], home[1] + 2 + ctx.shifted)
        ctx.mark_non_differentiable(*measured)
        ctx.set_materialize_grads(False)
        of_norms, of_mlp = (branch, gate, scale, x_new, mean, variance, mixed, gate_m), (rows, hidden, activation)
        ctx.save_for_backward(*of_norms, attended, *of_mlp, layer.shadow, first.shadow, second.shadow)
        return out, measured[0], measured[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        branch, gate, scale, x_new, mean, variance, mixed, gate_m, attended, *of_mlp, shadow, first, second = (
            ctx.saved_tensors
        )
        plan, own = ctx.plan, ctx.own
        found: Any = grad
        if (tap := ctx.tap) and tap.active:
            found = tap.gradients(grad, mixed, gate_m, plan.chosen, ctx.last)
        if found is None:
            return (None,) * 15
        if isinstance(found, Tensor):
            gate_alone = (None, None, mixed, gate_m, None, None, None, EPS, plan.rms, False, x_new.dtype, mixed.dtype)
            made = _of_norm(plan, (found, *gate_alone), (gate_m.dtype,) * 3, ctx.last)
            found = found, *made[1:3]
        above, grad_mixed, grad_gate_m = found
        grad_rows, of_mlp = _through_mlp(grad_mixed.view(-1, x_new.shape[-1]), of_mlp, first, second, plan, own)
        given: Any = (above, grad_rows.view(x_new.shape), x_new, branch, gate, scale, mean, variance, EPS, plan.rms)
        given = (*given, ctx.shifted, x_new.dtype, branch.dtype)
        grad_x, grad_branch, grad_gate, grad_shift, grad_scale = _of_norm(plan, given, ctx.vectors, ctx.home)
        rows = grad_branch.view(attended.shape)
        grad_y = torch.mm(rows, shadow).view(ctx.shape)
        grad_weight, grad_bias = product(rows.t(), attended, own), sum_of_rows(rows, own, plan.sums)
        of_inputs = (grad_x, grad_y, grad_gate, grad_shift, grad_scale, grad_gate_m)
        return *of_inputs, grad_weight, grad_bias, *of_mlp, None, None, None


def _of_norm(plan: Plan, given: Sequence[Any], vectors: tuple[torch.dtype, ...], home: Home) -> tuple[Any, ...]:
    """The norm's five gradients; None for those of vectors that are left at home."""
    if home is None:
        return tuple(plan.norms.backward(*given, vectors))
    grad_x, grad_y, partials = plan.norms.differentiate(*given)
    home[0].leave(home[1], partials)
    return grad_x, grad_y, None, None, None


def _through_mlp(
    grad: Tensor, saved: Sequence[Any], first: Tensor, second: Tensor, plan: Plan, own: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of the MLP's rows and of its four parameters, from that of its result; first, second: shadows."""
    rows, hidden, activation = saved
    made, grad_hidden, sums = _gelu_backward(hidden, grad, second, activation is None, True, plan.mlp)
    activation = made if activation is None else activation
    parameters = [product(grad_hidden.t(), rows, own), sums.to(own), product(grad.t(), activation, own)]
    sums = gelu_cpp.column_sums(grad).to(own) if plan.mlp == "cpp" else sum_of_rows(grad, own, plan.sums)
    return _input_gradient(grad_hidden, first, plan.mlp), [*parameters, sums]


def _node(function: Any) -> Any:
    """Its apply, without torch's look at the signature of forward."""
    run = guarded(function.backward, _REFUSAL)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # what is left at home would not meet the refusal
            ctx.home = ctx.last = None
        return run(ctx, *grads)

    function.backward = staticmethod(backward)
    return super(torch.autograd.Function, function).apply


_reads, _joins, _fuses = _node(_Reads), _node(_Joins), _node(_Fuses)
