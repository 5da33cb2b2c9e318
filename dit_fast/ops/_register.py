"""Registration of ops with torch, and calls of them that leave torch's dispatcher out where nobody watches.

Registered ops are a schema, a Python function that runs the named implementation, and a fake that gives shapes without
data. Gradients do not live there: a thin autograd.Function calls a forward op and a backward op, which costs half of
what `torch.library.custom_op` does and compiles with fullgraph=True. Every kernel is launched inside a registered op;
one whose tensors come first, and its backend last, is traced where it runs by "triton" (`traced.py`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_fast.errors import UserError

PLAIN = frozenset((Tensor, torch.nn.Parameter))
_SCALARS = frozenset((str, int, float, bool, type(None), torch.dtype))
NAMESPACE = "dit_fast"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers `dit_fast::<schema>` for tensors on any device and returns what calls it.

    That has torch's op as `registered`, and as `run` what does without the look whether it may go straight.
    fake: same arguments, returns empty tensors of the right shapes, strides, dtypes and devices.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)

    @functools.wraps(implementation)
    def run(*args: Any, **options: Any) -> Any:
        # Kernels are launched on the current device, which need not be that of the tensors. Inputs that need a gradient
        # or have a tangent reach an op that is called alone or inside a level of forward mode; its steps write into
        # results (out=), which autograd refuses.
        first = _first_tensor(args)
        with torch._C._AutoDispatchBelowAutograd():
            if is_elsewhere(first):
                with torch.cuda.device_of(first):
                    return implementation(*args, **options)
            return implementation(*args, **options)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op = getattr(torch.ops.dit_fast, name).default

    def call(*args: Any) -> Any:
        return run(*args) if goes_straight(args) else op(*args)

    count = _leading_tensors(op)
    found: Any = _traced(call, run, op, count) if count else call
    found.registered, found.run = op, run
    return found


def _leading_tensors(op: Any) -> int:
    """How many tensors an op takes before all else; 0 where it takes lists of them, or writes into some."""
    kinds = [str(each.type) for each in op._schema.arguments]
    count = sum("Tensor" in kind for kind in kinds)
    plain = all(kind in ("Tensor", "Optional[Tensor]") for kind in kinds[:count]) and not op._schema.is_mutable
    return count if plain and op._schema.arguments[-1].name == "backend" else 0


def _traced(call: Callable[..., Any], run: Callable[..., Any], op: Any, count: int) -> Callable[..., Any]:
    """`call`, of which "triton" is a trace where nobody looks on; `count` tensors come first."""
    from dit_fast.ops import traced

    facts, lists = len(op._schema.arguments) - count, "List" in str([each.type for each in op._schema.arguments])
    alone = len(op._schema.returns) == 1 and str(op._schema.returns[0].type) == "Tensor"

    def whole(*mixed: Any) -> Any:
        args = (*mixed[facts:], *mixed[:facts])
        results = run(*args) if _are_plain(args) else op(*args)
        return (results,) if alone else results

    whole.__qualname__ = op.name()

    def traced_call(*args: Any) -> Any:
        if args[-1] != "triton" or is_seen() or is_elsewhere(_first_tensor(args)):
            return call(*args)
        told = tuple([tuple(each) if type(each) is list else each for each in args[count:]]) if lists else args[count:]
        results = traced.traced(whole, told, *args[:count])
        return results[0] if alone else results

    return traced_call


def _first_tensor(args: Sequence[Any]) -> Tensor:
    """Of an op's arguments, which lie on one device; a list of tensors counts by its first."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
        if isinstance(arg, list) and arg and isinstance(arg[0], Tensor):
            return arg[0]
    raise UserError("an op got no tensor")


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether a tensor lies on a GPU that is not the current one."""
    index = tensor.get_device()
    return index >= 0 and index != torch.cuda.current_device()


def is_watched() -> bool:
    """Whether the compiler, the tracer, torch.func or a dispatch mode wants to see each op that is called."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def goes_straight(args: Sequence[Any]) -> bool:
    """Whether nobody wants to see the call of an op, so that torch's dispatcher, the dearer half of it, is left out.

    Seen it must be by the compiler, torch.func, the tracer, dispatch modes (fake tensors, counters, make_fx), tensors
    of other classes, and the profiler, which names it. The dispatcher's too is a tensor that is not what lies in its
    memory: one with its sign still to be changed (`.conj().imag`), one of zeros without memory, one of a batch of
    gradients (`is_grads_batched`).
    """
    return not is_seen() and _are_plain(args)


def is_seen() -> bool:
    """Whether the call of an op must be seen: as it must by the profiler, too."""
    return is_watched() or torch.autograd._profiler_enabled()


def _are_plain(args: Sequence[Any]) -> bool:
    for arg in args:
        kind = type(arg)
        if kind is list or kind is tuple:
            if not all(type(each) in PLAIN and lies_plain(each) for each in arg if isinstance(each, Tensor)):
                return False
        elif kind in PLAIN:
            if not lies_plain(arg):
                return False
        elif kind not in _SCALARS:
            return False
    return True


_keys_of, _bits = torch._C._dispatch_keys, torch._C.DispatchKeySet.raw_repr


def _joint(*names: str) -> int:
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    return functools.reduce(int.__or__, map(_bits, keys))


_ABOVE = _joint("AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")
_LEFT_OUT = _ABOVE | _joint("CPU", "CUDA", "ADInplaceOrView")
ABOVE = torch._C.DispatchKeySet.from_raw_repr(_ABOVE)  # what an op has behind it when it reaches its implementation


def lies_plain(tensor: Tensor) -> bool:
    """Whether nothing of the dispatcher but autograd and autocast has to do with the tensor."""
    return not _bits(_keys_of(tensor)) & ~_LEFT_OUT
