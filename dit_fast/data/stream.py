"""Streaming reader: tars from start to end through webdataset, for http(s) addresses and local folders.

It yields exactly what the indexed reader yields. One group of shards is read at a time; the samples this rank needs
from it are kept in memory until their turn. Each rank (and each worker) reads all shards of a group, so the traffic
is ranks times workers times the data set per epoch; prefer one worker. What webdataset passes over in silence
(missing or extra samples, flipped bytes) is found by comparing with the index. No member is decoded by webdataset.
"""

from collections.abc import Iterator

import numpy as np
import torch

from dit_fast.data.address import join, open_stream
from dit_fast.data.batch import BatchBuilder
from dit_fast.data.dataset import LatentDataset
from dit_fast.data.plan import Plan
from dit_fast.errors import DataError, UserError


class StreamReader:
    """Yields micro-batches for a sequence of position arrays, reading each shard group once."""

    def __init__(self, dataset: LatentDataset, plan: Plan, fields: tuple[str, ...] = (), check_crc: bool = True):
        self._dataset, self._plan = dataset, plan
        self._builder = BatchBuilder(dataset, fields, check_crc)
        self._first = np.array([index.first_key for index in dataset.indexes], np.int64)
        self._sizes = np.array(dataset.info.shard_sizes, np.int64)

    def read(self, batches: Iterator[np.ndarray]) -> Iterator[dict[str, torch.Tensor]]:
        """Micro-batches as `IndexedReader.read` gives them. batches: ascending int64 positions, endless or not."""
        pending: list[np.ndarray] = []  # batches looked at, in order, not yet built
        kept: dict[int, tuple[int, int, tuple[bytes, ...]]] = {}  # position -> sample
        done = 0  # positions below this have been read
        for batch in batches:
            pending.append(batch)
            while pending and int(pending[0][-1]) >= done:
                done = self._read_group(max(done, int(pending[0][0])), pending, batches, kept)
            yield self._emit(pending.pop(0), kept)
            while pending and int(pending[0][-1]) < done:
                yield self._emit(pending.pop(0), kept)

    def _emit(self, positions: np.ndarray, kept: dict) -> dict[str, torch.Tensor]:
        return self._builder.build(positions, [kept.pop(position) for position in positions.tolist()])

    def _read_group(self, position: int, pending: list[np.ndarray], batches: Iterator[np.ndarray], kept: dict) -> int:
        """Reads the group that holds `position`; returns the first position after it."""
        epoch, inside = divmod(position, self._plan.num_samples)
        group = next(group for group in self._plan.groups(epoch) if inside < group.stop)
        base = epoch * self._plan.num_samples
        start, stop = base + group.start, base + group.stop
        while int(pending[-1][-1]) < stop:
            following = next(batches, None)
            if following is None:
                break
            pending.append(following)
        wanted = np.concatenate(pending)
        wanted = wanted[(wanted >= max(start, position)) & (wanted < stop)]
        order = self._plan.order(epoch)
        position_of = dict(zip(order[wanted - base].tolist(), wanted.tolist(), strict=True))
        for shard in group.shards.tolist():
            for row, payload in self._read_shard(shard):
                where = position_of.get(int(self._first[shard]) + row)
                if where is not None:
                    for member, data in zip(self._builder.members, payload, strict=True):
                        self._builder.check(data, shard, row, member)
                    kept[where] = (shard, row, payload)
        return stop

    def _read_shard(self, shard: int) -> Iterator[tuple[int, tuple[bytes, ...]]]:
        """(row, bytes per member) of every sample, in order. Raises DataError when a sample is missing or added."""
        name = join(self._dataset.root, self._dataset.info.shards[shard].name)
        fix = "restore or rebuild the shard"
        first, size, row = int(self._first[shard]), int(self._sizes[shard]), 0
        with open_stream(name) as stream:
            try:
                for sample in _webdataset_samples(name, stream):
                    key = f"{first + row:09d}"
                    if row >= size or sample["__key__"] != key:
                        expected = f"sample {key}" if row < size else f"the end after {size} samples"
                        raise DataError(f"{name}: sample '{sample['__key__']}' where the index says {expected}; {fix}")
                    missing = [member for member in self._builder.members if member not in sample]
                    if missing:
                        raise DataError(f"{name}: sample {key} lacks {missing[0]}; {fix}")
                    yield row, tuple(sample[member] for member in self._builder.members)
                    row += 1
            except UserError:
                raise
            except Exception as error:  # tarfile, http and webdataset raise many kinds for a damaged stream
                text = str(error.args[0] if error.args else error).splitlines()
                reason = f"{type(error).__name__}: {text[0] if text else ''}"
                raise DataError(f"{name}: stream broke after {row} of {size} samples ({reason}); {fix}") from None
        if row != size:
            raise DataError(f"{name}: stream ended after {row} of {size} samples; {fix}")


def _webdataset_samples(name: str, stream: object) -> Iterator[dict]:
    """Samples of one tar as bytes, grouped by webdataset."""
    try:
        from webdataset.tariterators import group_by_keys, tar_file_expander
    except ImportError:
        raise DataError("the streaming reader needs webdataset; run `pip install 'webdataset>=1.0,<2'`") from None
    yield from group_by_keys(tar_file_expander([{"url": name, "stream": stream}]))
