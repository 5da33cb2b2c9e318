"""From the bytes of a sample's members to the tensors of a micro-batch; shared by all readers."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dit_fast.data.address import join
from dit_fast.data.dataset import Indexes, LatentDataset
from dit_fast.data.field import MOMENTS, Family, Field, ShardInfo
from dit_fast.data.index import ShardIndex
from dit_fast.data.shards import key_of
from dit_fast.errors import DataError

Batch = dict[str, torch.Tensor]


class BadSample(DataError):
    """A sample that cannot be read, is damaged or holds what it may not.

    sample: its number in the data set. shard: name of the tar that it lies in.
    """

    def __init__(self, message: str = "", sample: int = -1, shard: str = ""):
        super().__init__(message)
        self.sample, self.shard = sample, shard


@dataclass(frozen=True)
class Column:
    """A field, and where its bytes lie: the tars below a root, and their indexes. Holds no open files."""

    name: str
    field: Field
    root: str
    shards: tuple[ShardInfo, ...]
    indexes: Sequence[ShardIndex]

    def tar(self, shard: int) -> str:
        """Path or address of a tar."""
        return join(self.root, self.shards[shard].name)

    def table(self, shard: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """The column's number among the members of a shard's index, whose offset, length and crc32 follow."""
        index = self.indexes[shard]
        return index.members.index(self.field.member), index.offset, index.length, index.crc

    def entry(self, shard: int, row: int) -> tuple[int, int, int]:
        """Offset, length and crc32 of a sample's member."""
        number, *tables = self.table(shard)
        offset, length, crc = (int(table[row, number]) for table in tables)
        return offset, length, crc

    def describe(self, shard: int, row: int) -> str:
        """`ROOT/shard-000003.tar: 000001234.moments.npy`, for messages."""
        return f"{self.tar(shard)}: {key_of(self.indexes[shard].first_key + row)}.{self.field.member}"

    def bad(self, shard: int, row: int, what: str) -> BadSample:
        """The error that says what is wrong with a sample."""
        return BadSample(what, self.indexes[shard].first_key + row, self.shards[shard].name)

    def check(self, data: bytes, shard: int, row: int, check_crc: bool) -> None:
        """Raises BadSample when the bytes are not those the index was made from."""
        _, length, crc = self.entry(shard, row)
        name = self.describe(shard, row)
        if len(data) != length:
            what = f"{name} has {len(data)} bytes where the index says {length}; restore or rebuild the shard"
            raise self.bad(shard, row, what)
        if check_crc and zlib.crc32(data) != crc:
            what = f"{name} is corrupt (crc32 differs from the index); restore or rebuild the shard"
            raise self.bad(shard, row, what)

    def put(self, target: torch.Tensor, data: bytes, shard: int, row: int) -> None:
        """One sample's member into its place in the batch. Raises BadSample naming it if it does not fit."""
        try:
            target.numpy()[...] = self.field.decode(data, self.name, self.describe(shard, row))
        except DataError as error:
            raise self.bad(shard, row, str(error)) from None


def columns_of(root: str, family: Family, indexes: Sequence[ShardIndex], names: Sequence[str]) -> list[Column]:
    """Those fields of a family that are among `names`."""
    return [Column(name, family.fields[name], root, family.shards, indexes) for name in family.fields if name in names]


def open_columns(dataset: LatentDataset, fields: Sequence[str]) -> list[Column]:
    """Moments, then these fields; the families that hold them are opened, and only those. Raises DataError.

    Their files are checked as the data set's were; not at once where another process has checked those.
    """
    dataset.require(fields)
    first, *added = dataset.info.families
    found = columns_of(dataset.root, first, dataset.indexes, (MOMENTS, *fields))
    for family in added:
        if family.fields.keys() & set(fields):
            indexes = Indexes(dataset.root, dataset.info, family)
            if dataset.digest is not None:
                indexes.check()
            found += columns_of(dataset.root, family, indexes, fields)
    return sorted(found, key=lambda column: (MOMENTS, *fields).index(column.name))


def allocate(columns: Sequence[Column], n: int) -> Batch:
    """Room for n samples."""
    return {column.name: torch.empty((n, *column.field.shape), dtype=column.field.batch_dtype) for column in columns}


def finished(
    batch: Batch, dataset: LatentDataset, positions: np.ndarray, shards: np.ndarray, rows: np.ndarray
) -> Batch:
    """The batch with labels and positions (int64 [n]). shards, rows: int64 [n], where each sample lies."""
    tables = {shard: dataset.indexes[shard].label for shard in set(shards.tolist())}
    labels = np.array([tables[shard][row] for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)], np.int64)
    moments = {MOMENTS: batch.pop(MOMENTS)}
    more = {"label": torch.from_numpy(labels), "position": torch.from_numpy(np.array(positions, np.int64))}
    return {**moments, **more, **batch}
