"""The MLP of a transformer block, `fc2(gelu(fc1(x)))` with the tanh form of GELU.

With h = fc1(x), a = gelu(h) and g the gradient of the result, the backward needs a for dW2 = g^T a and h for
dh = (g W2) gelu'(h). "triton" makes dh in a pass behind the library's product and keeps h and a, as autograd does. The
CPU's "cpp" (`gelu_cpp.py`) and "recompute" keep h alone and compute a again. In bytes per element of x, for inputs of
16 bits and a hidden tensor four times as wide, this moves 36 forward, and backward 66 by "triton" (what torch.compile
comes to) and 74 by "cpp". Inside `activation_again` all compute it again, for memory.
Without gradients nothing is kept, and on CUDA the GELU runs in the epilogue of the first product (the CPU's version of
that function has the erf form and is never used).
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dit_fast import _C
from dit_fast.backend import Implementation
from dit_fast.errors import UserError
from dit_fast.ops import gelu_cpp
from dit_fast.ops._op import Op, differentiable, odd_dtypes, triton, wide
from dit_fast.ops._register import define
from dit_fast.ops.autocast import linear_dtype, without_autocast
from dit_fast.ops.linear import in_dtype, linear, product, sum_of_rows


def _refuses(x: Tensor) -> Sequence[str]:
    """x [..., D] or, in its place, the hidden tensor."""
    from dit_fast.kernels import gelu as kernel

    return kernel.supports(x)


OP = Op(
    "gelu_mlp",
    "x[..., D] fc1_weight[F, D] fc1_bias[F] fc2_weight[E, F] fc2_bias[E]",
    # An H200, 8192 rows, 1152 and 4608 wide, ms: the library's product 0.125 and the pass 0.079; a product of our own
    # that ended in the gradient, and so spared a write and a read of it, 0.267.
    triton(_refuses),
    Implementation("cpp", ("cpu",), _C.unavailable, refuses=odd_dtypes),
    Implementation("recompute", (), lambda: None, automatic=()),
)
_again = False


@contextlib.contextmanager
def activation_again() -> Iterator[None]:
    """Forward passes inside keep no activation for the backward, which computes it from the hidden tensor, in one pass
    more; "torch" keeps it."""
    global _again
    before, _again = _again, True
    try:
        yield
    finally:
        _again = before


def kept_for_backward(chosen: str) -> int:
    """Of the hidden tensor and the activation, how many a forward pass by this implementation keeps."""
    return 2 if chosen == "triton" and not _again else 1


def gelu_mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, backend: str = "auto"
) -> Tensor:
    """`linear(gelu(linear(x, fc1_weight, fc1_bias), approximate="tanh"), fc2_weight, fc2_bias)`.

    x: [..., D]; fc1_weight: [F, D]; fc1_bias: [F]; fc2_weight: [E, F]; fc2_bias: [E]. Returns [..., E]. Products run in
    the dtype that the four parameters share, to which x is cast, or in autocast's. backend: "torch" (plain autograd),
    "triton" (on CUDA: the library's products and a kernel for GELU's gradient), "cpp" (csrc's GELU, on the CPU three to
    four times as fast as torch's, and oneDNN's products), "recompute" (torch's operators; on request). "triton" keeps
    x, h and a for the backward, the last two x and h.
    All but "torch" differentiate in forward mode and, once, in reverse mode, of the result or of its forward-mode
    derivative; "torch" any number of times.
    Raises UserError for shapes, dtypes or devices that do not fit, ConfigError for a backend that is unknown or cannot
    take these tensors.
    """
    parameters = {"fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias}
    given = OP.check(backend, x=x, **parameters)
    own = fc1_weight.dtype
    if not fc1_bias.dtype == fc2_weight.dtype == fc2_bias.dtype == own:
        name, odd = next((name, tensor.dtype) for name, tensor in parameters.items() if tensor.dtype != own)
        raise UserError(f"gelu_mlp: {name} is {odd}, fc1_weight {own}; give them one dtype")
    dtype = linear_dtype(x, own)
    x = x.to(dtype)
    chosen = OP.choose(backend, x.device, x, given=given)
    own_parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if chosen == "torch":
        return linear(_gelu(linear(x, fc1_weight, fc1_bias), "torch"), fc2_weight, fc2_bias)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *own_parameters))
    copies = [in_dtype(parameter, dtype) for parameter in own_parameters]
    kept = kept_for_backward(chosen) if keep else 0
    y, *_ = _recompute(x.reshape(-1, x.shape[-1]), *own_parameters, *copies, kept, chosen)
    return y.view(*x.shape[:-1], y.shape[-1])


def _gelu(hidden: Tensor, backend: str) -> Tensor:
    return gelu_cpp.gelu(hidden) if backend == "cpp" else F.gelu(hidden, approximate="tanh")


def _linear(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    return gelu_cpp.product(x, weight, bias) if backend == "cpp" else torch.addmm(bias, x, weight.t())


def _input_gradient(grad: Tensor, weight: Tensor, backend: str) -> Tensor:
    return gelu_cpp.product(grad, weight.t()) if backend == "cpp" else grad @ weight


def _gelu_backward(
    hidden: Tensor, grad: Tensor, weight: Tensor, want_activation: bool, want_bias: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """From grad [M, E] and weight [E, F]. The product is made here, so that the gradient of hidden can take its place:
    with hidden and the activation, three tensors of that size live at once, as in the reference's backward."""
    hidden, empty = hidden.contiguous(), hidden.new_empty(0)
    activation: Tensor | None = None
    grad_bias: Tensor | None
    if backend == "triton" and hidden.numel():
        from dit_fast.kernels import gelu as kernel

        grad = (grad @ weight).contiguous()
        grad_hidden, grad_bias = kernel.backward(hidden, grad, want_bias, grad)
        activation = _gelu(hidden, backend) if want_activation else None
    elif backend == "cpp" and hidden.numel():
        grad_hidden = _input_gradient(grad, weight, backend).contiguous()
        activation, grad_bias = gelu_cpp.backward(hidden, grad_hidden, want_activation, want_bias)
    else:
        grad = (grad @ weight).contiguous()
        grad_hidden = torch.ops.aten.gelu_backward.grad_input(grad, hidden, approximate="tanh", grad_input=grad)
        activation = _gelu(hidden, backend) if want_activation else None
        grad_bias = grad_hidden.sum(0, dtype=wide(hidden)) if want_bias else None
    return (
        empty if activation is None else activation,
        grad_hidden,
        empty.to(wide(hidden)) if grad_bias is None else grad_bias,
    )


def _empty_outputs(
    hidden: Tensor, grad: Tensor, weight: Tensor, want_activation: bool, want_bias: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if want_activation else (0,)),
        hidden.new_empty(hidden.shape),
        hidden.new_empty(hidden.shape[1:] if want_bias else (0,), dtype=wide(hidden)),
    )


