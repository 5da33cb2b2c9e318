"""A CUDA device on a machine without one: import this before torch, and "cuda:0" is a fake GPU in this process.

Tensors made in `trace()` have shapes, strides, dtypes and addresses, but no elements (torch's FakeTensorMode).
Dispatch, autograd, the real implementations of registered ops and Triton's own path to a launch run as on the GPU that
FAKE_GPU names (an architecture: 80, 90, 120; by default 90); what the driver would launch is written down instead.
Needs a torch without CUDA and a C++ compiler.

    from tests.ops.fake_device import trace      # the first import of the process
    with trace() as found:
        step()
    found.kernels                                # launches of our kernels by name
    found.aten                                   # torch's own operations on tensors of the GPU, views left out
    found.reads                                  # places where the host asked for an element, each a wait on a GPU
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import traceback
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ARCH = int(os.environ.get("FAKE_GPU", "90"))
# Multiprocessors, largest shared memory of a block in bytes: A100, H200, RTX 5090.
PROCESSORS, SHARED = {80: (108, 166_912), 90: (132, 232_448), 120: (170, 101_376)}[ARCH]


def library() -> Path:
    """The compiled fake_device.cpp. Raises CalledProcessError where the compiler does."""
    (place,) = importlib.util.find_spec("torch").submodule_search_locations
    source = HERE / "fake_device.cpp"
    version = Path(place, "version.py").read_bytes()
    identity = hashlib.sha256(version + source.read_bytes()).hexdigest()[:16]
    built = HERE.parents[1] / ".cache" / f"fake_device-{identity}.so"
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        partial = built.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{place}/include", f"-L{place}/lib"]
        libraries = ["-ltorch_cpu", "-lc10", f"-Wl,-rpath,{place}/lib"]
        subprocess.run([os.environ.get("CXX", "g++"), *flags, source, "-o", partial, *libraries], check=True)
        partial.rename(built)
    return built


if "torch" in sys.modules:
    raise ImportError("tests.ops.fake_device must be imported before torch, whose first look for a device is final")
ctypes.CDLL(str(library()))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

if torch.version.cuda is not None:
    raise ImportError(f"tests.ops.fake_device needs a torch without CUDA, not {torch.__version__}")

GPU = torch.device("cuda", 0)


def _fake_gpu() -> None:
    properties = types.SimpleNamespace(
        name=f"fake sm_{ARCH}",
        major=ARCH // 10,
        minor=ARCH % 10,
        multi_processor_count=PROCESSORS,
        shared_memory_per_block_optin=SHARED,
        total_memory=140 << 30,
        L2_cache_size=50 << 20,
    )
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (ARCH // 10, ARCH % 10),
        "get_device_properties": properties,
        "get_device_name": properties.name,
        "current_stream": types.SimpleNamespace(cuda_stream=0),
        "is_current_stream_capturing": False,
        "is_bf16_supported": True,
        "synchronize": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.nn.functional.scaled_dot_product_attention = _attention
    for function in ("tensor", "as_tensor"):
        setattr(torch, function, _copied(getattr(torch, function)))
    fake_tensor.init_gpu_context = lambda device: None
    fake_tensor.CONSTANT_NUMEL_LIMIT = -1  # else numbers that are known are computed with, on this very device
    FakeTensor.data_ptr = _address


def _copied(function: Any) -> Any:
    """Of Python numbers torch makes a tensor on the CPU and copies it, below what a mode can see."""

    @functools.wraps(function)
    def run(data: Any, *arguments: Any, device: Any = None, **options: Any) -> Tensor:
        place = torch.get_default_device() if device is None else torch.device(device)
        if place.type != "cuda" or isinstance(data, Tensor):
            return function(data, *arguments, device=device, **options)
        return function(data, *arguments, device="cpu", **options).to(place)

    return run


_plain_attention = torch.nn.functional.scaled_dot_product_attention


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """What a GPU takes: the choice is made in code that only torch for CUDA has."""
    if not query.is_cuda or any(options.values()):
        return _plain_attention(query, key, value, **options)
    if query.dtype.itemsize == 2:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, query.requires_grad)[0]


def _address(self: FakeTensor) -> int:
    """As the caching allocator has them: every storage at a multiple of 512 bytes."""
    storage = self.untyped_storage()
    return (storage._cdata >> 4 << 9) + self.storage_offset() * self.element_size()


_fake_gpu()


class Variant(NamedTuple):
    """What a launch asks the compiler for."""

    kernel: JITFunction
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any  # of the backend

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.rsplit('.', 1)[-1]}.{self.kernel.fn.__name__}"

    def source(self) -> ASTSource:
        return ASTSource(self.kernel, self.signature, self.constants, self.attributes)


class Launch(NamedTuple):
    variant: Variant
    grid: tuple[int, int, int]
    op: str  # the registered op that it was made in


@dataclass
class Trace:
    """What `trace` found. mismatches: ops whose results are not what their fake promises, one line each."""

    launches: list[Launch] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)  # of registered ops
    aten: Counter[str] = field(default_factory=Counter)
    reads: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)

    def __add__(self, other: "Trace") -> "Trace":
        return Trace(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    @property
    def kernels(self) -> Counter[str]:
        return Counter(launch.variant.name for launch in self.launches)

    @property
    def variants(self) -> dict[str, Variant]:
        """The different ones, by a text that tells them apart."""
        return {_text(launch.variant): launch.variant for launch in self.launches}

    @property
    def total(self) -> int:
        """Launches in all, of our kernels and of torch's operations (one each, which is the least)."""
        return len(self.launches) + sum(self.aten.values())


