"""Indexed reader: any sample of local shards by one `pread` per member; nothing is unpacked or extracted.

Arrays are read by compiled code where it is there (csrc/host/), one call per shard and member, without the GIL. It
takes what is plainly right and stops at the first sample that is not; that one is read by Python, which says what is
wrong, or takes what is only unusual.
"""

import os
import resource

import numpy as np
import torch

from dit_fast import _C
from dit_fast.data.address import one_line
from dit_fast.data.batch import BatchBuilder
from dit_fast.data.dataset import LatentDataset
from dit_fast.data.shards import MOMENTS_MEMBER
from dit_fast.errors import DataError

MOST_FILES = 4096  # open at once


class IndexedReader:
    """Reads samples by number. Files are opened when first needed; at most half of what the process may open stay open.

    Descriptors have no position that reading moves, so a forked process goes on with those of its parent; a spawned one
    opens its own.
    """

    def __init__(self, dataset: LatentDataset, fields: tuple[str, ...] = (), check_crc: bool = True):
        if dataset.remote:
            raise DataError(f"{dataset.root}: the indexed reader needs local shards; use reader='stream'")
        self._builder = BatchBuilder(dataset, fields, check_crc)
        self._first = np.array([index.first_key for index in dataset.indexes], np.int64)
        self._handles: dict[int, int] = {}  # shard -> file descriptor, the one used last at the end
        self._layouts: dict[str, tuple[bytes, bool] | None] = {}  # member -> npy header, whether it is float16

    def read(self, positions: np.ndarray, samples: np.ndarray) -> dict[str, torch.Tensor]:
        """Micro-batch of the samples with these numbers (int64 [n]); `positions` [n] are handed through.

        Returns moments float32 [n, 2, C, h, w], label and position int64 [n], and the extra fields (image uint8
        [n, 3, S, S], features float32 [n, T, Z]). Raises DataError naming shard and sample for damaged data.
        """
        shards = np.searchsorted(self._first, samples, side="right") - 1
        rows = samples - self._first[shards]
        places = list(zip(shards.tolist(), rows.tolist(), strict=True))
        batch = self._builder.allocate(positions, places)
        for name, member in zip(self._builder.names, self._builder.members, strict=True):
            if member.endswith(".npy") and _C.host() is not None:
                for shard in np.unique(shards):
                    self._read_arrays(batch[name], member, int(shard), rows, np.flatnonzero(shards == shard))
            else:
                for i, (shard, row) in enumerate(places):
                    self._put(batch[name][i], shard, row, member)
        return batch

    def _read_arrays(self, target: torch.Tensor, member: str, shard: int, rows: np.ndarray, where: np.ndarray) -> None:
        """Rows `where` of the batch, all of one shard."""
        index, host = self._builder.dataset.indexes[shard], _C.host()
        column, flat = index.members.index(member), target.numpy().reshape(len(target), -1)
        own = rows[where]
        columns = [np.ascontiguousarray(table[own, column]) for table in (index.offset, index.length, index.crc)]
        done = 0
        while done < len(where):
            layout = self._layouts.get(member)
            if layout is not None and host is not None:
                rest = (table[done:] for table in columns)
                check, handle = self._builder.check_crc, self._handle(shard)
                signless = flat.shape[1] // 2 if member == MOMENTS_MEMBER else flat.shape[1]  # std: the second half
                done += host.read_npy(handle, *rest, where[done:], check, *layout, signless, flat)
            if done < len(where):
                data = self._put(target[where[done]], shard, int(own[done]), member)
                self._layouts[member] = _layout(data)
                done += 1

    def _put(self, target: torch.Tensor, shard: int, row: int, member: str) -> bytes:
        data = self._member(shard, row, member)
        self._builder.put(target, data, shard, row, member)
        return data

    def close(self) -> None:
        """Closes this process's files."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _member(self, shard: int, row: int, member: str) -> bytes:
        offset, length, _ = self._builder.place(shard, row, member)
        try:
            data = os.pread(self._handle(shard), length, offset)
        except OSError as error:
            raise DataError(f"{self._builder.describe(shard, row, member)} cannot be read ({error.strerror})") from None
        self._builder.check(data, shard, row, member)
        return data

    def _handle(self, shard: int) -> int:
        handle = self._handles.pop(shard, None)
        if handle is None:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            while len(self._handles) >= (MOST_FILES if limit < 0 else min(max(limit // 2, 1), MOST_FILES)):
                os.close(self._handles.pop(next(iter(self._handles))))  # used longest ago
            path = self._builder.dataset.shard_path(shard)
            with one_line(path):
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._handles[shard] = handle
        return handle

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handles": {}}

    def __del__(self) -> None:
        if "_handles" in self.__dict__:
            self.close()


def _layout(data: bytes) -> tuple[bytes, bool] | None:
    """Header of a readable npy member, and whether it is float16; None for what compiled code does not take."""
    header = data[: 10 + int.from_bytes(data[8:10], "little")]
    for descriptor, half in ((b"'<f4'", False), (b"'<f2'", True)):
        if b"'descr': " + descriptor in header:
            return header, half
    return None
