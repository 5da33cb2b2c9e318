"""Triton without a GPU and without machine code, to time what the host does: every launch ends where C would begin.

`install` must come before `dit_fast.ops` is imported. Kernels then take CPU tensors, argument specialisation, cache
look-ups and Triton's Python launcher run as they are, and the C function that packs arguments and calls the driver does
nothing. Not counted is therefore that function itself: on a GPU a launch costs more on both sides.
"""

import atexit
import collections
import contextlib
import itertools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from dit_fast.errors import UserError

ARCH = 90
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}  # of our registered ops, by name


class _Utilities:
    """What Triton's C module offers, as far as a launch asks for it."""

    def __init__(self) -> None:
        self._handles = itertools.count(1)
        self.names: dict[int, str] = {}
        self.on_launch: Callable[..., None] | None = None

    def launch(self, *arguments: Any) -> None:
        if self.on_launch:
            self.on_launch(*arguments)

    def build_signature_metadata(self, signature: Any) -> bytes:
        return b""

    def fill_tma_descriptor_tiled(self, *arguments: Any) -> int:
        return 0

    fill_tma_descriptor = fill_tma_descriptor_tiled

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, *rest: Any) -> tuple[int, int, int, int, int]:
        handle = next(self._handles)
        self.names[handle] = name
        return handle, handle, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


def install() -> str:
    """Returns Triton's version. Raises UserError where Triton is missing."""
    if "dit_fast.ops" in sys.modules:
        raise RuntimeError("install() after dit_fast.ops was imported")
    # Results without machine code must not meet those of real compilations.
    os.environ["TRITON_CACHE_DIR"] = cache = tempfile.mkdtemp(prefix="null-triton-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    try:
        import triton
    except ImportError:
        raise UserError("triton is not installed; put .cache/triton-3.9.0 of this checkout on PYTHONPATH") from None
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    utilities = _Utilities()
    nvidia.compile_module_from_src = lambda **_: utilities  # Triton 3.6: one C module per signature
    nvidia.library_dirs = lambda: []
    nvidia.PyKernelArg, nvidia.ARG_TUPLE, nvidia.ARG_KERNEL, nvidia.ARG_CONSTEXPR = SimpleNamespace, 0, 1, 2
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", ARCH, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
            utils=utilities,
            launcher_cls=nvidia.CudaLauncher,
        )
    )
    _stop_after_front_end(backends["nvidia"].compiler)
    library = _library()
    _on_cpu_tensors()
    _keep_implementations()
    _products_as_on_cuda()
    if library:
        _optimizer_as_on_cuda()
    return str(triton.__version__)


def _stop_after_front_end(compiler: Any) -> None:
    add_stages = compiler.add_stages
    facts = {
        "shared": 0, "name": "", "global_scratch_size": 0, "global_scratch_align": 1, "profile_scratch_size": 0,
        "profile_scratch_align": 1, "tmem_size": 0,
    }  # fmt: skip
    bulk = {"swizzle": 3, "elem_size": 2, "elem_type": 8, "block_size": [64, 64], "fp4_padded": False}

    def only_the_front_end(self: Any, stages: dict[str, Any], *arguments: Any) -> None:
        add_stages(self, stages, *arguments)

        def nothing(source: Any, metadata: dict[str, Any]) -> bytes:
            head = re.search(r"tt\.func public @(\w+).*", str(source))
            if head:  # later stages are given what the first one left: nothing
                metadata.update(facts, name=head[1], tensordesc_meta=[bulk] * head[0].count("!tt.tensordesc"))
            return b""

        stages.update(dict.fromkeys(list(stages)[1:], nothing))

    compiler.add_stages = only_the_front_end


def _on_cpu_tensors() -> None:
    """What CUDA tensors would get: the Triton kernels wherever they are automatic there, no C++."""
    from dit_fast import _C, backend, kernels
    from dit_fast.kernels import long_skip_tiles

    kernels.devices = lambda: ("cpu", "cuda")
    kernels.unavailable = lambda: None
    _C.unavailable = lambda: "as on CUDA"  # type: ignore[assignment]
    backend._automatic = lambda implementation, device_type: (
        implementation.automatic is None or "cuda" in implementation.automatic
    )
    long_skip_tiles.family = lambda device: ARCH
    long_skip_tiles.processors = lambda device: 132


def _products_as_on_cuda() -> None:
    """Attention by torch's SDPA, and products with results of another dtype, which torch has on CUDA alone: the same
    launch, its result not written."""
    from dit_fast.nn import attention
    from dit_fast.ops import linear, long_skip_rows

    attention.PLAIN_ON_CPU.clear()

    def wide(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        made = torch.mm(a, b)
        return made.new_empty(made.shape, dtype=dtype)

    linear.widens = lambda x: not torch.is_grad_enabled()
    linear.wide_product = wide
    long_skip_rows._matmul_wide = wide  # type: ignore[assignment]


def _library() -> bool:
    from dit_fast import _C

    return _C.unavailable() is None


def _optimizer_as_on_cuda() -> None:
    """One call of csrc's, whose C++ stands for its CUDA, with its arithmetic counted."""
    from dit_fast import backend
    from dit_fast.ops import adamw

    backend.register(adamw.OP, backend.Implementation("cpp", ("cpu",), lambda: None))


def _keep_implementations() -> None:
    register = torch.library.Library.impl

    def impl(self: Any, name: Any, function: Any, *rest: Any, **options: Any) -> Any:
        if self.ns == "dit_fast":
            IMPLEMENTATIONS[str(name)] = function
        return register(self, name, function, *rest, **options)

    torch.library.Library.impl = impl  # type: ignore[method-assign, assignment]


@contextlib.contextmanager
def counting() -> Iterator[collections.Counter[str]]:
    """Launches inside, by kernel."""
    from triton.runtime import driver

    counted: collections.Counter[str] = collections.Counter()
    utilities = driver.active.utils
    utilities.on_launch = lambda *arguments: counted.update([utilities.names[arguments[4]]])
    try:
        yield counted
    finally:
        utilities.on_launch = None
