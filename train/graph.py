"""A whole training step as one CUDA graph: draws, forward, losses, backward and optimizer are replayed, not launched.

A replay does what the captured step did, with what its tensors hold by then. What changes from step to step must
therefore lie in tensors that stay where they are: micro-batches are copied into those of the first step, rates are
filled in place, weights and states are updated in place. All that depends on the step's number otherwise is its kind,
for which a graph is captured anew.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from dit_fast.errors import ConfigError

R = TypeVar("R")
Batches = Sequence[Mapping[str, Tensor]]
WARM_UP = 3  # eager steps before the capture, in which kernels are compiled and libraries make their workspaces


class Graphs:
    """torch's CUDA graphs, on a stream of their own."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def eager(self, work: Callable[[], R]) -> R:
        """Runs it on the stream on which it is going to be captured."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def capture(self, work: Callable[[], R]) -> Callable[[], R]:
        """A function that replays it and returns its result, whose tensors the next replay overwrites."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = work()

        def replay() -> R:
            graph.replay()
            return result

        return replay


class GraphedStep(Generic[R]):
    """body(micro_batches, number): a step that reads nothing on the host. kind(number): equal for steps that differ by
    the contents of their tensors alone."""

    def __init__(self, body: Callable[[Batches, int], R], kind: Callable[[int], Hashable], graphs: Graphs):
        self._body, self._kind, self._graphs = body, kind, graphs
        self._static: list[dict[str, Tensor]] = []
        self._known: Hashable = None
        self._replay: Callable[[], R] | None = None
        self._eager = 0

    def __call__(self, batches: Batches, number: int) -> R:
        """Eagerly for the first steps of a kind, then by replay. The result is overwritten by the next call.

        Raises ConfigError for micro-batches of other shapes, and where every step is of a kind of its own.
        """
        kind = self._kind(number)
        if kind != self._known or not self._eager:
            if len({kind, self._kind(number + 1), self._kind(number + 2)}) == 3:
                raise ConfigError(
                    f"from step {number + 1} on every step differs from the one before by more than its data ({kind}), "
                    "so none can be replayed; set engine.cuda_graph=false"
                )
            self._known, self._replay, self._eager = kind, None, 0
        self._fill(batches)
        if self._replay is None and self._eager < WARM_UP:
            self._eager += 1
            return self._graphs.eager(lambda: self._body(self._static, number))
        if self._replay is None:
            self._replay = self._graphs.capture(lambda: self._body(self._static, number))
        return self._replay()

    def _fill(self, batches: Batches) -> None:
        if not self._static:
            self._static = [{name: value.clone() for name, value in batch.items()} for batch in batches]
        for index, (into, batch) in enumerate(zip(self._static, batches, strict=True)):
            for name in into.keys() | batch.keys():
                was, now = (_form(each.get(name)) for each in (into, batch))
                if was != now:
                    raise ConfigError(
                        f"field '{name}' of micro-batch {index} is {now}, and was {was} in the step that is replayed; "
                        "set engine.cuda_graph=false"
                    )
                into[name].copy_(batch[name], non_blocking=True)


def _form(value: Tensor | None) -> str:
    return "absent" if value is None else f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
