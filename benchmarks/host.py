"""What the host does for a training step, without a GPU:

    PYTHONPATH=.cache/triton-3.9.0 python -m dit_fast.benchmarks.host

Everything that a step does before the device works is run as it is: the trainer's Python, checks and choices, autograd,
torch's dispatcher, Triton's launch. Tensors lie on the CPU and are so small that their arithmetic hardly counts;
kernels end at a null driver (`null_driver.py`, which says what is not counted). Ours and the step as published
alternate in one process, each with SiT of 12 or 28 blocks, long skips, bf16 autocast and the diversity loss, on one
thread. "untraced" is ours with the Python of blocks, long skips and ops run each time (`dit_fast/ops/traced.py`).

Times are of the thread's CPU, which a busy machine hardly changes, and medians. A call of an op is also given in
clones: the time of `clone()` of a small tensor, the cheapest call that torch can launch, in the same rounds. Eight
calls share a backward, as a step's do: to start one takes longer than a call. The first two ops, functions with a
gradient that do nothing, are floors of the others. Launches are operators that write memory, and Triton kernels; those
on lists of tensors count as one. The former are counted in a run of their own, which sees blocks op by op
(ops/branches.py). Published noise comes from torch's generator.

What limits a side: "operators" is the time of torch's operators that write memory, the same calls once more by
themselves: no formulation with these products does less here. "accumulation" is that of autograd to hand as many
gradients to parameters. What remains of the step is Python, autograd's nodes and launches of Triton kernels.
"""

import argparse
import collections
import contextlib
import gc
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

DEPTHS = (12, 28)
ROUNDS = 15
CALLS, AT_ONCE = 200, 8  # of an op in a round, and in one backward
WIDTH, TOKENS, HEADS = 16, 4, 2
GOALS = {"step": 0.5, "forward": 12, "backward": 15, "launches": 1200}
FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FREE |= {"detach", "lift_fresh"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_fast.benchmarks.host")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--depths", type=int, nargs="*", default=list(DEPTHS))
    parser.add_argument("--out", type=Path, help="result file; default: that of this repository")
    options = parser.parse_args(arguments)

    import torch

    from dit_fast.benchmarks import null_driver
    from dit_fast.errors import UserError

    torch.set_num_threads(1)
    try:
        triton = null_driver.install()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    from dit_fast.benchmarks.results import RESULTS, environment, rounded, write

    where = environment(torch.device("cpu"))
    where["versions"]["triton"] = triton
    result = {
        "schema": 1,
        "run": "host",
        **where,
        "command": " ".join(["python", "-m", "dit_fast.benchmarks.host", *(arguments or sys.argv[1:])]),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "goals": GOALS,
        "ops": ops(options.rounds),
        "steps": [step(depth, options.rounds) for depth in options.depths],
    }
    print(text(result))
    write(options.out or RESULTS / "cpu" / "host.json", rounded(result))
    return 0


def text(result: dict[str, Any]) -> str:
    lines = [f"{'op':34}{'forward':>18}{'backward':>18}"]
    for name, parts in result["ops"].items():
        shown = (f"{part['us']:7.1f} us {part['clones']:6.1f}" for part in parts.values())
        lines.append(f"{name:34}{''.join(f'{each:>18}' for each in shown)}")
    for case in result["steps"]:
        for side in ("published", "ours"):
            times = "  ".join(f"{part} {ms:.1f}" for part, ms in case[side]["ms"].items())
            lines.append(f"{case['blocks']} blocks, {side:10} {times} ms, launches {case[side]['launches']}")
            alone = ", ".join(f"{part} {ms:.1f}" for part, ms in case[side]["alone_ms"].items())
            lines.append(f"{'':22} alone: {alone} ms")
        ratios = f"{case['ratio']:.2f} of the host's time, without traces {case['ratio_untraced']:.2f}"
        lines.append(f"{case['blocks']} blocks, ours / published: {ratios}")
    return "\n".join(lines)


