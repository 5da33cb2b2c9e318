"""pytest plugin of the gate "semantics": the tests in interpreted/ on the IR that Triton compiles, executed by ttsem.

test_semantics.py starts it in a process without TRITON_INTERPRET, so kernels are defined as for a GPU (UPCAST off, the
casts that ship). Only then is the variable set, by which dispatch and fixtures take tensors of the CPU. ttsem checks
every access against the memory of a launch's arguments, and looks for races between programs. Two things it is told
here: rows that a kernel reaches through a table of addresses, and the ticket, whose order of memory it does not model.
"""

import importlib
import os
from types import SimpleNamespace

import torch
import triton
from ttsem import harness, sanitize

from dit_fast.kernels import long_skip_tiles, tables
from tests.ops.aot import kernel_files

for _name in kernel_files():
    importlib.import_module(f"dit_fast.kernels.{_name}")
os.environ["TRITON_INTERPRET"] = "1"
triton.knobs.runtime.interpret = False  # for Triton itself, and for the launchers' UPCAST

# What launchers ask of a GPU. Three multiprocessors: persistent programs then go round more than once.
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0)
torch.cuda.get_device_properties = lambda *_, **__: SimpleNamespace(
    multi_processor_count=3, major=8, minor=0, shared_memory_per_block_optin=163 << 10
)
long_skip_tiles.family = lambda _: 90
# A product that hands out its sums wider than its factors is the GPU's; tensors here only pretend to be on one.
_mm = torch.mm
torch.mm = lambda a, b, out_dtype=None: _mm(a, b) if out_dtype is None else _mm(a.to(out_dtype), b.to(out_dtype))

# Buffers behind a ticket, by kernel. test_aot.py reads their order of memory off the PTX instead.
TICKETS = {"cosines": ("partials", "ticket")}

_tables: dict[int, tuple[torch.Tensor, ...]] = {}  # rows behind the table at an address
_reached: dict[int, torch.Tensor] = {}  # tensors by the address of their storage, for the launch that runs


class _Memory(harness.Memory):
    """Memory in which the rows behind tables lie too."""

    def __init__(self):
        super().__init__()
        self.known = {}  # arrays by their address
        for tensor in _reached.values():
            self.register(*harness.storage_copy(tensor))

    def register(self, base, array):
        if base not in self.known:  # an argument may be a row of a table as well
            self.known[base] = array
            super().register(base, array)


def _execute(record, *arguments, run=harness.execute, **options):
    if record.fn_name == "write_table":
        _tables[record.ptrs["addresses"]] = record.bound["tensors"]
    rows = [tensor for place in record.ptrs.values() for tensor in _tables.get(place, ())]
    _reached.clear()
    _reached.update((tensor.untyped_storage().data_ptr(), tensor) for tensor in rows)
    return run(record, *arguments, **options)


def _write_back(record, execution, write=sanitize._write_back):
    write(record, execution)
    for base, tensor in _reached.items():
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        whole.copy_(torch.from_numpy(execution.memory.known[base].view("uint8").reshape(-1).copy()))


def _spans(record, names, exchanged):
    return [(record.bases[name], record.bases[name] + record.pre[name].nbytes) for name in names]


harness.Memory = _Memory
harness.execute = _execute
sanitize._write_back = _write_back
sanitize.lookback_buffers = lambda function, source: TICKETS.get(function.__name__, ())
sanitize._protocol_spans = _spans


def pytest_runtest_teardown():
    _tables.clear()
    tables._kept.clear()  # tables of tensors that are gone
    _reached.clear()
