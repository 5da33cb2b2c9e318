"""What all ops share: the declaration of an op, the checks of its arguments, and its derivatives.

`Op` declares a public op in one place: its name, the shapes of its arguments, and its implementations in order of
preference, each with the reasons for which it refuses arguments. The public function checks its arguments and chooses
the implementation, once; plain autograd of the reference runs where that is "torch". Otherwise the name of the choice
goes through an autograd.Function to registered ops (`_register.py`) and stays on its ctx, so that a backward takes what
its forward took. `qk_norm.py` is the example to copy.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms

from dit_fast import backend, kernels
from dit_fast.backend import Implementation
from dit_fast.errors import UserError
from dit_fast.ops._kinds import REMEMBERED, Kinds
from dit_fast.ops._register import PLAIN
from dit_fast.ops.autocast import autocast_dtype_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STRIDED = torch.strided
FUSED = FLOATS[:3]  # what compiled implementations take

Dims = tuple[tuple[int, str], ...]  # each the product of a factor and of the sizes with these one-letter names


def triton(
    refuses: Callable[..., Sequence[str]] = lambda *arguments: (), automatic: tuple[str, ...] | None = None
) -> Implementation:
    """The Triton kernels of an op, on CUDA and, interpreted, on the CPU."""
    return Implementation("triton", kernels.devices(), kernels.unavailable, automatic, refuses)


class Op:
    """Declaration of a public op.

    shapes: "x[..., D] weight[F, 2D] int64 positions[N]", the tensors in the order in which they are checked. One
    letter is one size, "..." any number of them, and all of a name are equal. A tensor that stands there twice may have
    either number of dimensions. Tensors are floating point of 16, 32 or 64 bits unless the text says int64, and lie on
    one device; the last size of the first is at least 1. nonempty: so is every other.
    implementations: best first, the reference left out.
    """

    def __init__(self, name: str, shapes: str, *implementations: Implementation, nonempty: bool = False):
        self.name = name
        self._nonempty = nonempty
        self._checked = Kinds()
        self._chosen: dict[Any, str] = {}
        self._shapes: dict[str, list[tuple[str, int, Dims, tuple[torch.dtype, ...]]]] = {}
        for kind, argument, text in re.findall(r"(int64 )?(\w+)\[([^\]]*)\]", shapes):
            parts = text.split(", ")
            free = parts.index("...") if "..." in parts else -1
            sizes = [re.fullmatch(r"(\d*)([A-Za-z]+)", part) for part in parts if part != "..."]
            dims = tuple((int(size[1] or 1), size[2]) for size in sizes if size)
            shape = (f"[{text}]", free, dims, (torch.int64,) if kind else FLOATS)
            self._shapes.setdefault(argument, []).append(shape)
        backend.register(name, *implementations)

    def check(self, asked: Any, eps: Any = 0.0, sizes: dict[str, Any] | None = None, /, **tensors: Any) -> Any:
        """Raises UserError, in one line naming the culprit, unless tensors, backend and eps are what the op takes.

        tensors: by name, optional ones only where they are given; "name[3]" is one of several of one shape. sizes:
        those that are known beforehand. Returns what `choose` takes as `given`, so that it need not look again.
        """
        remembers = type(asked) is str and type(eps) is float and not torch.compiler.is_compiling()
        for name, x in tensors.items():  # of a nested one, the look below would end the process
            if getattr(x, "is_nested", False):
                require_tensor(self.name, name, x)
        key = (asked, eps, *tensors, *(sizes.values() if sizes else ()))
        if remembers and (found := self._checked.find(key, (*tensors.values(),))) is not None:
            return found
        sizes = {} if sizes is None else sizes
        first, device = "", None
        for name, x in tensors.items():
            shapes = self._shapes.get(name) or self._shapes[name.split("[")[0]]
            text, _, _, dtypes = shapes[0]
            if not isinstance(x, Tensor) or x.layout is not _STRIDED or x.dtype not in dtypes:
                require_tensor(self.name, name, x)
                kinds = "floating point (fp32, bf16, fp16 or fp64)" if dtypes is FLOATS else "int64"
                raise UserError(f"{self.name}: {name} must be {kinds}, not {x.dtype}")
            if first and x.device != device:
                raise UserError(f"{self.name}: {name} is on {x.device}, {first} on {device}; move them to one device")
            for _, free, dims, _ in shapes:
                if _fits(x.shape, free, dims, sizes):
                    break
            else:
                texts = " or ".join(f"{text}{_known(free, dims, sizes)}" for text, free, dims, _ in shapes)
                raise UserError(f"{self.name}: {name} must be {texts}, not {list(x.shape)}")
            if not first:
                first, device = name, x.device
                if not (x.numel() if self._nonempty else x.shape[-1]):
                    least = "element" if self._nonempty else "channel"
                    raise UserError(
                        f"{self.name}: {name} must be {text} with at least one {least}, not {list(x.shape)}"
                    )
        if not isinstance(asked, str):
            raise UserError(f'{self.name}: backend must be a name such as "auto", not {type(asked).__name__}')
        if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not 0 <= eps < math.inf:
            given = eps if isinstance(eps, (int, float, str)) else type(eps).__name__
            raise UserError(f"{self.name}: eps must be a finite number >= 0, not {given!r}")
        remembers = remembers and all(type(each) in PLAIN for each in tensors.values())
        return self._checked.keep(key, (*tensors.values(),), object()) if remembers else None

    def check_dtype(self, out_dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype that was asked for. Raises UserError where it is none of a result's."""
        if out_dtype is not None and out_dtype not in FLOATS:
            raise UserError(f"{self.name}: out_dtype must be fp32, bf16, fp16 or fp64, not {out_dtype}")
        return out_dtype

    def choose(self, asked: str, device: torch.device, *arguments: Any, given: Any = None) -> str:
        """The implementation of this call; `arguments` are what the implementations' `refuses` look at.

        given: what `check` returned for tensors that say all about those among the arguments.
        """
        if asked == "torch":
            return asked
        kind = device.type
        if given is None:
            return backend.choose(self.name, asked, kind, *arguments)
        scalars = [each for each in arguments if not isinstance(each, Tensor)]
        key = (given, backend.forced(), autocast_dtype_of(kind), *scalars)
        found = self._chosen.get(key)
        return found or remember(self._chosen, key, backend.choose(self.name, asked, kind, *arguments))