def _text(variant: Variant) -> str:
    parts = (variant.signature, variant.constants, variant.attributes, variant.options.__dict__)
    return f"{variant.name} {parts}"


_NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
_traces: list[Trace] = []  # those entered; the last one fills
_ops: list[str] = [""]  # registered ops that run now


class _Compiled:
    """Stands where Triton keeps a compiled kernel, and writes down what it is launched with."""

    function, packed_metadata, kernel = 0, (), b""

    def __init__(self, variant: Variant):
        self.variant = variant
        self.src = variant.source()
        self.name = variant.name

    def launch_metadata(self, grid: Any, stream: int, *arguments: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        if not 0 < x < 1 << 31 or not 0 < y < 1 << 16 or not 0 < z < 1 << 16:
            raise ValueError(f"{self.name}: a grid of {x, y, z} cannot be launched")
        _traces[-1].launches.append(Launch(self.variant, (x, y, z), _ops[-1]))


def _do_not_compile(
    self: JITFunction, key: str, signature: Any, device: int, constants: Any, options: Any, attributes: Any, warmup: Any
) -> _Compiled:
    compiled = _Compiled(Variant(self, signature, constants, attributes, options))
    self.device_caches[device][0][key] = compiled
    return compiled


class _Driver:
    """The part of Triton's driver that comes before a launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return GPU


if "STUB_SHARED" not in os.environ:  # else Triton's own driver loads the stub (stub_driver.py)
    JITFunction._do_compile = _do_not_compile
    driver.set_active(_Driver())


@contextlib.contextmanager
def trace() -> Iterator[Trace]:
    """Inside, tensors are fake, and a `Trace` fills, unless there is one further inside."""
    outermost = not _traces
    _traces.append(Trace())
    try:
        with contextlib.ExitStack() as stack:
            if outermost:
                stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
                stack.enter_context(_Watch())
                # Else a thread of the GPU's own runs the backward, without these modes.
                stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            yield _traces[-1]
    finally:
        _traces.pop()


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            return self._read(arguments[0])
        if function.namespace == "dit_fast":
            return self._registered(function, arguments, options)
        result = function(*arguments, **options)
        if function.namespace == "aten" and _launches(function) and _on_gpu((arguments, options, result)):
            _traces[-1].aten[str(function)] += 1
        return result

    def _read(self, x: Tensor) -> Any:
        """Some value: only flags and counters are read, and a step goes on with "yes" and with 1."""
        if x.is_cuda:
            caller = next(
                (f"{line.filename}:{line.lineno}" for line in reversed(traceback.extract_stack())
                 if "/torch/" not in line.filename and line.filename != __file__), "torch"
            )  # fmt: skip
            _traces[-1].reads.append(caller)
        return {torch.bool: True}.get(x.dtype, 1.0 if x.is_floating_point() else 1)

    def _registered(self, function: Any, arguments: Any, options: Any) -> Any:
        name = function._schema.name.split("::")[1]
        _traces[-1].calls[name] += 1
        promised = function(*arguments, **options)
        _ops.append(name)
        try:
            with self:
                result = function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments, **options)
        finally:
            _ops.pop()
        _traces[-1].mismatches += _differences(name, promised, result, (arguments, options))
        return result


def _launches(function: Any) -> bool:
    return not function.is_view and function._schema.name.split("::")[1] not in _NO_LAUNCH


def _on_gpu(tree: Any) -> bool:
    return any(isinstance(x, Tensor) and x.is_cuda for x in tree_flatten(tree)[0])


def _differences(name: str, promised: Any, result: Any, inputs: Any) -> list[str]:
    ours, theirs = tree_flatten(result)[0], tree_flatten(promised)[0]
    if len(ours) != len(theirs):
        return [f"{name}: {len(ours)} results, its fake promises {len(theirs)}"]
    given = {x.untyped_storage()._cdata for x in tree_flatten(inputs)[0] if isinstance(x, Tensor)}
    lines = []
    for place, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        described: list[Any] = [type(own), type(other)]  # a number may come from addresses, which a fake has none of
        if isinstance(own, Tensor) and isinstance(other, Tensor):
            described = [(tuple(x.shape), x.stride(), x.dtype, x.device) for x in (own, other)]
        if described[0] != described[1]:
            lines.append(f"{name}: result {place} is {described[0]}, its fake promises {described[1]}")
        if isinstance(own, Tensor) and own.numel() and own.untyped_storage()._cdata in given:
            lines.append(f"{name}: result {place} lies in the memory of an argument")
    return lines
