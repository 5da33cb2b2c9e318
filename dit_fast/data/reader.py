"""Indexed reader: any sample of local shards by one `pread` per member; nothing is unpacked or extracted.

Arrays are read by compiled code where it is there (csrc/host/), one call per shard and member, without the GIL. It
takes what is plainly right and stops at the first sample that is not; that one is read by Python, which says what is
wrong, or takes what is only unusual.
"""

import os
import resource
from collections.abc import Sequence

import numpy as np
import torch

from dit_fast import _C
from dit_fast.data.address import reading
from dit_fast.data.batch import Batch, Column, allocate, finished, open_columns
from dit_fast.data.dataset import LatentDataset
from dit_fast.data.field import MOMENTS
from dit_fast.errors import DataError

MOST_FILES = 4096  # open at once


class MemberReader:
    """Fills rows of arrays with members of tars. Files are opened when first needed; at most half of what the process
    may open stay open.

    Descriptors have no position that reading moves, so a forked process goes on with those of its parent; a spawned one
    opens its own.
    """

    def __init__(self, check_crc: bool = True):
        self._check_crc = check_crc
        self._handles: dict[str, int] = {}  # tar -> file descriptor, the one used last at the end
        self._headers: dict[str, bytes] = {}  # column -> what begins each of its arrays

    def fill(self, column: Column, target: torch.Tensor, shards: np.ndarray, rows: np.ndarray) -> None:
        """`target` [n, ...] becomes the column's values at (shards, rows), int64 [n] each. Raises DataError."""
        if column.field.is_png or _C.host() is None:
            for i, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
                self._put(column, target[i], shard, row)
            return
        for shard in np.unique(shards).tolist():
            self._read_arrays(column, target, shard, rows, np.flatnonzero(shards == shard))

    def _read_arrays(
        self, column: Column, target: torch.Tensor, shard: int, rows: np.ndarray, where: np.ndarray
    ) -> None:
        """Rows `where` of the batch, all of one shard."""
        host, flat, own = _C.host(), target.numpy().reshape(len(target), -1), rows[where]
        tables, half = column.tables(shard, own), column.field.dtype == "float16"
        # of mean and std, the second half
        signless = flat.shape[1] // column.field.shape[0] if column.name == MOMENTS else flat.shape[1]
        done = 0
        while done < len(where):
            header = self._headers.get(column.name)
            if header is not None and host is not None:
                rest, handle = (table[done:] for table in tables), self._handle(column.tars[shard])
                done += host.read_npy(handle, *rest, where[done:], self._check_crc, header, half, signless, flat)
            if done < len(where):
                data = self._put(column, target[where[done]], shard, int(own[done]))
                self._headers[column.name] = data[: 10 + int.from_bytes(data[8:10], "little")]
                done += 1

    def _put(self, column: Column, target: torch.Tensor, shard: int, row: int) -> bytes:
        offset, length, _ = (int(table[0]) for table in column.tables(shard, np.array([row])))
        try:
            data = os.pread(self._handle(column.tars[shard]), length, offset)
        except OSError as error:
            raise DataError(f"{column.describe(shard, row)} cannot be read ({error.strerror})") from None
        column.check(data, shard, row, self._check_crc)
        column.put(target, data, shard, row)
        return data

    def close(self) -> None:
        """Closes this process's files."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _handle(self, tar: str) -> int:
        handle = self._handles.pop(tar, None)
        if handle is None:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            while len(self._handles) >= (MOST_FILES if limit < 0 else min(max(limit // 2, 1), MOST_FILES)):
                os.close(self._handles.pop(next(iter(self._handles))))  # used longest ago
            with reading(tar):
                handle = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
        self._handles[tar] = handle
        return handle

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handles": {}}

    def __del__(self) -> None:
        if "_handles" in self.__dict__:
            self.close()


class IndexedReader(MemberReader):
    """Reads samples of a local data set by number."""

    def __init__(self, dataset: LatentDataset, fields: Sequence[str] = (), check_crc: bool = True):
        super().__init__(check_crc)
        if dataset.remote:
            raise DataError(f"{dataset.root}: the indexed reader needs local shards; use reader='stream'")
        self._dataset, self._columns = dataset, open_columns(dataset, fields)
        self._first = np.array([index.first_key for index in dataset.indexes], np.int64)

    def read(self, positions: np.ndarray, samples: np.ndarray) -> Batch:
        """Micro-batch of the samples with these numbers (int64 [n]); `positions` [n] are handed through.

        Returns moments float32 [n, 2, C, h, w] (or [n, 1, C, h, w], without a std), label and position int64 [n], and
        the fields asked for, [n, *shape]: float32 where they are floating-point, else in their dtype. Raises DataError
        naming shard and sample for damaged data.
        """
        shards = np.searchsorted(self._first, samples, side="right") - 1
        rows = samples - self._first[shards]
        batch = allocate(self._columns, len(samples))
        for column in self._columns:
            self.fill(column, batch[column.name], shards, rows)
        return finished(batch, self._dataset, positions, list(zip(shards.tolist(), rows.tolist(), strict=True)))
