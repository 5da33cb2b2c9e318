"""Launches that look a kernel up once.

`kernel[grid](...)` binds the arguments, looks at each for its type, divisibility by 16 and value 1, and makes a key of
strings of them, at every launch: 40 to 60 us of Python. What decides are shapes, strides and types, so a launcher makes
one `launcher` per `signature` of its arguments and keeps it. The first launch goes the ordinary way and gives the
compiled kernel; later ones hand addresses to the C function that Triton's own launcher would call. Addresses that are
no multiples of 16 take another kernel, and the ordinary way; so does everything under hooks (profilers), under the
interpreter and with a version of Triton whose C function is not known here (`ordinary_launches`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, reduce
from operator import or_
from threading import get_ident
from typing import Any, NamedTuple

import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import driver
from triton.runtime.jit import KernelInterface
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_fast.kernels import ordinary_launches

ALIGNMENT = 16  # bytes; what Triton specialises a pointer for
KEPT = 4096
_runtime = triton.knobs.runtime
_note: Callable[..., None] | None = None  # hears of launches: `listening`
_new = object.__new__  # of a descriptor whose shape and strides were checked when their signature came first


class Kept(dict[Any, Any]):
    """What was made for a signature. Emptied when it is full: shapes that change all the time gain nothing by it."""

    def keep(self, key: Any, value: Any) -> Any:
        if len(self) >= KEPT:
            self.clear()
        self[key] = value
        return value


def signature(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Device of the first, which is not None; shape, strides and dtype of each."""
    parts: list[Any] = [tensors[0].device]  # type: ignore[union-attr]
    for tensor in tensors:
        parts += (None,) if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)
    return tuple(parts)


def launcher(
    kernel: Any,
    grid: tuple[int, ...],
    numbers: Sequence[Any],
    constants: Mapping[str, Any],
    unaligned: Mapping[str, Any] | None = None,
    tiles: Sequence[tuple[int, ...]] = (),
) -> Callable[..., None]:
    """What launches `kernel` on tensors of one signature, given in the order of its first parameters.

    numbers: the parameters after them, integers, floats or tuples of those; constants: the constexpr ones, all of the
    rest, and the options of a launch. unaligned: constants that are other ones where some address is no multiple of 16
    bytes. tiles: of the first tensors, which the kernel takes as descriptors of tiles of these sizes.
    """
    direct: Direct | None = None
    run = partial(kernel.run, grid=grid, warmup=False)
    known: list[dict[str, Any]] = []  # of the descriptors, all but the tensors

    def launch(*tensors: Tensor) -> None:
        nonlocal direct
        arguments: list[Any] = [tensor.data_ptr() for tensor in tensors]
        aligned = not reduce(or_, arguments) % ALIGNMENT
        if aligned and direct is not None and not hooked():
            if _note is not None:
                _note(launch, None if known else direct, tensors)
            for place, fields in enumerate(known):
                arguments[place] = described = _new(TensorDescriptor)
                described.__dict__ = fields | {"base": tensors[place]}
            direct(arguments)
            return
        if _note is not None:
            _note(launch, None, tensors)
        given: list[Any] = list(tensors)
        for place, tile in enumerate(tiles):
            given[place] = TensorDescriptor(given[place], [*given[place].shape], [*given[place].stride()], [*tile])
        # The interpreter's own operators are none of who listens.
        with nullcontext() if _note is None else _disable_current_modes():
            if aligned:
                known[:] = [{**vars(each), "base": None} for each in given[: len(tiles)]]
                direct = _direct(kernel, run(*given, *numbers, **constants), grid, numbers, constants)
            else:
                run(*given, *numbers, **{**constants, **(unaligned or {})})

    return launch


def hooked() -> bool:
    """Whether something, a profiler for one, hangs on Triton's launches."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@contextmanager
def listening(note: Callable[..., None]) -> Iterator[None]:
    """Inside, note(launch, direct, tensors) hears of this thread's launches: `launch` is what `launcher` made, `direct`
    what takes the tensors' addresses in its place, or None; launch is None for a kernel that is launched otherwise."""
    global _note
    here, ordinary = get_ident(), KernelInterface.__getitem__

    def heard(*given: Any) -> None:
        if get_ident() == here:
            note(*given)

    def otherwise(kernel: Any, grid: Any) -> Any:
        heard(None, None, ())
        return ordinary(kernel, grid)

    _note, KernelInterface.__getitem__ = heard, otherwise
    try:
        yield
    finally:
        _note, KernelInterface.__getitem__ = None, ordinary


def _direct(
    kernel: Any, compiled: Any, grid: Sequence[int], numbers: Sequence[Any], constants: Mapping[str, Any]
) -> Any:
    """The call of the C function with all but stream and addresses; None where it cannot be made, or is interpreted."""
    from triton.backends.nvidia.driver import CudaLauncher

    if compiled is None or ordinary_launches() or getattr(driver.active, "launcher_cls", None) is not CudaLauncher:
        return None
    run = compiled.run
    if type(run) is not CudaLauncher or run.global_scratch_size or run.profile_scratch_size:
        return None
    rest = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))
    x, y, z = (*grid, 1, 1)[:3]
    form = _FORMS[".".join(triton.__version__.split(".")[:2])]
    middle = form(run, compiled)
    if middle is None:
        return None
    where = driver.active.get_current_stream, driver.active.get_current_device()
    return Direct(run.launch, (x, y, z), *where, middle, rest, form is _form_3_9)


class Direct(NamedTuple):
    """Triton's C function, and all that it is given but the stream and the addresses of the kernel's first parameters.

    launch(*sizes, stream(device), *middle, *addresses, *rest)         or in a tuple (*addresses, *rest)
    """

    launch: Callable[..., None]
    sizes: tuple[int, int, int]
    stream: Callable[[int], int]
    device: int
    middle: tuple[Any, ...]
    rest: tuple[Any, ...]
    in_a_tuple: bool

    def __call__(self, addresses: Sequence[Any]) -> None:
        launch, sizes, stream, device, middle, rest, in_a_tuple = self
        given = (*addresses, *rest)
        launch(*sizes, stream(device), *middle, *((given,) if in_a_tuple else given))


def _form_3_6(run: Any, compiled: Any) -> tuple[Any, ...]:
    options = (run.launch_cooperative_grid, run.launch_pdl, None, None)
    return compiled.function, *options, compiled.packed_metadata, None, None, None


def _form_3_9(run: Any, compiled: Any) -> tuple[Any, ...] | None:
    if run.gsan_enabled:
        return None
    options = (run.launch_cooperative_grid, run.launch_pdl, compiled.packed_metadata, None, None, None, None, None)
    return compiled.function, *options, run.arg_annotations, run.kernel_signature


_FORMS: dict[str, Callable[..., Any]] = {"3.6": _form_3_6, "3.9": _form_3_9}