def remember(memory: dict[Any, Any], key: Any, value: Any) -> Any:
    if len(memory) >= REMEMBERED:
        memory.clear()
    memory[key] = value
    return value


def _fits(shape: Sequence[int], free: int, dims: Dims, sizes: dict[str, Any]) -> bool:
    """Whether a shape agrees with `sizes`, which learns what the shape says of unknown ones."""
    if free >= 0:
        end = len(shape) - len(dims) + free
        if end < free or sizes.setdefault("...", shape[free:end]) != shape[free:end]:
            return False
        shape = (*shape[:free], *shape[end:])
    elif len(shape) != len(dims):
        return False
    for size, (factor, names) in zip(shape, dims):  # noqa: B905  the check above is faster than strict
        unknown = ""
        for name in names:
            known = sizes.get(name)
            if known is None:
                unknown = name
            elif factor == 1:
                factor = known
            else:
                factor = factor * known
        if not unknown:
            if size != factor:
                return False
        elif factor == 1:
            sizes[unknown] = size
        elif not factor or size % factor:
            return False
        else:
            sizes[unknown] = size // factor
    return True


def _known(free: int, dims: Dims, sizes: dict[str, Any]) -> str:
    """ " = [2, 3, 9C]": the shape as far as it is known; nothing where it is not at all."""
    parts = []
    if not any(name in sizes for _, names in dims for name in names):
        return ""
    for factor, names in dims:
        unknown = "".join(name for name in names if name not in sizes)
        product = math.prod((sizes[name] for name in names if name in sizes), start=factor)
        parts.append(f"{product if product > 1 or not unknown else ''}{unknown}")
    if free >= 0:
        parts[free:free] = map(str, sizes.get("...", ["..."]))
    return f" = [{', '.join(parts)}]"


def check_norm(op: str, norm: Any, *kinds: str) -> None:
    """Raises UserError unless `norm` is one of the kinds that the op has."""
    if norm not in kinds:
        given = norm if isinstance(norm, str) else type(norm).__name__
        raise UserError(f"{op}: norm must be one of {', '.join(kinds)}, not {given!r}")


