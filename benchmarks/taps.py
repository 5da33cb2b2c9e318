"""What the diversity loss of taps adds to a model of 28 gated blocks: launches, calls and bytes, counted, not timed.

    TRITON_INTERPRET=1 PYTHONPATH=.cache/triton-3.9.0 python -m dit_fast.benchmarks.taps

Forward and backward run with and without the loss, through the Triton kernels as the interpreter executes them; the
difference is the loss's. Launches: Triton kernels, and operators of torch that compute. Calls: operators that the host
dispatches, views included. Bytes: what Triton kernels load and store behind their masks, and the operands and results
of torch's operators, per element of one block's output and block. The first step warms what is made once.
"""

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_fast.backend import force
from dit_fast.benchmarks.results import RESULTS, environment, write
from dit_fast.methods.diversedit import select_pairs
from dit_fast.ops import DiversityTaps, gate_residual

BLOCKS, SAMPLES, TOKENS, WIDTH = 28, 2, 64, 64
WRITES_NOTHING = ("detach", "lift", "alias", "_unsafe_view")


class Counted(TorchDispatchMode):
    """launches, calls and bytes by name within; Triton kernels through `watched`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if func.namespace == "dit_fast":
            with self:  # what it does inside counts, too
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = func(*args, **kwargs)
        if not func.is_view and "empty" not in name and not name.startswith(WRITES_NOTHING):
            self.launches[name] += 1
            tensors = [x for x in (*tree_leaves((args, kwargs)), *tree_leaves(result)) if isinstance(x, Tensor)]
            self.bytes[name] += sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors}.values())
        return result


def watched(mode: Counted) -> Callable[[], None]:
    """Counts what the interpreter launches, loads and stores; returns what ends it."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    launch, load, store = (
        GridExecutor.__call__, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store,
    )  # fmt: skip
    running = [""]

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        running[0] = self.fn.__name__
        mode.launches[running[0]] += 1
        with torch.utils._python_dispatch._disable_current_modes():
            return launch(self, *args, **kwargs)

    def loaded(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        mode.bytes[running[0]] += int(mask.data.sum()) * max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        return load(self, pointers, mask, *rest)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mode.bytes[running[0]] += int(mask.data.sum()) * max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        return store(self, pointers, value, mask, *rest)

    def put(*methods: Any) -> None:
        patched: Any = InterpreterBuilder
        GridExecutor.__call__, patched.create_masked_load, patched.create_masked_store = methods

    put(launched, loaded, stored)
    return lambda: put(launch, load, store)


def step(dtype: torch.dtype, pairs: Any) -> tuple[Counted, Counted]:
    """Counts of one forward and one backward; pairs None: without the loss."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x = draw(SAMPLES, TOKENS, WIDTH).to(dtype).requires_grad_()
    branches = [draw(SAMPLES, TOKENS, WIDTH).bfloat16().requires_grad_() for _ in range(BLOCKS)]
    gates = [draw(SAMPLES, WIDTH).bfloat16().requires_grad_() for _ in range(BLOCKS)]
    above = draw(SAMPLES, TOKENS, WIDTH).to(dtype)
    counts = Counted(), Counted()
    stop = watched(counts[0])
    try:
        with counts[0]:
            taps = DiversityTaps()
            for y, gate in zip(branches, gates, strict=True):
                x, _ = gate_residual(x, y, gate, return_stats=True)
                x = x if pairs is None else taps.tap(x)
            total = None if pairs is None else taps.loss(pairs).total
    finally:
        stop()
    stop = watched(counts[1])
    try:
        with counts[1]:
            torch.autograd.backward([x] if total is None else [x, total], [above] if total is None else [above, None])
    finally:
        stop()
    return counts


def added(dtype: torch.dtype, pairs: Any) -> dict[str, Any]:
    """What the loss adds to forward and backward."""
    step(dtype, pairs)
    found: dict[str, Any] = {}
    for part, ours, alone in zip(("forward", "backward"), step(dtype, pairs), step(dtype, None), strict=True):
        launches = ours.launches - alone.launches
        launches.subtract(alone.launches - ours.launches)
        found[part] = {
            "launches": sum(ours.launches.values()) - sum(alone.launches.values()),
            "calls": sum(ours.calls.values()) - sum(alone.calls.values()),
            "bytes_per_element": round(
                (sum(ours.bytes.values()) - sum(alone.bytes.values())) / (BLOCKS * SAMPLES * TOKENS * WIDTH), 2
            ),
            "triton": {name: n for name, n in sorted(launches.items()) if n and name in _kernels()},
        }
    return found


def _kernels() -> set[str]:
    from dit_fast import kernels

    names = [each.name for each in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(f"dit_fast.kernels.{name}") for name in names]
    return {name for module in modules for name, each in vars(module).items() if hasattr(each, "arg_names")}


def main() -> int:
    cases: dict[str, Any] = {}
    with force("triton"):
        for policy, dtype in (("release", torch.float32), ("all", torch.bfloat16)):
            name = f"{policy} pairs, {str(dtype)[6:]} stream"
            cases[name] = added(dtype, select_pairs(policy, BLOCKS))
            print(name, cases[name], flush=True)
    result = {
        "schema": 1,
        "run": "taps",
        **environment(torch.device("cpu")),
        "command": "TRITON_INTERPRET=1 PYTHONPATH=.cache/triton-3.9.0 python -m dit_fast.benchmarks.taps",
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "counted_on": "Triton's interpreter; nothing is timed",
        "size": {"blocks": BLOCKS, "samples": SAMPLES, "tokens": TOKENS, "width": WIDTH},
        "added_by_the_loss": cases,
    }
    write(RESULTS / "cpu" / "taps.json", result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
