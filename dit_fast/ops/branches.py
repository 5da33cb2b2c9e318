"""A transformer block's halves, each as one node of autograd's graph, checked once for both.

    reads    x, qkv = x, W (norm(x) (1 + scale) + shift) + b            into queries, keys and values
    joins    x' = x + gate (W y + b),   x'' = x' + gate' mlp(norm(x') (1 + scale') + shift')

A block of ops has a check, a choice, a node and a dozen Python calls for each of six of them, in both directions; those
take longer than the device at 32 samples. The launches here are the ops' own, in the same order: the same bits. The
ops are the definition, and what runs wherever someone looks on (`plan`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dit_fast import backend
from dit_fast.ops import adaln, gelu_cpp
from dit_fast.ops._kinds import Kinds
from dit_fast.ops._op import guarded
from dit_fast.ops._register import is_elsewhere, is_watched, lies_plain
from dit_fast.ops.diversity_descent import through_gate
from dit_fast.ops.gelu_mlp import OP as MLP
from dit_fast.ops.gelu_mlp import _gelu, _gelu_backward, _input_gradient, _linear, kept_for_backward
from dit_fast.ops.linear import SUMS, PartialSums, joined_sum, product, sum_of_rows
from dit_fast.ops.row_statistics import known
from dit_fast.ops.traced import traced

EPS = 1e-6
_REFUSAL = "a transformer block: no second derivative here; for one use dit_fast.backend.force('torch')"
Home = tuple[PartialSums, int] | None  # where gradients of vectors may be left as partial sums, with their number


class Layer(NamedTuple):
    """A linear layer's parameters, and their shadows, which are what products read."""

    weight: Tensor
    bias: Tensor
    shadow: Tensor
    bias_shadow: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """What is decided about blocks of one signature, which it stands for among `traced`'s facts."""

    chosen: str
    norms: Any  # module with the adaLN kernels' forward and backward
    mlp: str  # implementation of gelu_mlp
    sums: str  # and of sums over rows
    rms: bool
    dtype: torch.dtype  # of the products

    def run(self, function: Any, facts: tuple[Any, ...], *given: Tensor | None) -> Any:
        return traced(function, facts, *given) if self.chosen == "triton" else function(*facts, *given)


_PLANS = Kinds()  # False: op by op


def plan(x: Tensor, parts: Sequence[Tensor | None], layers: Sequence[Layer], norm: str) -> Plan | None:
    """How to run both halves; None: op by op.

    parts: shift, scale, gate, shift, scale, gate [N, D] of the stream x [N, T, D]. Op by op it is without autocast,
    where something has no gradient, where a second derivative, a tangent, the compiler, a mode or a tensor of another
    class is about, and for what the kernels do not take. Raises what the ops raise.
    """
    dtype = dtype_alone(x)
    if dtype is None:
        return None
    tensors = [each for each in (x, *parts) if each is not None]
    for layer in layers:
        tensors += layer
    key = (backend.forced(), dtype, norm, len(tensors))
    found = _PLANS.find(key, tensors)
    if found is None:
        found = _PLANS.keep(key, tensors, _choose(x, parts, layers, norm, dtype) or False)
    return found or None


