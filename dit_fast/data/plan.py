"""Which sample stands at which position of the training run: a pure function of (seed, epoch).

Epoch e orders the shards by Philox keys, joins them to groups of `group` shards, and orders the samples inside each
group by Philox keys. Positions run on from epoch to epoch without gaps, so a run's data state is one integer, and a
change of world size changes nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dit_fast.errors import ConfigError
from dit_fast.philox import Stream, uint32_numpy

CACHED_EPOCHS = 2


@dataclass(frozen=True)
class Group:
    """Shards shuffled together. shards: numbers in order; start, stop: positions inside the epoch."""

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
    """Order of samples over all epochs.

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
        self.group = self.num_shards if group in (0, "all") else min(int(group), self.num_shards)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._orders: dict[int, np.ndarray] = {}

    def groups(self, epoch: int) -> list[Group]:
        """The groups of one epoch, in the order in which they are read."""
        shards = np.argsort(self._keys(Stream.SHARD_ORDER, epoch, self.num_shards), kind="stable")
        sizes, found, start = np.diff(self._starts), [], 0
        for first in range(0, self.num_shards, self.group):
            members = shards[first : first + self.group]
            stop = start + int(sizes[members].sum())
            found.append(Group(members, start, stop))
            start = stop
        return found

    def order(self, epoch: int) -> np.ndarray:
        """int64 [num_samples]: sample at each position of the epoch, a permutation. The last two epochs asked for
        stay cached.
        """
        if epoch not in self._orders:
            keys = self._keys(Stream.SAMPLE_ORDER, epoch, self.num_samples)
            parts = []
            for group in self.groups(epoch):
                # ascending sample numbers first: ties and the result do not depend on the order of shards in a group
                samples = np.concatenate(
                    [np.arange(self._starts[s], self._starts[s + 1]) for s in np.sort(group.shards)]
                )
                parts.append(samples[np.argsort(keys[samples], kind="stable")])
            while len(self._orders) >= CACHED_EPOCHS:
                del self._orders[min(self._orders)]
            self._orders[epoch] = np.concatenate(parts)
        return self._orders[epoch]

    def indices(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the sample at each global position in [start, stop), over as many epochs as that
        takes.
        """
        if not 0 <= start <= stop:
            raise ConfigError(f"positions [{start}, {stop}) are not a range of samples seen")
        parts, position = [np.zeros(0, np.int64)], start
        while position < stop:
            epoch, inside = divmod(position, self.num_samples)
            count = min(stop - position, self.num_samples - inside)
            parts.append(self.order(epoch)[inside : inside + count])
            position += count
        return np.concatenate(parts)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_orders": {}}

    def _keys(self, stream: Stream, epoch: int, count: int) -> np.ndarray:
        positions = np.arange(epoch * count, (epoch + 1) * count, dtype=np.int64)
        words = np.asarray(uint32_numpy(self.seed, positions, stream, 2)).astype(np.uint64)
        return (words[:, 0] << np.uint64(32)) | words[:, 1]
