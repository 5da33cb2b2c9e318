"""Indexed reader: any sample of a shard by one `pread` per member; nothing is unpacked or extracted.

Arrays are read by compiled code where it is there (csrc/host/), one call per member and batch, without the GIL. It
takes what is plainly right and stops at the first sample that is not; that one is read by Python, which says what is
wrong, or takes what is only unusual.
"""

import os
import resource
import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import torch

from dit_fast import _C
from dit_fast.data.address import reading
from dit_fast.data.batch import BadSample, Batch, Column, allocate, finished, open_columns
from dit_fast.data.cache import ShardCache
from dit_fast.data.dataset import LatentDataset
from dit_fast.data.field import MOMENTS
from dit_fast.data.plan import Group, Plan
from dit_fast.errors import ConfigError, DataError

MOST_FILES = 4096  # open at once
CALL_SHARDS = 64  # in one call of compiled code
ENTERED = 4  # groups remembered


class _File:
    """An open file, closed when nobody holds it any more: a thread may still read what another has let go."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if "number" in self.__dict__:
            os.close(self.number)


class MemberReader:
    """Fills rows of arrays with members of tars, in several threads at a time. Files are opened when first needed; at
    most half of what the process may open stay open.

    cache: reads copies there, not the shards themselves.
    """

    def __init__(self, check_crc: bool = True, cache: ShardCache | None = None):
        self._check_crc, self.cache = check_crc, cache
        self._files: dict[tuple[str, str], _File] = {}  # by root and tar, the one used last at the end
        self._headers: dict[str, bytes] = {}  # column -> what begins each of its arrays
        self._lock = threading.Lock()
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most_files = MOST_FILES if limit < 0 else min(max(limit // 2, 1), MOST_FILES)

    def fill(self, column: Column, target: torch.Tensor, shards: np.ndarray, rows: np.ndarray) -> None:
        """`target` [n, ...] becomes the column's values at (shards, rows), int64 [n] each. Raises DataError."""
        if column.field.is_png or _C.host() is None:
            for i, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
                self._put(column, target[i], shard, row)
            return
        numbers, slots = np.unique(shards, return_inverse=True)
        places = np.lexsort((rows, slots))  # as they lie in the tars
        slots, count = slots[places], min(CALL_SHARDS, self.most_files)
        for first in range(0, len(numbers), count):
            part = slice(*np.searchsorted(slots, (first, first + count)))
            found = numbers[first : first + count].tolist()
            self._read_arrays(column, target, found, slots[part] - first, rows[places[part]], places[part])

    def _read_arrays(
        self,
        column: Column,
        target: torch.Tensor,
        shards: list[int],
        slots: np.ndarray,
        rows: np.ndarray,
        places: np.ndarray,
    ) -> None:
        """Rows `places` of the batch from `rows` of shards[slots], int64 [n] each."""
        host, flat = _C.host(), target.numpy().reshape(len(target), -1)
        half = column.field.dtype == "float16"
        # of mean and std, the second half
        signless = flat.shape[1] // column.field.shape[0] if column.name == MOMENTS else flat.shape[1]
        files = [self._file(column, shard) for shard in shards]
        tables = [(file.number, *column.table(shard)) for file, shard in zip(files, shards, strict=True)]
        done = 0
        while done < len(places):
            header = self._headers.get(column.name)
            if header is not None and host is not None:
                rest = (each[done:] for each in (slots, rows, places))
                done += host.read_npy(tables, *rest, self._check_crc, header, half, signless, flat)
            if done < len(places):
                data = self._put(column, target[places[done]], shards[slots[done]], int(rows[done]))
                self._headers[column.name] = data[: 10 + int.from_bytes(data[8:10], "little")]
                done += 1

    def _put(self, column: Column, target: torch.Tensor, shard: int, row: int) -> bytes:
        try:
            data = self._get(column, shard, row)
            column.check(data, shard, row, self._check_crc)
        except BadSample:  # of the shard, or of its copy alone
            if self.cache is None or not self.cache.renew(column.root, column.shards[shard]):
                raise
            with self._lock:
                self._files.pop((column.root, column.shards[shard].name), None)
            data = self._get(column, shard, row)
            column.check(data, shard, row, self._check_crc)
        column.put(target, data, shard, row)
        return data

    def _get(self, column: Column, shard: int, row: int) -> bytes:
        offset, length, _ = column.entry(shard, row)
        file = self._file(column, shard)
        try:
            return os.pread(file.number, length, offset)
        except OSError as error:
            raise column.bad(shard, row, f"{column.describe(shard, row)} cannot be read ({error.strerror})") from None

    def close(self) -> None:
        """Lets the files go."""
        self._files.clear()

    def _file(self, column: Column, shard: int) -> _File:
        key = column.root, column.shards[shard].name
        with self._lock:
            file = self._files.pop(key, None)
            if file is not None:
                self._files[key] = file
                return file
            while len(self._files) >= self.most_files:
                del self._files[next(iter(self._files))]  # used longest ago
        file = self._open(column, shard)
        with self._lock:
            self._files[key] = file
        return file

    def _open(self, column: Column, shard: int) -> _File:
        while self.cache is not None:
            path = self.cache.path(column.root, column.shards[shard])
            try:
                return _File(str(path))
            except FileNotFoundError:
                pass  # another process made room in between
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        tar = column.tar(shard)
        with reading(tar):
            return _File(tar)