def dtype_alone(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype; None where it is off or someone looks on."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not torch.is_grad_enabled() or is_watched():
        return None
    if forward_ad._current_level >= 0 or is_elsewhere(x):
        return None
    return torch.get_autocast_dtype(kind)


def _choose(
    x: Tensor, parts: Sequence[Tensor | None], layers: Sequence[Layer], norm: str, dtype: torch.dtype
) -> Plan | None:
    trained = [each for each in (x, *parts) if each is not None]
    if not all(each.requires_grad and lies_plain(each) for each in trained):
        return None
    for layer in layers:
        if layer.shadow.dtype is not dtype or not (layer.weight.requires_grad and layer.bias.requires_grad):
            return None
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
    if chosen or "torch" in (name, mlp) or not x.numel():
        return None
    return Plan(name, adaln._runner(name), mlp, SUMS.choose("auto", x.device), norm == "rms", dtype)


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
    """x'' [N, T, D] and its rows' mean and variance [N, T]; y: what attention made, [N, H, T, d] or [N, T, D]; home: of
    the gate and of what follows it."""
    parameters = (*layer[:2], *first[:2], *second[:2])
    return _joins(x, y, gate, shift, scale, gate_m, *parameters, plan, (layer, first, second), home)


class _Reads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, scale: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None,
        variance: Tensor | None, plan: Plan, layer: Layer, heads: int, home: Home,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        given = (x, shift, scale, layer.shadow, layer.bias_shadow)
        *read, rows, mean, variance = plan.run(_read, (plan, heads), *given, mean, variance)
        vectors = (scale.dtype, scale.dtype if shift is None else shift.dtype, scale.dtype)
        ctx.facts, ctx.home = (plan, weight.dtype, vectors, shift is not None, heads), home
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, scale, mean, variance, rows, layer.shadow)
        return x, *read

    @staticmethod
    def backward(ctx: Any, above: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return above, *(None,) * 10
        facts = (*ctx.facts, ctx.home is not None)
        made = ctx.facts[0].run(_read_back, facts, *ctx.saved_tensors, above, *grads)
        grad_x, grad_weight, grad_bias, *vectors = made
        _, grad_shift, grad_scale = _left(ctx.home, vectors)
        return grad_x, grad_shift, grad_scale, grad_weight, grad_bias, *(None,) * 6


def _read(
    plan: Plan, heads: int, x: Tensor, shift: Tensor | None, scale: Tensor, shadow: Tensor, bias_shadow: Tensor,
    mean: Tensor | None, variance: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    stats = None if mean is None or variance is None else (mean.contiguous(), variance.contiguous())
    forms = (EPS, plan.rms, stats, plan.dtype, stats is None)
    _, modulated, *measured = plan.norms.forward(x, None, None, shift, scale, *forms)
    rows, (batch, tokens, _) = modulated.view(-1, x.shape[-1]), x.shape
    qkv = torch.addmm(bias_shadow, rows, shadow.t()).view(batch, tokens, -1)
    read = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0) if heads else (qkv,)
    return *read, rows, *(stats or measured)


def _read_back(
    plan: Plan, own: torch.dtype, vectors: Any, shifted: bool, heads: int, at_home: bool, x: Tensor, scale: Tensor,
    mean: Tensor, variance: Tensor, rows: Tensor, shadow: Tensor, above: Tensor | None, *grads: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    if heads:
        shape = next(grad.transpose(1, 2).shape for grad in grads if grad is not None)
        parts = [rows.new_zeros(shape) if grad is None else grad.transpose(1, 2) for grad in grads]
        if not all(part.is_contiguous() for part in parts):
            parts = [torch.stack(parts, 2)]
    else:
        parts = [cast(Tensor, grads[0])]
    grad, grad_bias = joined_sum([part.reshape(rows.shape[0], -1) for part in parts], own, plan.sums)
    grad_rows, grad_weight = torch.mm(grad, shadow).view(x.shape), product(grad.t(), rows, own)
    given = (above, grad_rows, x, None, None, scale, mean, variance, EPS, plan.rms, shifted, x.dtype, None)
    grad_x, _, *of_vectors = _of_norm(plan, given, vectors, at_home)
    return grad_x, grad_weight, grad_bias, *of_vectors


class _Joins(torch.autograd.Function):
    """The first three arguments are a gate's, and `tap` is what `gate_residual`'s node has of that name."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor | None, scale: Tensor, gate_m: Tensor,
        weight: Tensor, bias: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor,
        plan: Plan, layers: tuple[Layer, Layer, Layer], home: Home,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        layer, first, second = layers
        keep = kept_for_backward(plan.mlp) > 1
        given = (x, gate, shift, scale, gate_m, *layer[2:], *first[2:], *second[2:])
        out, *measured, mixed, attended, branch, x_new, mean, variance, rows, hidden, activation = plan.run(
            _join, (plan, keep), *given, y
        )
        shifted = shift is not None
        vectors = (gate.dtype, scale.dtype if shift is None else shift.dtype, scale.dtype)
        ctx.facts, ctx.tap, ctx.home = (plan, weight.dtype, vectors, shifted, keep, y.shape), None, home
        # The gate, what it has beside it, and the second gate, whose own number comes after those.
        ctx.last = home and (home[0], home[1] + 2 + shifted)
        ctx.mark_non_differentiable(*measured)
        ctx.set_materialize_grads(False)
        saved = (mixed, gate_m, branch, gate, scale, x_new, mean, variance, rows, hidden, activation)
        ctx.save_for_backward(attended, *saved, layer.shadow, first.shadow, second.shadow)
        return out, measured[0], measured[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        attended, *saved = ctx.saved_tensors
        plan, added = ctx.facts[0], None
        if (tap := ctx.tap) and tap.active:
            added, grad = tap.parts(grad, plan.chosen)
        if grad is None:
            return (None,) * 15
        facts = (*ctx.facts, ctx.home is not None)
        made = plan.run(_join_back, facts, *saved, attended, added, grad)
        grad_x, grad_y, grad_weight, grad_bias, *of_mlp = made[:8]
        grad_gate_m, (grad_gate, grad_shift, grad_scale) = _left(ctx.last, made[8:9])[0], _left(ctx.home, made[9:])
        of_inputs = (grad_x, grad_y, grad_gate, grad_shift, grad_scale, grad_gate_m)
        return *of_inputs, grad_weight, grad_bias, *of_mlp, None, None, None


def _join(
    plan: Plan, keep: bool, x: Tensor, gate: Tensor, shift: Tensor | None, scale: Tensor, gate_m: Tensor,
    shadow: Tensor, bias_shadow: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor,
    y: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    norms, width = plan.norms, x.shape[-1]
    attended = (y.transpose(1, 2) if y.dim() == 4 else y).reshape(-1, width)
    branch = torch.addmm(bias_shadow, attended, shadow.t())
    x_new, modulated, *stats = norms.forward(
        x, branch.view(x.shape), gate, shift, scale, EPS, plan.rms, None, plan.dtype, True
    )
    rows = modulated.view(-1, width)
    hidden = _linear(rows, first, first_bias, plan.mlp)
    activation = _gelu(hidden, plan.mlp)
    mixed = _linear(activation, second, second_bias, plan.mlp)
    out, _, *measured = norms.forward(
        x_new, mixed.view(x.shape), gate_m, None, None, EPS, plan.rms, None, x.dtype, True
    )
    return out, *measured, mixed, attended, branch, x_new, *stats, rows, hidden, activation if keep else None


def _join_back(
    plan: Plan, own: torch.dtype, vectors: Any, shifted: bool, keep: bool, shape: Any, at_home: bool, mixed: Tensor,
    gate_m: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, x_new: Tensor, mean: Tensor, variance: Tensor,
    rows: Tensor, hidden: Tensor, activation: Tensor | None, shadow: Tensor, first: Tensor, second: Tensor,
    attended: Tensor, added: Tensor | None, grad: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """added: the diversity loss's own gradient of the result, for the kernel that has the second gate's with it."""
    above: Any = grad
    branch, mixed = branch.view(x_new.shape), mixed.view(x_new.shape)  # of what a trace needs no tensor for
    if added is None:
        given: Any = (grad, None, None, mixed, gate_m, None, None, None, EPS, plan.rms, False, x_new.dtype, mixed.dtype)
        _, grad_mixed, of_gate_m, *_ = _of_norm(plan, given, (gate_m.dtype,) * 3, at_home)
    else:
        above, grad_mixed, of_gate_m = through_gate(added, grad, mixed, gate_m, at_home)
    kept = (rows, hidden, activation)
    grad_rows, of_mlp = _through_mlp(grad_mixed.view(-1, x_new.shape[-1]), kept, first, second, plan, own)
    given = (above, grad_rows.view(x_new.shape), x_new, branch, gate, scale, mean, variance, EPS, plan.rms)
    given = (*given, shifted, x_new.dtype, branch.dtype)
    grad_x, grad_branch, *of_vectors = _of_norm(plan, given, vectors, at_home)
    grad_rows = grad_branch.view(attended.shape)
    grad_y = torch.mm(grad_rows, shadow)
    grad_y = grad_y.view(shape[0], shape[2], shape[1], -1).transpose(1, 2) if len(shape) == 4 else grad_y.view(shape)
    grad_weight, grad_bias = product(grad_rows.t(), attended, own), sum_of_rows(grad_rows, own, plan.sums)
    return grad_x, grad_y, grad_weight, grad_bias, *of_mlp, of_gate_m, *of_vectors


def _of_norm(plan: Plan, given: Sequence[Any], vectors: Any, at_home: bool) -> tuple[Any, ...]:
    """The norm's gradients of its two streams, then those of its three vectors, or at home their partial sums."""
    return tuple(plan.norms.differentiate(*given) if at_home else plan.norms.backward(*given, vectors))


def _left(home: Home, found: Sequence[Any]) -> Sequence[Any]:
    """Three vectors' gradients; none where their partial sums are left at home."""
    if home is None:
        return found
    home[0].leave(home[1], found[0])
    return None, None, None


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


def node(function: Any, refusal: str) -> Any:
    """Its apply, without torch's look at the signature of forward."""
    plain, run = function.backward, guarded(function.backward, refusal)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return plain(ctx, *grads)
        ctx.home = ctx.last = None  # what is left at home would not meet the refusal
        return run(ctx, *grads)

    function.backward = staticmethod(backward)
    return super(torch.autograd.Function, function).apply


_reads, _joins = node(_Reads, _REFUSAL), node(_Joins, _REFUSAL)
