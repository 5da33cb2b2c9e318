"""Streaming reader: tars from start to end through webdataset, for http(s) addresses and local folders.

It yields exactly what the indexed reader yields. One group of shards is read at a time; the samples this rank needs
from it are kept in memory until their turn. Each rank (and each worker) reads all shards of a group, so the traffic
is ranks times workers times the data set per epoch; prefer one worker. What webdataset passes over in silence or takes
for true (missing or extra samples, sizes that a header claims) never reaches it: every header is compared with the
index on its way there. Tars of fields that were added are read beside those with the latents, a sample at a time. No
member is decoded by webdataset.
"""

import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dit_fast.data.address import open_stream, reading
from dit_fast.data.batch import Batch, Column, allocate, finished, open_columns
from dit_fast.data.dataset import LatentDataset
from dit_fast.data.index import ShardIndex
from dit_fast.data.plan import Plan
from dit_fast.data.shards import key_of, member_header
from dit_fast.errors import DataError, UserError

FIX = "restore or rebuild the shard"
_Kept = tuple[int, int, dict[str, bytes]]  # shard, row, bytes of each column


class StreamReader:
    """Yields micro-batches for a sequence of position arrays, reading each shard group once."""

    def __init__(self, dataset: LatentDataset, plan: Plan, fields: Sequence[str] = (), check_crc: bool = True):
        self._dataset, self._plan, self._check_crc = dataset, plan, check_crc
        self._columns = open_columns(dataset, fields)
        # by the tars they lie in, so that each is read once
        self._families = [[c for c in self._columns if c.tars == tars] for tars in {c.tars: 0 for c in self._columns}]
        self._first = np.array([index.first_key for index in dataset.indexes], np.int64)

    def read(self, batches: Iterator[np.ndarray]) -> Iterator[Batch]:
        """Micro-batches as `IndexedReader.read` gives them. batches: ascending int64 positions, endless or not."""
        pending: list[np.ndarray] = []  # batches looked at, in order, not yet built
        kept: dict[int, _Kept] = {}  # position -> sample
        done = 0  # positions below this have been read
        for batch in batches:
            pending.append(batch)
            while pending and int(pending[0][-1]) >= done:
                done = self._read_group(max(done, int(pending[0][0])), pending, batches, kept)
            yield self._emit(pending.pop(0), kept)
            while pending and int(pending[0][-1]) < done:
                yield self._emit(pending.pop(0), kept)

    def _emit(self, positions: np.ndarray, kept: dict[int, _Kept]) -> Batch:
        samples = [kept.pop(position) for position in positions.tolist()]
        batch = allocate(self._columns, len(samples))
        for i, (shard, row, payload) in enumerate(samples):
            for column in self._columns:
                column.put(batch[column.name][i], payload[column.name], shard, row)
        return finished(batch, self._dataset, positions, [(shard, row) for shard, row, _ in samples])

    def _read_group(
        self, position: int, pending: list[np.ndarray], batches: Iterator[np.ndarray], kept: dict[int, _Kept]
    ) -> int:
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
            for row, parts in enumerate(
                zip(*(self._read_tar(family, shard) for family in self._families), strict=True)
            ):
                where = position_of.get(int(self._first[shard]) + row)
                if where is not None:
                    payload = {name: data for part in parts for name, data in part.items()}
                    for column in self._columns:
                        column.check(payload[column.name], shard, row, self._check_crc)
                    kept[where] = (shard, row, payload)
        return stop

    @staticmethod
    def _read_tar(family: Sequence[Column], shard: int) -> Iterator[dict[str, bytes]]:
        """The members of these columns, of each sample. Raises DataError where the tar is not what the index says."""
        name, index = family[0].tars[shard], family[0].indexes[shard]
        with reading(name), open_stream(name, index.tar_bytes) as stream:
            checked = _CheckedTar(name, index, stream)
            try:
                for sample in _webdataset_samples(name, checked):
                    yield {column.name: sample[column.field.member] for column in family}
            except Exception:
                if checked.wrong is None:
                    raise
                raise DataError(checked.wrong) from None  # webdataset adds to what it was given
            checked.finish()


class _CheckedTar:
    """A shard's bytes in order, as far as they are what the index says; then DataError, kept in `wrong`.

    So no header can claim anything: tarfile would believe its sizes (sparse files, extended headers), and take a
    damaged one for the end.
    """

    def __init__(self, name: str, index: ShardIndex, stream: Any):
        self.wrong: str | None = None
        self._name, self._stream, self._at, self._bytes = name, stream, 0, index.tar_bytes
        self._headers = self._expected(index)
        self._next = next(self._headers)

    def read(self, count: int) -> bytes:
        try:
            return self._read(count)
        except (UserError, OSError) as error:
            self.wrong = str(error) if isinstance(error, UserError) else f"{self._name}: cannot be read ({error})"
            raise

    def finish(self) -> None:
        """Raises DataError when bytes are missing or left over."""
        while self._at < self._bytes:
            self._read(self._bytes - self._at)
        if self._stream.read(1):
            raise DataError(f"{self._name}: goes on after the {self._bytes} bytes that the index says; {FIX}")

    def _read(self, count: int) -> bytes:
        start, count = self._at, min(count, self._bytes - self._at)
        data = self._stream.read(count)
        if len(data) != count:
            raise DataError(f"{self._name}: ends after {start + len(data)} of {self._bytes} bytes; {FIX}")
        self._at += count
        while self._next[0] < self._at:
            place, name, header = self._next
            found = data[place - start : place - start + len(header)]
            if found != header[: len(found)]:
                raise DataError(f"{self._name}: {name} is damaged; {FIX}")
            self._next = next(self._headers)
        return data

    @staticmethod
    def _expected(index: ShardIndex) -> Iterator[tuple[int, str, bytes]]:
        """(offset, name, bytes) of every header and of the end mark, in blocks that no read cuts."""
        columns = np.argsort(index.offset[0]).tolist()
        for row, (offsets, lengths) in enumerate(zip(index.offset.tolist(), index.length.tolist(), strict=True)):
            key = key_of(index.first_key + row)
            for column in columns:
                name = f"{key}.{index.members[column]}"
                header = member_header(name, lengths[column])
                yield offsets[column] - len(header), f"the header of {name}", header
        for blocks in (2, 1):
            yield index.tar_bytes - blocks * tarfile.BLOCKSIZE, "the end mark", bytes(tarfile.BLOCKSIZE)
        yield index.tar_bytes, "", b""


def _webdataset_samples(name: str, stream: object) -> Iterator[dict]:
    """Samples of one tar as bytes, grouped by webdataset."""
    try:
        from webdataset.tariterators import group_by_keys, tar_file_expander
    except ImportError:
        raise DataError("the streaming reader needs webdataset; run `pip install 'webdataset>=1.0,<2'`") from None
    yield from group_by_keys(tar_file_expander([{"url": name, "stream": stream}]))
