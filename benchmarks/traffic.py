"""What each op reads from and writes to memory, counted and not timed: python -m dit_fast.benchmarks.traffic.

Forward and backward of every implementation, and of the reference as torch.compile would fuse it. The unit is bytes per
element of one [N, T, D] stream: the difference between two samples and one, so that what depends on the parameters
alone drops out.

- Triton kernels run in the interpreter, and every address that a launch loads or stores is recorded. A launch is
  charged each element once per direction, however often it takes it: a GEMM finds its operands again in the cache.
- torch's operators, also those inside of our own, are charged their tensor arguments and results by their schema. Views
  are free, and so is memory that is not initialised. C++ kernels are operators like these.
- torch.compile's kernels are charged their buffers as its scheduler counts them ("worst-case inputs, best-case
  optimization"), after fusion for an H200; nothing is compiled.

What our ops do on CUDA tensors only is counted as it is there (`_as_on_cuda`). Triton comes by PYTHONPATH:

    PYTHONPATH=.cache/triton-3.9.0 python -m dit_fast.benchmarks.traffic

Each entry names the commit at which it was counted, for `--only OP` renews a part of the record.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import argparse
import contextlib
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dit_fast.ops
from dit_fast import backend, kernels
from dit_fast.benchmarks.cases.case import differentiate
from dit_fast.benchmarks.cost import moved
from dit_fast.benchmarks.results import RESULTS, environment, write
from dit_fast.ops import long_skip_rows

BF16, FP32 = torch.bfloat16, torch.float32
ops: Any = dit_fast.ops  # which are called with lists of arguments
STREAMS = {"fp32 stream": FP32, "bf16 stream": BF16}
TOKENS, WIDTH = 128, 384
COMPILED = "torch.compile"

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """name: the op and what is particular. op: whose implementations are counted. The inputs, which need gradients:
    streams [N, T, D], a letter each (s: the stream's dtype, b: bf16, f: fp32, q: bf16 [N, T, 3 D]), so many vectors
    [N, D] in bf16, fp32 parameters by their sizes in D. known: streams whose row statistics come after the inputs.
    compiled: whether torch.compile is a side. It would fuse across the branches of a block, and the reference of the
    diversity loss has constants on the host, which cannot be counted so."""

    name: str
    op: str
    call: Callable[..., Any]
    streams: str
    vectors: int = 0
    parameters: tuple[tuple[float, ...], ...] = ()
    known: int = 0
    compiled: bool = True

    def inputs(self, samples: int, stream: torch.dtype, tokens: int, width: int) -> tuple[Tensors, list[Any]]:
        generator = torch.Generator().manual_seed(0)
        new = lambda dtype, *shape: torch.randn(shape, generator=generator).to(dtype).requires_grad_()  # noqa: E731
        kinds = {"s": (stream, 1), "b": (BF16, 1), "f": (FP32, 1), "q": (BF16, 3)}
        streams = [new(kinds[each][0], samples, tokens, kinds[each][1] * width) for each in self.streams]
        vectors = [new(BF16, samples, width) for _ in range(self.vectors)]
        parameters = [new(FP32, *(int(each * width) for each in shape)) for shape in self.parameters]
        stats = [ops.row_statistics(x, "torch") for x in streams[: self.known]]
        return (*streams, *vectors, *parameters), stats


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, stats: Any, **options: Any) -> Any:
    return ops.layer_norm_modulate(x, shift, scale, stats=stats, out_dtype=BF16, **options)


def _gate_modulate(*inputs: Any, **options: Any) -> Any:
    return ops.gate_residual_modulate(*inputs, out_dtype=BF16, **options)


def _gate(*inputs: Any, **options: Any) -> Any:
    """As a block calls it, which asks for statistics where they are free."""
    if options["backend"] == "torch":
        return ops.gate_residual(*inputs, **options)
    return ops.gate_residual(*inputs, return_stats=True, **options)[0]


def _block(x: Tensor, *vectors: Any, **options: Any) -> Any:
    """The adaLN ops of a block around branches that do nothing."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m, stats = vectors
    x, branch = _modulate(x, shift_a, scale_a, stats, return_x=True, **options)
    x, branch = _gate_modulate(x, branch, gate_a, shift_m, scale_m, **options)
    return _gate(x, branch, gate_m, **options)


def _skip(x: Tensor, *inputs: Any, **options: Any) -> Any:
    """As a model calls it: the result is the stream, in its dtype."""
    parameters, stats = inputs[:5], inputs[5:]
    known = dict(zip(("x_stats", "skip_stats"), stats, strict=True)) if stats else {}
    return ops.long_skip(x, *parameters, out_dtype=x.dtype, **known, **options)


def _flow(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*streams: Tensor, **options: Any) -> Tensor:
        times = torch.linspace(0.1, 0.9, len(streams[0]))
        return function(*streams, times, torch.arange(len(streams[0])), 1, **options)

    return call


def _taps(*features: Tensor, **options: Any) -> Any:
    taps = ops.DiversityTaps(**options)
    return (*map(taps.tap, features), taps.loss().total)


def _qk_norm(qkv: Tensor, *parameters: Any, **options: Any) -> Any:
    return ops.qk_norm(qkv, HEADS, *parameters, **options)


HEADS = 16
SKIP = ((2,), (2,), (1, 2), (1,))
CASES = (
    Case("layer_norm_modulate", "layer_norm_modulate", _modulate, "s", 2, known=1),
    Case("gate_residual", "gate_residual", _gate, "sb", 1),
    Case("gate_residual_modulate", "gate_residual_modulate", _gate_modulate, "sb", 3),
    Case("adaLN of a block", "gate_residual_modulate", _block, "s", 6, known=1, compiled=False),
    Case("row_statistics", "row_statistics", lambda x, **o: ops.row_statistics(x, **o), "s"),
    Case("long_skip", "long_skip", _skip, "ss", parameters=SKIP, known=2),
    Case("long_skip, statistics unknown", "long_skip", _skip, "ss", parameters=SKIP),
    Case("gelu_mlp", "gelu_mlp", ops.gelu_mlp, "b", parameters=((4, 1), (4,), (1, 4), (1,))),
    Case("qk_norm", "qk_norm", _qk_norm, "q", parameters=((1 / HEADS,),) * 4),
    Case("repa_cosine", "repa_cosine", ops.repa_cosine, "sf"),
    Case("flow_noised", "flow_noised", _flow(ops.flow_noised), "f"),
    Case("flow_error", "flow_error", _flow(ops.flow_error), "sf"),
    Case(
        "diversity_loss, 4 blocks",
        "diversity_loss",
        lambda *x, **o: ops.diversity_loss(x, **o).total,
        "ssss",
        compiled=False,
    ),
    Case("diversity taps, 4 blocks", "diversity_loss", _taps, "ssss", compiled=False),
)


class Traffic(TorchDispatchMode):
    """`bytes` that operators and kernels move while it is on. Our own operators are looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "dit_fast":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        with self:
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self.bytes += moved(func, args, kwargs, result)
        return result


@contextlib.contextmanager
def _launches(count: Traffic) -> Iterator[None]:
    """Adds what each interpreted launch loads and stores to `count`."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    touched: dict[tuple[str, int], list[Any]] = {}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    run = GridExecutor.__call__

    def note(kind: str, pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        touched.setdefault((kind, size), []).append(pointers.data[mask.data])

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        note("load", pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        note("store", pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    def counted_run(self: Any, *arguments: Any, **options: Any) -> Any:
        import numpy as np

        with torch._C._DisableTorchDispatch():  # what the interpreter copies is no traffic
            result = run(self, *arguments, **options)
        count.bytes += sum(size * len(np.unique(np.concatenate(each))) for (_, size), each in touched.items())
        touched.clear()
        return result

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        mock.patch.object(GridExecutor, "__call__", counted_run),
    ):
        yield


@torch.library.custom_op("dit_fast_traffic::mm", mutates_args=())
def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.to(out_dtype) @ b.to(out_dtype)


@contextlib.contextmanager
def _as_on_cuda() -> Iterator[None]:
    """A product with sums of another dtype than its factors is one operator there; a CPU converts both first."""
    with mock.patch.object(long_skip_rows, "_matmul_wide", lambda a, b, wide: _mm(a, b, wide)):
        yield


def _outputs(case: Case, inputs: Tensors, stats: Sequence[Any], **options: Any) -> Tensors:
    with torch.autocast("cpu", BF16):
        outputs = case.call(*inputs, *stats, **options)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def count_call(case: Case, name: str, *sizes: Any) -> tuple[int, int]:
    """Bytes of one forward and of its backward by an implementation; sizes: of `Case.inputs`."""
    inputs, stats = case.inputs(*sizes)
    with Traffic() as count, _launches(count), _as_on_cuda():
        outputs = tuple(x for x in _outputs(case, inputs, stats, backend=name) if x.requires_grad)
    forward = count.bytes
    upstream = tuple(torch.ones_like(x) for x in outputs)
    if outputs:
        with count, _launches(count), _as_on_cuda():
            differentiate(outputs, inputs, upstream)
    return forward, count.bytes - forward


# What inductor asks of a GPU before it fuses: an H200's answers.
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=141 * 10**9,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_multiprocessor=233472, L2_cache_size=50 * 2**20, gcnArchName="",
)  # fmt: skip


@contextlib.contextmanager
def _h200() -> Iterator[None]:
    from torch._dynamo.device_interface import get_interface_for_device
    from torch._inductor.codegen.common import init_backend_registration

    init_backend_registration()
    interface: Any = get_interface_for_device("cuda")
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch("torch._inductor.scheduler.has_triton", return_value=True))
        for place in (torch.cuda, interface, interface.Worker):
            answers = {"get_device_properties": H200, "get_device_capability": (9, 0), "get_compute_capability": 90}
            for name, answer in (answers | {"is_available": True}).items():
                if place is not torch.cuda or name.startswith("get_device"):
                    answering = staticmethod(lambda *_, answer=answer: answer)
                    patches.enter_context(mock.patch.object(place, name, answering, create=True))
        yield


def _fused_bytes(module: torch.fx.GraphModule, is_backward: bool) -> int:
    """Bytes of the kernels that a graph traced on the CPU becomes on an H200."""
    from torch._inductor.compile_fx import record_original_output_strides
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    module, mode = copy.deepcopy(module), FakeTensorMode(allow_non_fake_inputs=True)
    given = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    with mode:
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0") for x in given]
    for node in module.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    module.recompile()
    FakeTensorProp(module, mode).propagate_dont_convert_inputs(*fakes)
    record_original_output_strides(module)
    graph = GraphLowering(module, example_inputs=fakes, is_backward=is_backward)
    with V.set_graph_handler(graph), V.set_fake_mode(mode), _h200():
        graph.run(*fakes)
        graph._update_scheduler()
        return graph.count_bytes()[0]


def count_compiled(case: Case, *sizes: Any) -> tuple[int, int]:
    """The same of the kernels into which torch.compile fuses the reference."""
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor.graph import GraphLowering

    inputs, stats = case.inputs(*sizes)
    counts = []

    def count_graph(self: Any) -> Any:
        self._update_scheduler()  # which what follows looks at
        counts.append(_fused_bytes(self.module, self.is_backward))
        return SimpleNamespace(call=lambda given: torch.fx.Interpreter(self.module).run(*given))

    torch.compiler.reset()
    with (
        mock.patch.object(GraphLowering, "compile_to_module", count_graph),
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        compiled = torch.compile(lambda *x: _outputs(case, x, stats, backend="torch"), fullgraph=True)
        outputs = tuple(x for x in compiled(*inputs) if x.requires_grad)
        forward = sum(counts)
        if outputs:
            differentiate(outputs, inputs, tuple(torch.ones_like(x) for x in outputs))
    return forward, sum(counts) - forward


def entries(case: Case, tokens: int, width: int, names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """One per stream's dtype and implementation, or those of these names alone."""
    for label, dtype in STREAMS.items():
        for name in names or (*backend.runnable(case.op, "cpu"), *([COMPILED] * case.compiled)):
            count = count_compiled if name == COMPILED else lambda *of, name=name: count_call(of[0], name, *of[1:])
            one, two = (count(case, samples, dtype, tokens, width) for samples in (1, 2))
            rest = [second - first for first, second in zip(one, two, strict=True)]
            yield {
                "case": case.name,
                "stream": label,
                "side": name,
                "forward": round(rest[0] / (tokens * width), 2),
                "backward": round(rest[1] / (tokens * width), 2),
            }


def merged(recorded: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries in the order of `CASES`, of each case those found, or else those recorded."""
    new = {entry["case"] for entry in found}
    both = [*(entry for entry in recorded if entry["case"] not in new), *found]
    return [entry for case in CASES for entry in both if entry["case"] == case.name]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dit_fast.benchmarks.traffic",
        description=__doc__.splitlines()[0],
        epilog="example: PYTHONPATH=.cache/triton-3.9.0 python -m dit_fast.benchmarks.traffic --only long_skip",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu" / "traffic.json", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", metavar="OP", help="count these ops anew; the others stay as recorded")
    options = parser.parse_args(argv)
    if reason := kernels.unavailable():
        print(f"traffic: error: {reason}; set PYTHONPATH=.cache/triton-3.9.0", file=sys.stderr)
        return 2
    known = list(dict.fromkeys(case.op for case in CASES))
    if strange := sorted(set(options.only or ()) - set(known)):
        print(f"traffic: error: no case of {', '.join(strange)}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    recorded: list[dict[str, Any]] = []
    if options.only and options.out.exists():
        recorded = json.loads(options.out.read_text())["entries"]
    about = environment(torch.device("cpu"))
    commit = {"commit": f"{about.pop('commit')}{' with local changes' * bool(about.pop('dirty'))}"}
    found = []
    for case in CASES:
        if case.op not in (options.only or known):
            continue
        for entry in entries(case, TOKENS, WIDTH):
            found.append(entry | commit)
            sides = f"{entry['case']:30} {entry['stream']} {entry['side']:14}"
            print(f"{sides} {entry['forward']:8.2f} {entry['backward']:8.2f}", flush=True)
    about |= {"unit": "bytes per element [N, T, D]", "tokens": TOKENS, "width": WIDTH}
    about["command"] = "python -m dit_fast.benchmarks.traffic"
    write(options.out, about | {"entries": merged(recorded, found)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
