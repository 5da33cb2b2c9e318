"""Functions of tensors that run again as the list of what they launched.

What an op or half of a block does follows from shapes, strides and dtypes: products, kernels, empty tensors, views. The
rest of its Python, look-ups by signature, choices and views of views, comes out the same every time, and takes longer
than the device. `traced` lets a function run twice, takes down the second time what reaches torch's dispatcher and
Triton, and writes Python of it, which runs from then on; Inductor's wrappers look like this:

    v1 = empty((8192, 1152), (1152, 1), c2)
    c3(256, 1, 1, s, c4, (a_x0, a_x1, a_v1))    # a kernel, by addresses
    v2 = addmm(x4, v1, w5)
    del v1

The launches are the same, in the same order, with the same arguments but for addresses; no tensor lives longer. Views
that only lead to another view or to an address are left out.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, overrides
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from dit_fast.ops._kinds import Kinds
from dit_fast.ops._register import ABOVE, PLAIN, lies_plain

logger = logging.getLogger(__name__)
aten = torch.ops.aten
_ALIGNMENT = 16  # bytes; kernels were compiled for addresses that are multiples of it
_EMPTY = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
# Python's functions for these cost a third of the calls of torch.ops.
_QUICK = {
    aten.addmm.default: torch.addmm,
    aten.cat.default: torch.cat,
    aten.gelu.default: torch._C._nn.gelu,
    aten.mm.default: torch.mm,
    aten.mm.dtype: torch.mm,
    aten.sum.dim_IntList: torch.sum,
}
_RECORDING = threading.Lock()  # one thread listens to launches; another's call comes again
_ONCE = object()
_PROGRAMS = Kinds()  # _ONCE where a function ran, then its program, or the reason why it has none


def traced(function: Any, facts: tuple[Any, ...], *given: Tensor | None) -> Any:
    """`function(*facts, *given)`, from the third call of a kind on as the list of what the second one did.

    Of a kind are calls with equal facts and with tensors that are alike (`Kinds`). facts: all that the function goes by
    beside its tensors, hashable. function: without derivatives, in-place writes to its arguments or looks at values; a
    side effect would come twice only. It runs as it is where it cannot be written down, while something hangs on
    Triton's launches, and with an address that is no multiple of 16 bytes.
    """
    present = [each for each in given if each is not None]
    key = (function, facts, None if len(present) == len(given) else tuple([each is None for each in given]))
    program = _PROGRAMS.find(key, present)
    if type(program) is FunctionType:
        with torch._C._ExcludeDispatchKeyGuard(ABOVE):
            results = program(*given)
        return function(*facts, *given) if results is None else results
    if program is None:
        if all(type(each) in PLAIN and lies_plain(each) for each in present):  # others are the dispatcher's
            _PROGRAMS.keep(key, present, _ONCE)
    elif program is _ONCE and _can_be_taken_down(present) and _RECORDING.acquire(blocking=False):
        try:
            results, program = _Trace(given).run(lambda: function(*facts, *given))
            _PROGRAMS.keep(key, present, program)
        finally:
            _RECORDING.release()
        if isinstance(program, str):
            logger.warning("%s keeps its Python, which takes longer: %s", function.__qualname__, program)
        return results
    return function(*facts, *given)


def _can_be_taken_down(given: Sequence[Tensor]) -> bool:
    """Whether what this call does is what others of its kind do. Of one tensor in two places a program would not know
    which is read; odd addresses take other kernels; a mode of torch functions may change what is called."""
    modes = overrides._get_current_function_mode_stack()
    return (
        len({id(each) for each in given}) == len(given)
        and not any(each.data_ptr() % _ALIGNMENT for each in given)
        and all(isinstance(mode, DeviceContext) for mode in modes)
    )


class _Refused(Exception):
    """Why a function has no program."""


class _Line(NamedTuple):
    """A line of the program, the names that it makes and those that it reads. kept: whether or not these are read."""

    text: str
    makes: Sequence[str]
    reads: set[str]
    kept: bool = True


class _Owner(NamedTuple):
    """Of an argument or of what an operator made: shape and strides, first byte in its memory, dtype."""

    form: tuple[Any, ...]
    start: Any
    dtype: torch.dtype


class _Trace(TorchDispatchMode):
    """Names: x0 are arguments, v1 what operators made, w2 views of either, c3 constants, a_x0 addresses.

    An empty tensor that is read by its address and as a view of all of it is made in that view's shape.
    """

    def __init__(self, arguments: Sequence[Tensor | None]):
        super().__init__()
        self._given = arguments
        self._arguments = [f"x{place}" for place in range(len(arguments))]
        self._owners: dict[str, _Owner] = {}
        self._known: Any = WeakTensorKeyDictionary()  # the owner of its memory; no tensor lives longer for being known
        self._views: dict[Any, str] = {}
        self._empty: dict[str, str] = {}  # those that nobody has read as they are, and their dtypes
        self._lines: list[_Line] = []
        self._count = 0
        self._reason: str | None = None
        inductors: Any = torch._C._dynamo.guards
        self._space: dict[str, Any] = {"part": inductors._reinterpret_tensor}
        for name, tensor in zip(self._arguments, arguments, strict=True):
            if tensor is not None:
                self._own(name, tensor)

    def run(self, call: Callable[[], Sequence[Tensor | None]]) -> tuple[Sequence[Tensor | None], Any]:
        """The call's results, and its program or the reason why it has none."""
        from dit_fast.kernels import launch

        with launch.listening(self._launched), self:
            results = call()
        try:
            program = self._program(results, launch.hooked)
        except _Refused as reason:
            return results, str(reason)
        return results, program

    def _refuse(self, reason: str) -> None:
        self._reason = self._reason or reason

    def _name(self, letter: str) -> str:
        self._count += 1
        return f"{letter}{self._count}"

    def _constant(self, value: Any) -> str:
        name = self._name("c")
        self._space[name] = value
        return name

    def _own(self, name: str, tensor: Tensor) -> str:
        self._owners[name], self._known[tensor] = _Owner(_form(tensor), _start(tensor), tensor.dtype), name
        return name

    def _owner(self, tensor: Tensor) -> str:
        found: str | None = self._known.get(tensor)
        if found is None:
            self._refuse("it reads a tensor that it was not given")
        return found or "None"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        forms = [_form(each) for each in given]
        results = func(*args, **kwargs)
        made = results if isinstance(results, tuple | list) else (results,)
        if func.namespace != "aten" or not made or not all(isinstance(each, Tensor) for each in made):
            self._refuse(f"it calls {func}")  # whose launches would be seen twice, or whose result Python reads
            return results
        if func in _EMPTY:
            name = self._own(self._name("v"), results)
            self._space["empty"], self._empty[name] = _maker_on(results.device), self._constant(results.dtype)
            self._lines.append(_Line(self._emptied(name, _form(results)), (name,), set(), kept=False))
            return results
        if any(each is other for each in made for other in given):  # written into
            if forms != [_form(each) for each in given]:
                self._refuse(f"{func} changes a shape")
            reads: set[str] = set()
            self._lines.append(_Line(self._call(func, args, kwargs, reads), (), reads))
        elif given and all(_memory(each) == _memory(given[0]) for each in made):
            owner = self._owner(given[0])
            for each in made:
                self._known[each] = owner
        else:
            reads = set()
            call = self._call(func, args, kwargs, reads)
            names = [self._own(self._name("v"), each) for each in made]
            left = names[0] if isinstance(results, Tensor) else ", ".join(names) + ","
            self._lines.append(_Line(f"{left} = {call}", names, reads))
        return results

    def _emptied(self, name: str, form: tuple[Any, ...]) -> str:
        return f"{name} = empty({tuple(form[0])}, {form[1]}, {self._empty[name]})"

    def _call(self, func: Any, args: Any, kwargs: Any, reads: set[str]) -> str:
        if func is aten._to_copy.default and list(kwargs) == ["dtype"]:
            return f"{self._text(args[0], reads)}.to({self._constant(kwargs['dtype'])}, copy=True)"
        parts = [self._text(each, reads) for each in args]
        parts += [f"{name}={self._text(each, reads)}" for name, each in kwargs.items()]
        return f"{self._constant(_QUICK.get(func, func))}({', '.join(parts)})"

    def _text(self, value: Any, reads: set[str]) -> str:
        if isinstance(value, Tensor):
            return self._tensor(value, reads)
        if isinstance(value, tuple | list):
            return f"[{', '.join(self._text(each, reads) for each in value)}]"
        return self._value(value)

    def _value(self, value: Any) -> str:
        return repr(value) if value is None or isinstance(value, int) else self._constant(value)

    def _tensor(self, tensor: Tensor, reads: set[str]) -> str:
        """Its name, after the line that makes it where it is a view."""
        name = self._owner(tensor)
        form, at, dtype = self._owners.get(name) or _Owner(_form(tensor), _start(tensor), tensor.dtype)
        reads.add(name)
        if tensor.dtype != dtype:
            self._refuse("it reads memory as another dtype")
        start = (_start(tensor) - at) // tensor.element_size()
        if any(tensor is each for each in self._given) or (name[0] == "v" and _form(tensor) == form and not start):
            self._empty.pop(name, None)
            return name
        key = (name, _form(tensor), start)
        if key not in self._views:
            self._views[key] = view = self._name("w")
            sizes = f"{tuple(tensor.shape)}, {tensor.stride()}"  # and elements from the owner's first one on
            self._lines.append(_Line(f"{view} = part({name}, {sizes}, {start})", (view,), {name}))
        reads.add(self._views[key])
        return self._views[key]

    def _launched(self, launch: Any, direct: Any, tensors: Sequence[Tensor]) -> None:
        if launch is None:
            self._refuse("it launches a kernel without a launcher")
        reads: set[str] = set()
        parts = []
        for tensor in tensors:
            name = self._owner(tensor)
            start = _start(tensor) - self._owners[name].start if name in self._owners else 0
            if start % _ALIGNMENT:
                self._refuse("a kernel takes an address that is no multiple of 16 bytes")
            reads |= {name, f"a_{name}"}
            parts.append(f"a_{name} + {start}" if start else f"a_{name}")
        if direct is None:
            text = f"{self._constant(launch)}({', '.join(self._tensor(each, reads) for each in tensors)})"
        else:
            text = self._launch(direct, parts)
        self._lines.append(_Line(text, (), reads))

    def _launch(self, direct: Any, addresses: Sequence[str]) -> str:
        """`Direct` without its Python; all of a program are of one stream."""
        self._space |= {"stream": direct.stream, "device": direct.device}
        launch, *before = map(self._value, (direct.launch, *direct.sizes, *direct.middle))
        given = ", ".join([*addresses, *map(self._value, direct.rest)])
        before.insert(len(direct.sizes), "s")
        return f"{launch}({', '.join(before)}, {f'({given},)' if direct.in_a_tuple else given})"

    def _in_their_views_shapes(self, lines: Sequence[_Line]) -> list[_Line]:
        texts: dict[str, str] = {}
        for (name, form, start), view in self._views.items():
            whole = name in self._empty and not start and _extent(form) == _extent(self._owners[name].form)
            if whole and name not in texts:
                texts |= {name: self._emptied(name, form), view: f"{view} = {name}"}
        return [line._replace(text=texts.get("".join(line.makes), line.text)) for line in lines]

    def _program(self, results: Sequence[Tensor | None], hooked: Callable[[], bool]) -> Callable[..., Any]:
        reads: set[str] = set()
        ends = [self._text(each, reads) for each in results]
        if self._reason:
            raise _Refused(self._reason)
        lines = [*self._lines, _Line(f"return {', '.join(ends)},", (), reads)]
        read = {name for line in lines for name in line.reads}
        lines = [line for line in lines if line.kept or not read.isdisjoint(line.makes)]
        lines = self._in_their_views_shapes(lines)
        addresses = [f"a_{name}" for name in self._arguments if f"a_{name}" in read]
        text = [f"def program({', '.join(self._arguments)}):"]
        text += [f"{each} = {each[2:]}.data_ptr()" for each in addresses]
        odd = f" or ({' | '.join(addresses)}) % {_ALIGNMENT}" if addresses else ""
        text.append(f"if hooked(){odd}: return None")
        text += ["s = stream(device)"] * ("stream" in self._space)
        last = {name: place for place, line in enumerate(lines) for name in (*line.makes, *line.reads)}
        for place, line in enumerate(lines):
            text.append(line.text)
            text += [f"a_{name} = {name}.data_ptr()" for name in line.makes if f"a_{name}" in read]
            over = [name for name in sorted({*line.makes, *line.reads}) if name[0] in "vw" and last[name] == place]
            if over and place + 1 < len(lines):
                text.append(f"del {', '.join(over)}")
        space = self._space | {"hooked": hooked}
        exec("\n    ".join(text), space)
        program: Callable[..., Any] = space["program"]
        program.__doc__ = "\n".join(text)
        return program


def _maker_on(device: torch.device) -> Any:
    """(shape, strides, dtype) -> an empty tensor on that device, the current one; in a third of the time where torch
    has what Inductor's programs use."""
    quick = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    return quick or (lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device))


def _memory(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride()


def _extent(form: tuple[Any, ...]) -> int:
    """Elements from the first one to the last one in memory."""
    sizes, strides = form
    return 0 if 0 in sizes else 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def _start(tensor: Tensor) -> Any:
    return tensor.storage_offset() * tensor.element_size()