def step(blocks: int, rounds: int) -> dict[str, Any]:
    """Times of both sides' parts of a step in ms, launches by name, and the ratio of the whole."""
    sides: dict[str, _Side] = {"published": _Published(blocks), "ours": _Ours(blocks), "untraced": _Untraced(blocks)}
    for side in sides.values():
        for number in range(3):
            side.run(number)
    taken: dict[str, dict[str, list[float]]] = {name: collections.defaultdict(list) for name in sides}
    with _without_collector():
        for number in range(3, 3 + rounds):
            for name, side in sides.items():
                for part, seconds in side.run(number).items():
                    taken[name][part].append(1e3 * seconds)
    from dit_fast.benchmarks import host_alone

    entry: dict[str, Any] = {"blocks": blocks}
    for name in ("published", "ours"):
        side, launched = sides[name], launches(partial(sides[name].run, 3 + rounds))
        calls: list[host_alone.Call] = []
        launches(partial(side.run, 4 + rounds), calls)  # which keeps gradients alive, so that autograd copies some
        with _without_collector():
            alone = host_alone.seconds(calls, side.loss.model, rounds)
        entry[name] = {
            "ms": {part: statistics.median(times) for part, times in taken[name].items()},
            "alone_ms": {part: 1e3 * seconds for part, seconds in alone.items()},
            "launches": sum(launched.values()),
            "launches_by_name": dict(launched.most_common()),
        }
    entry["untraced"] = {"ms": {part: statistics.median(times) for part, times in taken["untraced"].items()}}
    for key, name in (("ratio", "ours"), ("ratio_untraced", "untraced")):
        rounds_of = zip(taken[name]["step"], taken["published"]["step"], strict=True)
        entry[key] = statistics.median(own / published for own, published in rounds_of)
    return entry


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Python's collector strikes either side at random."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _Side(ABC):
    def __init__(self, blocks: int, *methods: Any):
        import torch

        from dit_fast.models import new_model
        from dit_fast.models.sit import SiT
        from dit_fast.objectives import Flow
        from dit_fast.train.loss import TrainingLoss

        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": WIDTH, "depth": blocks, "num_heads": HEADS, "patch_size": 2}
        config = SiT.Config(
            name="SiT-Nano/2", input_size=4, in_channels=4, num_classes=1000, skip_wiring="input", **sizes
        )
        model = new_model(config)
        bound = [bind(model, None) for bind in methods]
        self.loss = TrainingLoss(model, Flow(Flow.Config(), model), bound, seed=0, label_dropout=0.1, precision="bf16")
        self.batches = []
        for number in range(4):
            own = {"label": torch.randint(0, 1000, (2,)), "position": torch.arange(2 * number, 2 * number + 2)}
            self.batches.append({"moments": torch.randn(2, 2, 4, 4, 4), **own})

    @abstractmethod
    def run(self, number: int) -> dict[str, float]:
        """Seconds of the step's parts and of the whole."""


class _Published(_Side):
    def __init__(self, blocks: int):
        from dit_fast.benchmarks.baselines.published_step import PlainTrainer, PublishedDiversity
        from dit_fast.runs import OptimizerConfig

        super().__init__(blocks, PublishedDiversity)
        self.trainer = PlainTrainer(self.loss, OptimizerConfig())
        self.marks = _Marks(self.loss)

    def run(self, number: int) -> dict[str, float]:
        from dit_fast.backend import force

        with force("torch"), _torchs_generator(), self.marks:
            self.trainer.train_step(self.batches[number % 4], number)
        return self.marks.parts()


@contextlib.contextmanager
def _torchs_generator() -> Iterator[None]:
    import torch

    from dit_fast import philox

    own = philox.normal, philox.uniform
    philox.normal = lambda seed, positions, stream, shape: torch.randn(len(positions), *shape)
    philox.uniform = lambda seed, positions, stream, shape: torch.rand(len(positions), *shape)
    try:
        yield
    finally:
        philox.normal, philox.uniform = own


