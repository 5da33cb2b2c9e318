"""The processes of a job as one small object: rank, size, device, and the few things ranks say to each other."""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dit_fast.errors import ConfigError, UserError

T = TypeVar("T")


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of the ranks' tensors, on each; x itself outside of a process group. Collective, forward and backward.

    Its gradient is that of the sum of the ranks' losses, each of which depends on every rank's x.
    """
    return _SumOverRanks.apply(x) if ranks() > 1 else x


def ranks() -> int:
    """Processes of the group that this one has joined; 1 outside of one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose backward all-reduces too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


@dataclass(frozen=True)
class World:
    """One process of `size`. device is this process's. In a world of more than one, all methods but `shares`, `post`
    and `posted` are collective. store: of a job of several ranks that train, kept in rank 0."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None

    def reduce(self, tensor: Tensor, operation: Literal["sum", "mean", "max"]) -> Tensor:
        """Reduces over ranks, in place, and returns the tensor; on this process's device."""
        if self.size > 1:
            kind = dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM
            dist.all_reduce(tensor, op=kind)
            if operation == "mean":
                tensor /= self.size
        return tensor

    def agree(self, decide: Callable[[], T], rank: int = 0) -> T:
        """What `decide` returned on rank `rank` (JSON types), on every rank.

        A UserError or OSError raised there is raised as a UserError on every rank, so that none waits for ever.
        """
        answer: dict[str, Any] = {}
        if self.rank == rank:
            try:
                answer = {"value": decide()}
            except UserError as error:
                answer = {"error": str(error)}
            except OSError as error:
                answer = {"error": f"{error}; mend it and start the same command again"}
        if self.size > 1:
            answer = json.loads(self._broadcast(json.dumps(answer).encode(), rank))
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["value"]

    def _broadcast(self, data: bytes, rank: int) -> bytes:
        length = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        dist.broadcast(length, rank)
        content = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == rank:
            content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(content, rank)
        return content.cpu().numpy().tobytes()

    def shares(self, counts: Sequence[int]) -> list[tuple[int, int]]:
        """This rank's part of things of so many elements, laid end to end: of each, from one element up to another.

        The parts of the ranks differ by one element at most. What has no elements belongs to all.
        """
        total = sum(counts)
        low, high = total * self.rank // self.size, total * (self.rank + 1) // self.size
        found, offset = [], 0
        for count in counts:
            first, end = (min(max(edge - offset, 0), count) for edge in (low, high))
            found.append((first, end))
            offset += count
        return found

    def post(self, key: str, text: str) -> None:
        """Leaves a text for another rank; from any thread. RuntimeError where rank 0 is gone."""
        assert self.store is not None
        self.store.set(key, text)

    def posted(self, key: str) -> str | None:
        """What was left under a key, taken away; None where there is nothing yet. From any thread, and as above."""
        assert self.store is not None
        if not self.store.check([key]):
            return None
        text = self.store.get(key).decode()
        self.store.delete_key(key)
        return text

    def close(self) -> None:
        """Waits for all ranks and leaves the process group, so that no rank is torn down while another still talks."""
        if self.size > 1 or dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


class Late:
    """A tensor on its way to the host: made now, read later, and reading waits for nothing that was queued after it."""

    def __init__(self, tensor: Tensor):
        self._event: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host


class Place(NamedTuple):
    """Where a launcher (deepspeed, torchrun, srun with the variables set) put this process."""

    rank: int
    size: int
    local_rank: int


def launch_place() -> Place | None:
    """This process's place, None where no launcher started it. Raises ConfigError where its variables are no place."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found:
        return None
    for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(
                f"the environment has {', '.join(found)} but no {name}: a launcher sets all of RANK, WORLD_SIZE, "
                "LOCAL_RANK, MASTER_ADDR and MASTER_PORT; for one process, unset them"
            )
    for name in (*names, "MASTER_PORT"):
        if not re.fullmatch("[0-9]{1,9}", os.environ[name]):
            raise ConfigError(f"the environment variable {name}={os.environ[name]!r} is not a whole number")
    place = Place(*(int(os.environ[name]) for name in names))
    if place.rank >= place.size or place.local_rank >= place.size or not 0 < int(os.environ["MASTER_PORT"]) < 65536:
        values = " ".join(f"{name}={os.environ[name]}" for name in (*names, "MASTER_PORT"))
        raise ConfigError(f"the launcher's variables do not fit together: {values}")
    return place


def launched() -> bool:
    """Whether a launcher started this process."""
    return launch_place() is not None


def here() -> World:
    """This process: one of those that a launcher started, or the only one; the first CUDA device, or the CPU.

    No process group is joined, so ranks can share work by their numbers, but not talk. Raises ConfigError where there
    are fewer devices than processes.
    """
    place = launch_place() or Place(0, 1, 0)
    if not torch.cuda.is_available():
        return World(place.rank, place.size, torch.device("cpu"))
    if place.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {place.rank} wants cuda:{place.local_rank}, but this machine has {torch.cuda.device_count()} "
            "devices; start fewer processes"
        )
    return World(place.rank, place.size, torch.device("cuda", place.local_rank))


def meet() -> None:
    """Returns when every process that the launcher started has come here; at once without one.

    No process group is joined. Raises UserError where one does not come within half an hour.
    """
    place = launch_place()
    if place is None or place.size == 1:
        return
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=30)))
        for word in ("came", "left"):  # rank 0 may hold the store, so it leaves last
            store.set(f"dit_fast/{word}/{rank}", "")
            if word == "came" or not rank:
                store.wait([f"dit_fast/{word}/{other}" for other in range(size)])
    except dist.DistError as error:
        raise UserError(
            f"rank {place.rank}: not all {place.size} processes came ({str(error).splitlines()[0]})"
        ) from None


def single() -> World:
    """The world of one process, whoever started it."""
    return World(0, 1, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