gelu_backward_op = define(
    "gelu_backward(Tensor hidden, Tensor grad, Tensor weight, bool want_activation, bool want_bias, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _gelu_backward,
    _empty_outputs,
)


@register_flop_formula(torch.ops.dit_fast.gelu_backward)
def _backward_flops(hidden: torch.Size, grad: torch.Size, *rest: Any, **options: Any) -> int:
    """Of the product, multiply-add = 2."""
    return 2 * hidden[0] * hidden[1] * grad[1]


class _GeluMlp(torch.autograd.Function):
    """(x [M, D], parameters, their copies in x's dtype, kept, backend) -> y [M, E] and hidden and activation [M, F], of
    which `kept` are for the backward, the others [0, F]. Gradients of parameters come in the parameters' own dtype."""

    @staticmethod
    def forward(
        x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor,
        first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor, kept: int, backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if kept or x.device.type != "cuda":
            hidden = _linear(x, first, first_bias, backend)
            activation = _gelu(hidden, backend)
        else:
            hidden = x.new_empty(0, len(first_bias))
            activation = torch.ops.aten._addmm_activation(first_bias, x, first.t(), use_gelu=True)
        y = _linear(activation, second, second_bias, backend)
        none = (activation.new_empty(0, len(first_bias)) for _ in range(2))
        return y, hidden if kept else next(none), activation if kept == 2 else next(none)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, *parameters = inputs[:5]
        first, first_bias, second, _, ctx.kept, ctx.backend = inputs[5:]
        ctx.own = parameters[0].dtype
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else autograd would fill zeros of the hidden tensor's size
        ctx.save_for_backward(x, *output[1:], first, first_bias, second)
        ctx.save_for_forward(x, *parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 11
        x, hidden, activation, first, first_bias, second = ctx.saved_tensors
        needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = ctx.needs_input_grad[:5]
        again = needs_w2 and ctx.kept < 2
        grads: list[Tensor | None] = [None] * 11
        with without_autocast(x):
            if not ctx.kept:
                hidden = _linear(x, first, first_bias, ctx.backend)
            if needs_x or needs_w1 or needs_b1:
                made, grad_hidden, grad_b1 = gelu_backward_op(hidden, grad, second, again, needs_b1, ctx.backend)
                activation = made if again else activation
                grads[0] = _input_gradient(grad_hidden, first, ctx.backend) if needs_x else None
                grads[1] = product(grad_hidden.t(), x, ctx.own) if needs_w1 else None
                grads[2] = grad_b1.to(ctx.own) if needs_b1 else None
            elif again:
                activation = _gelu(hidden, ctx.backend)
            grads[3] = product(grad.t(), activation, ctx.own) if needs_w2 else None
            if needs_b2:
                own = ctx.own
                grads[4] = gelu_cpp.column_sums(grad).to(own) if ctx.backend == "cpp" else sum_of_rows(grad, own)
        return tuple(grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None, None]:
        x = ctx.saved_tensors[0]
        # The parameters, not their copies, nor the saved hidden: a backward through this rule has to see them.
        fc1_weight, fc1_bias, fc2_weight = (each.to(x.dtype) for each in ctx.saved_tensors[1:4])
        change_x, *changes = tangents[:5]
        change_w1, change_b1, change_w2, change_b2 = (None if each is None else each.to(x.dtype) for each in changes)
        hidden = torch.addmm(fc1_bias, x, fc1_weight.t())
        change = torch.zeros_like(hidden)
        if change_x is not None:
            change = change + change_x @ fc1_weight.t()
        if change_w1 is not None:
            change = change + x @ change_w1.t()
        if change_b1 is not None:
            change = change + change_b1
        result = torch.ops.aten.gelu_backward(change, hidden, approximate="tanh") @ fc2_weight.t()
        if change_w2 is not None:
            result = result + _gelu(hidden, "torch") @ change_w2.t()
        return result if change_b2 is None else result + change_b2, None, None


_recompute = differentiable(_GeluMlp, "gelu_mlp")
