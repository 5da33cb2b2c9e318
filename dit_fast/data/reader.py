"""Indexed reader: any sample of local shards by one `pread` per member; nothing is unpacked or extracted."""

import os

import numpy as np
import torch

from dit_fast.data.batch import BatchBuilder
from dit_fast.data.dataset import LatentDataset
from dit_fast.errors import DataError


class IndexedReader:
    """Reads samples by number. Files are opened when first needed, once per process, so it survives fork and spawn."""

    def __init__(self, dataset: LatentDataset, fields: tuple[str, ...] = (), check_crc: bool = True):
        if dataset.remote:
            raise DataError(f"{dataset.root}: the indexed reader needs local shards; use reader='stream'")
        self._builder = BatchBuilder(dataset, fields, check_crc)
        self._first = np.array([index.first_key for index in dataset.indexes], np.int64)
        self._handles: dict[int, int] = {}
        self._owner = os.getpid()

    def read(self, positions: np.ndarray, samples: np.ndarray) -> dict[str, torch.Tensor]:
        """Micro-batch of the samples with these numbers (int64 [n]); `positions` [n] are handed through.

        Returns moments float32 [n, 2, C, h, w], label and position int64 [n], and the extra fields (image uint8
        [n, 3, S, S], features float32 [n, T, Z]). Raises DataError naming shard and sample for damaged data.
        """
        shards = np.searchsorted(self._first, samples, side="right") - 1
        found = []
        for shard, row in zip(shards.tolist(), (samples - self._first[shards]).tolist(), strict=True):
            found.append((shard, row, tuple(self._member(shard, row, member) for member in self._builder.members)))
        return self._builder.build(positions, found)

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
        if self._owner != os.getpid():  # forked: the handles belong to the parent
            self._handles, self._owner = {}, os.getpid()
        if shard not in self._handles:
            dataset = self._builder.dataset
            self._handles[shard] = os.open(
                f"{dataset.root}/{dataset.info.shards[shard].name}", os.O_RDONLY | os.O_CLOEXEC
            )
        return self._handles[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handles": {}}

    def __del__(self) -> None:
        if self.__dict__.get("_owner") == os.getpid():
            self.close()