class _Ours(_Side):
    def __init__(self, blocks: int):
        import torch

        from dit_fast.methods.diversedit import DiverseDiT
        from dit_fast.ops import linear
        from dit_fast.runs import TrainConfig
        from dit_fast.train.engine import SingleEngine
        from dit_fast.world import World

        super().__init__(blocks, partial(DiverseDiT, DiverseDiT.Config(pairs="all")))
        linear.FEWEST_ROWS = 0  # sums over rows are kernels, as over the thousands of rows of training
        config = TrainConfig()
        self.rate = config.optimizer.lr
        self.engine = SingleEngine(self.loss, config, World(0, 1, torch.device("cpu")))
        self.marks = _Marks(self.loss)

    def run(self, number: int) -> dict[str, float]:
        with self.marks:
            self.engine.train_step([self.batches[number % 4]], number, self.rate)
        return self.marks.parts()


class _Untraced(_Ours):
    def run(self, number: int) -> dict[str, float]:
        from dit_fast.ops import branches, long_skip_node, traced

        with contextlib.ExitStack() as patched:
            for module in (branches, long_skip_node, traced):
                patched.enter_context(
                    mock.patch.object(module, "traced", lambda run, facts, *given: run(*facts, *given))
                )
            return super().run(number)


class _Marks:
    """When a step began, when its forward ended, when the last gradient came, when it ended."""

    def __init__(self, loss: Any):
        loss.register_forward_hook(lambda *_: self._note("forward"))
        self.times: dict[str, float] = {}
        # The patches' projection is the first layer: its gradient is the last one.
        last = loss.model.x_embedder.proj.bias
        last.register_post_accumulate_grad_hook(lambda _: self._note("backward"))

    def _note(self, name: str) -> None:
        self.times[name] = time.thread_time()

    def __enter__(self) -> None:
        self._note("start")

    def __exit__(self, *error: object) -> None:
        self._note("end")

    def parts(self) -> dict[str, float]:
        start, forward, backward, end = (self.times[name] for name in ("start", "forward", "backward", "end"))
        return {"forward": forward - start, "backward": backward - forward, "rest": end - backward, "step": end - start}


