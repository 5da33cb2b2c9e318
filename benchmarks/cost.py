"""Costs other than time: peak memory, bytes that operators move, waits for the device."""

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HOST_READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"}

NO_TRAFFIC = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
OVERWRITES = {"copy_", "fill_", "zero_"}  # in place, and without a look at what was there


def peak_memory(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes that `work` has allocated at once beyond what was allocated before it; its result counts."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = work()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    allocations = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    held = peak = 0
    for event in allocations:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.moved = self.reads = 0
        self.fused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.reads += name in HOST_READS
        self.fused |= func.namespace.startswith("dit_fast")
        self.moved += moved(func, args, kwargs, result)
        return result


def moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that a call of an operator moves by its schema: arguments read, results written, those in place both."""
    name = func.overloadpacket.__name__
    if func.is_view or name in NO_TRAFFIC:
        return 0
    reads = not name.startswith("new_") and not name.endswith("_like")
    keeps = name not in OVERWRITES and func.namespace != "dit_fast_native"  # whose results are arguments
    total = 0
    for place, argument in enumerate(func._schema.arguments):
        size = sum(map(_size, _tensors(args[place] if place < len(args) else kwargs.get(argument.name))))
        written = argument.alias_info is not None and argument.alias_info.is_write
        total += size * (written + (reads and (not written or (keeps and not argument.is_out))))
    if any(form.alias_info is not None for form in func._schema.returns):
        return total  # results that are arguments
    return total + sum(map(_size, _tensors(result)))


def traffic(work: Callable[[], Any]) -> int | None:
    """Bytes that the operators of `work` move: tensor arguments and results of each, views free. None where one of our
    own operators runs, for which arguments do not say what it reads."""
    with _Count() as count:
        work()
    return None if count.fused else count.moved


def host_waits(work: Callable[[], Any], device: torch.device) -> int:
    """How often the host waits for the device during `work`: CUDA's own count; elsewhere the operators whose result
    Python reads, each of which would be a wait on a GPU."""
    if device.type != "cuda":
        with _Count() as count:
            work()
        return count.reads
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, dict):
        yield from _tensors(list(nested.values()))
    elif isinstance(nested, list | tuple):
        for item in nested:
            yield from _tensors(item)


def _size(x: Tensor) -> int:
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