def require_tensor(op: str, name: str, value: Any) -> None:
    """Raises UserError unless value is a tensor that ops can take, and says what to give where a layer lacks a part."""
    if not isinstance(value, Tensor):
        given = "None" if value is None else type(value).__name__
        instead = ""
        if value is None and name.endswith("bias"):
            instead = "; for a layer without one give zeros"
        elif value is None and name.endswith(("norm_weight", "q_weight", "k_weight")):
            instead = "; for a norm without one give ones"
        raise UserError(f"{op}: {name} must be a tensor, not {given}{instead}")
    if value.is_nested:
        raise UserError(f"{op}: {name} must be a dense tensor, not a nested one; pad it")
    if value.layout != torch.strided:
        raise UserError(f"{op}: {name} must be a dense tensor, not {value.layout}; give {name}.to_dense()")
    if value.dtype.itemsize == 1 and value.is_floating_point():
        raise UserError(f"{op}: {name} must be of 16, 32 or 64 bits, not {value.dtype}; give {name}.bfloat16()")


def odd_dtypes(*tensors: Tensor) -> list[str]:
    """Reasons why compiled implementations cannot take these tensors; empty if they can."""
    odd = {x.dtype: None for x in tensors if x.dtype not in FUSED}
    return [f"some input is {dtype}, not float32, bfloat16 or float16" for dtype in odd]


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float32, or float64 where an input is."""
    for x in tensors:
        if x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def rows(x: Tensor) -> Tensor:
    """x, or a copy, with contiguous rows [..., D]."""
    return x if x.stride(-1) == 1 else x.contiguous()


_unwrapped = torch._C._functorch.unwrap_if_dead  # a tensor that outlived its level of torch.func


def differentiable(function: Any, name: str, instead: str = 'backend="torch"') -> Callable[..., Any]:
    """The differentiable function that an autograd.Function with forward, setup_context, backward and jvp describes.

    All its arguments are given by position. One derivative: where a second one would come out as zero, UserError names
    the op and what has one (`instead`).
    Under the compiler, which refuses functions with a forward-mode rule, the class runs without.
    """
    refusal = f"{name}: no second derivative here; for one use {instead}"
    rule = function.jvp
    del function.jvp
    function.backward = staticmethod(guarded(function.backward, refusal))

    def jvp(ctx: Any, *tangents: Any) -> Any:
        if eager_transforms.JVP_NESTING > 1:  # a rule inside another level of torch.func.jvp
            raise UserError(refusal)
        return rule(ctx, *tangents)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    name = function.__name__.lstrip("_")
    eager: Any = type(name, (function,), {"jvp": staticmethod(jvp)})
    # Without levels of torch.func one Python call does for two.
    apart = staticmethod(torch.autograd.Function.setup_context)
    alone: Any = type(name, (eager,), {"forward": staticmethod(forward), "setup_context": apart})
    # torch's apply, but for its look at forward's signature: this cost 0.14 of 0.155 ms of a call of eleven arguments.
    run = super(torch.autograd.Function, alone).apply

    def apply(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return function.apply(*arguments)
        if torch._C._are_functorch_transforms_active():
            return eager.apply(*arguments)
        return run(*[_unwrapped(each) if isinstance(each, Tensor) else each for each in arguments])

    return apply


def guarded(backward: Callable[..., Any], refusal: str) -> Callable[..., Any]:
    """It costs something only with a graph of the backward (create_graph=True, torch.func)."""

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        if torch.compiler.is_compiling():
            return results
        present = [result for result in results if result is not None]
        causes = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.is_floating_point()]
        if not present:
            return results
        refusing = iter(_OneDerivative.apply(refusal, len(present), *present, *causes))
        return tuple(None if result is None else next(refusing) for result in results)

    return guarded


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


def spread(grads: Sequence[Tensor], needs: Sequence[bool], count: int) -> tuple[Tensor | None, ...]:
    """The gradients of a function's `count` arguments, from those of its first ones that are needed."""
    found = iter(grads)
    return *(next(found) if needed else None for needed in needs), *(None,) * (count - len(needs))