def launches(work: Callable[[], Any], calls: list[Any] | None = None) -> collections.Counter[str]:
    """By name: operators of torch that write memory, those inside our operators too, and Triton kernels.

    calls: gets those of the operators.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    from dit_fast.benchmarks import null_driver

    counted: collections.Counter[str] = collections.Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "dit_fast":
                with self:
                    return null_driver.IMPLEMENTATIONS[func.overloadpacket.__name__](*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if not func.is_view and name not in FREE:
                counted[f"aten.{name}"] += 1
                if calls is not None:
                    calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Count():
        work()
    with null_driver.counting() as kernels:
        work()
    counted.update({f"triton.{name}": count for name, count in kernels.items()})
    return counted


def ops(rounds: int) -> dict[str, Any]:
    """Forward and backward of each op as training runs it, in microseconds and in clones."""
    import torch
    from torch.utils._pytree import tree_leaves

    small = torch.randn(2, TOKENS, WIDTH)
    calls: dict[str, dict[str, Callable[[], Any]]] = {}
    for name, (function, tensors) in _cases().items():
        with torch.autocast("cpu", torch.bfloat16):
            made = tree_leaves([function(*tensors) for _ in range(AT_ONCE)])
        results = [each for each in made if isinstance(each, torch.Tensor) and each.grad_fn is not None]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        above = [torch.ones_like(each) for each in results]
        calls[name] = {"forward": partial(function, *tensors)}
        if results:
            calls[name]["backward"] = partial(torch.autograd.grad, results, wanted, above, retain_graph=True)
    return {
        name: {part: _against(call, small.clone, rounds, part == "backward") for part, call in parts.items()}
        for name, parts in calls.items()
    }


def _against(call: Callable[[], Any], unit: Callable[[], Any], rounds: int, backward: bool) -> dict[str, float]:
    import torch

    taken, units, ratios = [], [], []
    at_once = AT_ONCE if backward else 1
    with torch.autocast("cpu", torch.bfloat16, enabled=not backward), _without_collector():
        for each in (call, unit):
            _seconds(each, CALLS)
        for _ in range(rounds):
            own, one = _seconds(call, CALLS // at_once) / at_once, _seconds(unit, CALLS)
            taken.append(own)
            units.append(one)
            ratios.append(own / one)
    median = statistics.median
    return {"us": 1e6 * median(taken), "clones": median(ratios), "clone_us": 1e6 * median(units)}


def _seconds(call: Callable[[], Any], times: int) -> float:
    start = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - start) / times


def _cases() -> Mapping[str, tuple[Callable[..., Any], list[Any]]]:
    """Each op with the types of training under bf16 autocast: an fp32 stream, bf16 branches and vectors."""
    import torch

    from dit_fast import ops

    def new(*shape: int, half: bool = False) -> torch.Tensor:
        return torch.randn(shape).to(torch.bfloat16 if half else torch.float32).requires_grad_()

    stream, other, branch = new(2, TOKENS, WIDTH), new(2, TOKENS, WIDTH), new(2, TOKENS, WIDTH, half=True)
    gate, shift, scale = (new(2, 6 * WIDTH, half=True).detach().chunk(6, 1)[i].requires_grad_() for i in range(3))
    statistics = ops.row_statistics(stream.detach())
    times, positions = torch.rand(2), torch.arange(2)
    mlp = [new(4 * WIDTH, WIDTH, half=True), new(4 * WIDTH, half=True)]
    mlp += [new(WIDTH, 4 * WIDTH, half=True), new(WIDTH, half=True)]
    skip = [new(2 * WIDTH), new(2 * WIDTH), new(WIDTH, 2 * WIDTH), new(WIDTH)]
    heads = [new(WIDTH // HEADS) for _ in range(4)]

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            ctx.save_for_backward(*tensors)
            return tuple(each.view_as(each) for each in tensors[:2])

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return ctx.saved_tensors

    streams = [stream, branch, gate, shift, scale]
    return {
        "an empty autograd.Function": (Nothing.apply, [stream]),
        "the same, of five tensors": (Nothing.apply, streams),
        "layer_norm_modulate": (partial(ops.layer_norm_modulate, out_dtype=torch.bfloat16), [stream, shift, scale]),
        "layer_norm_modulate, stats known": (
            partial(ops.layer_norm_modulate, stats=statistics, out_dtype=torch.bfloat16), [stream, shift, scale],
        ),
        "gate_residual, with stats": (partial(ops.gate_residual, return_stats=True), [stream, branch, gate]),
        "gate_residual_modulate": (
            partial(ops.gate_residual_modulate, out_dtype=torch.bfloat16), streams,
        ),
        "qk_norm": (
            lambda qkv, *rest: ops.qk_norm(qkv, HEADS, *rest)[:2], [new(2, TOKENS, 3 * WIDTH, half=True), *heads],
        ),
        "gelu_mlp": (ops.gelu_mlp, [branch, *mlp]),
        "long_skip": (ops.long_skip, [stream, other, *skip]),
        "repa_cosine": (ops.repa_cosine, [branch, other.detach()]),
        "flow_noised": (lambda x: ops.flow_noised(x, times, positions, 7), [stream.detach()]),
        "flow_error": (lambda p, x: ops.flow_error(p, x, times, positions, 7), [branch, stream.detach()]),
        "row_statistics": (ops.row_statistics, [stream.detach()]),
        "diversity_loss, 4 blocks": (lambda *x: ops.diversity_loss(x).total, [new(2, TOKENS, WIDTH) for _ in range(4)]),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
