"""Which sample stands at which position of the training run: a pure function of (seed, epoch).

Epoch e orders the shards by Philox keys, joins them to groups of `group` shards, and orders the samples inside each
group by Philox keys. Positions run on from epoch to epoch without gaps, so a run's data state is one integer, and a
change of world size changes nothing.

A group's order is made when its first position is asked for, so that time and memory depend on the group, not on the
data set.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dit_fast.errors import ConfigError
from dit_fast.philox import Stream, uint32_numpy

CACHED = 2  # groups and epochs: a batch may span two
_CHUNK = 1 << 16  # keys made at a time


@dataclass(frozen=True)
class Group:
    """Shards shuffled together. shards: numbers in order; start, stop: positions, counted over all epochs."""

    shards: np.ndarray
    start: int
    stop: int


Window = tuple[int, int]  # positions from the first up to, not with, the second


def merged(windows: Iterable[Sequence[int]]) -> list[Window]:
    """The same positions as windows that ascend and do not touch."""
    found: list[Window] = []
    for start, stop in sorted((int(start), int(stop)) for start, stop in windows):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found


def first_position(step: int, batch: int, left_out: Iterable[Sequence[int]] = ()) -> int:
    """Where the batch of a step (from 0) begins: steps take the positions in order, but for windows that are left out,
    each of whole batches."""
    position = step * batch
    for start, stop in merged(left_out):
        position += stop - start if position >= start else 0
    return position


class Plan:
    """Order of samples over all epochs; may be asked by several threads at a time.

    shard_sizes: samples per shard. seed: of the order. group: shards shuffled together; 0, "all" or at least the number
    of shards gives an exact shuffle of each whole epoch, which then does not depend on how samples are cut into
    shards. Raises ConfigError for an empty data set or a negative group.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, group: int | Literal["all"] = 64):
        sizes = np.asarray(shard_sizes, np.int64)
        if sizes.ndim != 1 or not len(sizes) or sizes.min() < 1:
            raise ConfigError("the data set has no samples or an empty shard; rebuild it with `dit-fast shards build`")
        if group != "all" and group < 0:
            raise ConfigError(f"shuffle group {group} is negative; use 0 or 'all' for an exact shuffle")
        self.num_shards, self.num_samples, self.seed = len(sizes), int(sizes.sum()), seed
        self.group_size = self.num_shards if group in (0, "all") else min(int(group), self.num_shards)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._orders: dict[int, np.ndarray] = {}  # by a group's first position
        self._lock = threading.Lock()

    def group(self, position: int) -> Group:
        """The group that holds a position; the one after it is `group(stop)`."""
        epoch, inside = divmod(position, self.num_samples)
        with self._lock:
            if epoch not in self._epochs:
                shards = np.argsort(
                    self._keys(Stream.SHARD_ORDER, epoch * self.num_shards, 0, self.num_shards), kind="stable"
                )
                ends = np.cumsum(np.diff(self._starts)[shards])
                _keep(self._epochs, epoch, (shards, ends))
            shards, ends = self._epochs[epoch]
        first = int(np.searchsorted(ends, inside, side="right")) // self.group_size * self.group_size
        last, base = min(first + self.group_size, self.num_shards), epoch * self.num_samples
        return Group(shards[first:last], base + int(ends[first - 1] if first else 0), base + int(ends[last - 1]))

    def order(self, group: Group) -> np.ndarray:
        """int64 [stop - start]: the sample at each position of a group. The last two asked for stay cached."""
        with self._lock:
            if group.start not in self._orders:
                base = group.start // self.num_samples * self.num_samples
                # ascending sample numbers first: ties and the result do not depend on the order of shards in a group
                runs = [(int(self._starts[s]), int(self._starts[s + 1])) for s in np.sort(group.shards).tolist()]
                keys = np.concatenate([self._keys(Stream.SAMPLE_ORDER, base, *run) for run in runs])
                samples = np.concatenate([np.arange(*run, dtype=np.int64) for run in runs])
                _keep(self._orders, group.start, samples[np.argsort(keys, kind="stable")])
            return self._orders[group.start]

    def indices(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the sample at each global position in [start, stop), over as many epochs as that
        takes.
        """
        if not 0 <= start <= stop:
            raise ConfigError(f"positions [{start}, {stop}) are not a range of samples seen")
        parts, position = [np.zeros(0, np.int64)], start
        while position < stop:
            group = self.group(position)
            parts.append(self.order(group)[position - group.start : stop - group.start])
            position = min(stop, group.stop)
        return np.concatenate(parts)

    def _keys(self, stream: Stream, base: int, first: int, last: int) -> np.ndarray:
        """uint64 [last - first]: keys of shards or samples of an epoch, whose first is drawn at position `base`."""
        keys = np.empty(last - first, np.uint64)
        for start in range(first, last, _CHUNK):
            positions = base + np.arange(start, min(start + _CHUNK, last), dtype=np.int64)
            words = uint32_numpy(self.seed, positions, stream, 2).astype(np.uint64)
            keys[start - first : start - first + len(words)] = (words[:, 0] << np.uint64(32)) | words[:, 1]
        return keys


def _keep(cache: dict, key: int, value: object) -> None:
    while len(cache) >= CACHED:
        del cache[next(iter(cache))]  # made first
    cache[key] = value
