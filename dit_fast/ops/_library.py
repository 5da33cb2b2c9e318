"""Registration of an op with torch; `diversity_op.py` is the example to copy.

An op is a schema, a Python function that picks the implementation when it is called (so that a compiled graph is tied
to none), and a fake implementation that gives shapes without data. Gradients do not live here: a thin
autograd.Function calls a forward op and a backward op, which costs half of what `torch.library.custom_op` does and
compiles with fullgraph=True. `once_differentiable` and `once_in_forward_mode` say no where a second derivative would
come out as zero. Every kernel is launched inside an op, on the device of its tensors.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms

from dit_fast.errors import UserError

NAMESPACE = "dit_fast"
_Backward = Callable[..., Any]
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers `dit_fast::<schema>` for tensors on any device and returns the callable op.

    fake: same arguments, returns empty tensors of the right shapes, strides, dtypes and devices.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)

    @functools.wraps(implementation)
    def run(*args: Any, **options: Any) -> Any:
        # Kernels are launched on the current device, which need not be that of the tensors. Inputs that need a gradient
        # or have a tangent reach an op that is called alone or inside a level of forward mode; its steps write into
        # results (out=), which autograd refuses.
        with torch.cuda.device_of(_first_tensor(args)), torch._C._AutoDispatchBelowAutograd():
            return implementation(*args, **options)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(torch.ops.dit_fast, name).default


def _first_tensor(args: Sequence[Any]) -> Tensor:
    """Of an op's arguments, which lie on one device; a list of tensors counts by its first."""
    firsts = (arg[0] if isinstance(arg, list) and arg else arg for arg in args)
    return next(arg for arg in firsts if isinstance(arg, Tensor))


class _OneDerivative(torch.autograd.Function):
    """(refusal, count, *tensors) -> the first `count` tensors, which depend on all and cannot be differentiated.

    torch's own decorator of this purpose is cut off from what the gradients depend on: `torch.autograd.grad` and
    torch.func never meet it and return zeros.
    """

    @staticmethod
    def forward(refusal: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.refusal = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise UserError(ctx.refusal)

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> None:
        raise UserError(ctx.refusal)


def _refusal(name: str, instead: str) -> str:
    return f"{name}: no second derivative here; for one use {instead}"


def once_differentiable(name: str, instead: str = 'backend="torch"') -> Callable[[_Backward], _Backward]:
    """Decorator for the backward of the op `name`: a derivative of what it returns raises UserError.

    Only with a graph of the backward (create_graph=True, torch.func); it costs nothing else. instead: what has one.
    """
    refusal = _refusal(name, instead)

    def decorate(backward: _Backward) -> _Backward:
        @functools.wraps(backward)
        def guarded(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            with torch.no_grad():
                results = backward(ctx, *grads)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return results
            present = [result for result in results if result is not None]
            causes = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.is_floating_point()]
            if not present:
                return results
            refusing = iter(_OneDerivative.apply(refusal, len(present), *present, *causes))
            return tuple(None if result is None else next(refusing) for result in results)

        return guarded

    return decorate


def once_in_forward_mode(name: str, instead: str = 'backend="torch"') -> None:
    """Called by the forward-mode rule of the op `name`: a rule inside another level of torch.func.jvp raises."""
    if eager_transforms.JVP_NESTING > 1:
        raise UserError(_refusal(name, instead))