class IndexedReader(MemberReader):
    """Reads samples of a data set by number: a local one as it lies, others through a cache."""

    def __init__(
        self,
        dataset: LatentDataset,
        fields: Sequence[str] = (),
        check_crc: bool = True,
        cache: ShardCache | None = None,
    ):
        super().__init__(check_crc, cache)
        if dataset.remote and cache is None:
            raise DataError(f"{dataset.root}: the indexed reader needs local shards; use reader='stream'")
        self._dataset, self._columns = dataset, open_columns(dataset, fields)
        self._families = {column.shards: column for column in self._columns}.values()  # a column of each
        self._first = np.cumsum([0, *dataset.info.shard_sizes[:-1]])
        self._entering = threading.Lock()
        self._entered: dict[int, list[Future]] = {}  # by a group's first position: what it waits for
        self._ahead = -1  # first position of the last group whose next one is on its way

    def follow(self, plan: Plan) -> None:
        """Samples will be asked for in this order. Raises ConfigError where the cache does not hold two groups."""
        shards = min(2 * plan.group_size, plan.num_shards)
        for column in self._families:
            column.indexes.keep(shards)  # type: ignore[attr-defined]
        if self.cache is not None:
            # a copy that was removed takes room until it is closed
            self.most_files = min(self.most_files, max(shards * len(self._families), CALL_SHARDS))
            need = sum(shards * max(shard.bytes for shard in column.shards) for column in self._families)
            if need > self.cache.limit:
                raise ConfigError(
                    f"data.cache_gib allows {self.cache.limit / 2**30:.3g} GiB, and two groups of {plan.group_size} "
                    f"shards take up to {need / 2**30:.3g}; raise it or lower data.shuffle_group"
                )

    def enter(self, plan: Plan, positions: np.ndarray, turn: float) -> None:
        """Before the samples at these positions are read: all indexes of their groups are opened, and through a cache
        shards and indexes of the next group are fetched too. So an index that is wrong ends every rank at the first
        batch of its group, whichever samples they read. turn: in [0, 1), where in a group to begin to fetch, so that
        processes which share a cache begin at different shards. Raises DataError.
        """
        position, last = int(positions[0]), int(positions[-1])
        while position <= last:
            group = plan.group(position)
            with self._entering:
                self._begin(group, turn)
                if self.cache is not None and group.start > self._ahead:
                    self._ahead = group.start
                    self._begin(plan.group(group.stop), turn)
                waiting = self._entered[group.start]
            for future in list(waiting):
                future.result()
            waiting.clear()
            position = group.stop

    def _begin(self, group: Group, turn: float) -> None:
        if group.start in self._entered:
            return
        while len(self._entered) >= ENTERED:
            del self._entered[next(iter(self._entered))]  # entered first
        found: list[Future] = []
        self._entered[group.start] = found
        indexes = [(column.indexes, shard) for column in self._families for shard in group.shards.tolist()]
        if self.cache is None:
            opened: Future = Future()
            found.append(opened)
            try:
                for those, shard in indexes:
                    _ = those[shard]
                opened.set_result(None)
            except Exception as error:
                opened.set_exception(error)
            return
        found += [self.cache.submit(those.__getitem__, shard) for those, shard in indexes]
        shards = np.roll(group.shards, -int(turn * len(group.shards))).tolist()
        for column in self._families:
            self.cache.ahead(column.root, [column.shards[shard] for shard in shards])

    def read(self, positions: np.ndarray, samples: np.ndarray) -> Batch:
        """Micro-batch of the samples with these numbers (int64 [n]); `positions` [n] are handed through.

        Returns moments float32 [n, 2, C, h, w] (or [n, 1, C, h, w], without a std), label and position int64 [n], and
        the fields asked for, [n, *shape]: float32 where they are floating-point, else in their dtype. Raises BadSample
        naming shard and sample for a damaged one, DataError for whole shards.
        """
        shards = np.searchsorted(self._first, samples, side="right") - 1
        rows = samples - self._first[shards]
        batch = allocate(self._columns, len(samples))
        for column in self._columns:
            self.fill(column, batch[column.name], shards, rows)
        return finished(batch, self._dataset, positions, shards, rows)
