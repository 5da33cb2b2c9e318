"""Time of several implementations ("sides") run alternately in one process, on inputs that are in no cache.

A B A B ...: a change of clock, temperature or load then meets all sides alike, and the ratio of two sides within one
round means something even on a busy machine.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

Call = Callable[[int, Callable[[], None]], object]  # (number of the call, mark the end of a part) -> anything
MINIMUM_ROUNDS = 3
CACHE_MULTIPLE = 4


@dataclass(frozen=True)
class Summary:
    """Of samples in seconds."""

    median: float
    lower_quartile: float
    upper_quartile: float


def summarise(samples: Sequence[float]) -> Summary:
    """Median and quartiles (linear interpolation between samples). Raises ValueError without samples."""
    if not samples:
        raise ValueError("no samples to summarise")
    if len(samples) == 1:
        return Summary(samples[0], samples[0], samples[0])
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(median, lower, upper)


class Clock(Protocol):
    """Measures the parts of one call: `start`, `mark` after each part, `stop` -> seconds of each part."""

    def start(self) -> None: ...

    def mark(self) -> None: ...

    def stop(self) -> list[float]: ...


class HostClock:
    """For work that is done when the call returns."""

    def start(self) -> None:
        self._times = [time.perf_counter()]

    def mark(self) -> None:
        self._times.append(time.perf_counter())

    def stop(self) -> list[float]:
        return [after - before for before, after in zip(self._times, self._times[1:], strict=False)]


class CudaClock:
    """Events on the current stream, behind a few fills of a large buffer.

    While the device fills, the host enqueues the work ahead, as in training where it runs ahead of the device: what is
    measured is the device's time. Work that waits for the device loses this head start, as it does in training. The
    fills also empty the L2 cache.
    """

    def __init__(self, device: torch.device, fill_bytes: int = 1 << 30, fills: int = 8):
        self._buffer = torch.empty(fill_bytes, dtype=torch.uint8, device=device)
        self._device, self._fills = device, fills

    def start(self) -> None:
        for number in range(self._fills):
            self._buffer.fill_(number)
        self._events: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def stop(self) -> list[float]:
        torch.cuda.synchronize(self._device)
        pairs = zip(self._events, self._events[1:], strict=False)
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HostClock()


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: L2 of a CUDA device, the largest cache of a CPU (64 MiB if unknown)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in _cpu_cache_files():
        text = path.read_text().strip()
        if text[-1:] in "KMG":
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=64 << 20)


def _cpu_cache_files() -> list[Path]:
    return list(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))


def sets_to_rotate(bytes_per_set: int, cache: int) -> int:
    """Number of input sets, at least two, so that a set has left the cache when it is used again."""
    return max(2, -(-CACHE_MULTIPLE * cache // max(bytes_per_set, 1)))


def interleave(
    sides: Mapping[str, Call],
    clock: Clock,
    *,
    samples: int,
    seconds: float,
    warm_up: int = 1,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[list[float]]]:
    """Runs the sides in turn, `samples` rounds or as many as fit into `seconds`, and at least MINIMUM_ROUNDS.

    Each call gets its number, counted over all calls (so that successive calls can take successive input sets), and
    the function that ends a part. Returns for each side the parts' seconds, one list per round; `warm_up` rounds
    before do not count, but their time does.
    """
    end, number = now() + seconds, 0
    result: dict[str, list[list[float]]] = {name: [] for name in sides}
    gc.collect()
    gc.disable()
    try:
        for turn in range(warm_up + samples):
            if turn >= warm_up + MINIMUM_ROUNDS and now() > end:
                break
            for name, call in sides.items():
                clock.start()
                kept = call(number, clock.mark)
                parts = clock.stop()
                del kept
                number += 1
                if turn >= warm_up:
                    result[name].append(parts)
    finally:
        gc.enable()
    return result
