"""Copies of shards on this machine: each shard comes once, whichever processes ask for it, and the oldest make room."""

import fcntl
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

from dit_fast.data import remote
from dit_fast.data.address import is_remote, join, read_part
from dit_fast.data.field import ShardInfo
from dit_fast.data.threads import Threads, pause
from dit_fast.errors import ConfigError, DataError

PART_BYTES = 4 << 20  # of one request
FETCHED_AT_ONCE = 8
GIB = 1 << 30
FORGOTTEN_SECONDS = 3600  # a part that nobody has lengthened for so long


class ShardCache:
    """Shards of addresses (or slow disks) as files of a folder that processes of a machine share.

    A shard is fetched under a lock, so by one of them; what a killed one has fetched, the next goes on with. Files are
    named after address and content. Once there are more than `limit` bytes, those not asked for longest are removed.
    folder: "" for one of this user in the system's temporary folder. Raises ConfigError where it cannot be used.
    """

    def __init__(self, folder: str | Path = "", limit: int = 64 * GIB):
        self.limit = limit
        self.folder = Path(folder or Path(tempfile.gettempdir(), f"dit_fast-{os.getuid()}-shards"))
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not folder and (self.folder.is_symlink() or self.folder.stat().st_uid != os.getuid()):
                raise ConfigError(f"{self.folder}: belongs to another user; set data.cache to a folder of yours")
        except OSError as error:
            raise ConfigError(f"data.cache={self.folder}: cannot be used ({error.strerror}); name another") from None
        self._coming: dict[Path, Future] = {}
        self._renewed: set[Path] = set()
        self._lock = threading.Lock()
        self._threads: Threads | None = None
        self._open = True

    def path(self, root: str, shard: ShardInfo) -> Path:
        """The shard's copy, fetched where it is not there. Raises DataError."""
        place = self._place(root, shard)
        try:
            os.utime(place)
            return place
        except OSError:
            try:
                return self._fetched(root, shard, place).result()
            except DataError:
                with self._lock:
                    self._coming.pop(place, None)  # another try begins anew
                raise

    def ahead(self, root: str, shards: Iterable[ShardInfo]) -> None:
        """Has them fetched, in this order, while the caller goes on. What goes wrong, `path` says."""
        for shard in shards:
            place = self._place(root, shard)
            if not place.exists():
                self._fetched(root, shard, place)

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future:
        """Something else that a thread which fetches is to do, after what was asked for before."""
        with self._lock:
            return self._submit(work, *arguments)

    def renew(self, root: str, shard: ShardInfo) -> bool:
        """Drops a copy in which something is wrong, so that it is fetched again; False if that was done before."""
        place = self._place(root, shard)
        with self._lock:
            if place in self._renewed:
                return False
            self._renewed.add(place)
            self._coming.pop(place, None)
        place.unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Fetches nothing more, from now on; what had begun ends where it is. Waits for nothing."""
        with self._lock:
            if self._threads is not None:
                self._threads.close()
            self._open = False
            self._coming.clear()

    def _place(self, root: str, shard: ShardInfo) -> Path:
        name = f"{join(root.partition('?')[0], shard.name)} {shard.sha256} {shard.bytes}"
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.tar"

    def _fetched(self, root: str, shard: ShardInfo, place: Path) -> Future:
        with self._lock:
            future = self._coming.get(place)
            if future is None or (future.done() and future.exception() is None):  # removed since it came
                future = self._submit(self._fetch, join(root, shard.name), shard.bytes, place)
                self._coming[place] = future
            return future

    def _submit(self, work: Callable[..., Any], *arguments: Any) -> Future:
        if not self._open:
            raise DataError(f"{self.folder}: this ShardCache was closed with its loader; make another")
        self._threads = self._threads or Threads(FETCHED_AT_ONCE, "fetch")
        return self._threads.submit(work, *arguments)

    def _fetch(self, address: str, size: int, place: Path) -> Path:
        partial = place.with_suffix(".partial")
        try:
            while not place.exists():
                with open(partial, "ab") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    if not _is(partial, file):
                        continue  # another process has finished it
                    if place.exists():
                        partial.unlink()
                        break
                    if file.tell() > size:
                        file.truncate(0)
                    self._lengthen(address, size, file)
                    os.fsync(file.fileno())
                    os.replace(partial, place)
            self._make_room(place)
        except OSError as error:
            raise DataError(
                f"{place}: {address} cannot be kept ({error.strerror}); see data.cache and data.cache_gib"
            ) from None
        return place

    def _lengthen(self, address: str, size: int, file: BinaryIO) -> None:
        """Appends the rest of the shard, a request at a time."""
        while (at := file.seek(0, os.SEEK_END)) < size:
            pause()  # no further part once nobody waits for it
            stop = min(at + PART_BYTES, size)
            data = remote.request(address, at, stop) if is_remote(address) else read_part(address, at, stop)
            if len(data) == size:  # a server that does not know ranges
                data = data[at:]
            if len(data) < stop - at or at + len(data) > size:
                have = f"{at + len(data)}" if len(data) < stop - at else "more"
                raise DataError(f"{address}: has {have} bytes where {size} are expected; restore or rebuild it")
            file.write(data)
            file.flush()

    def _make_room(self, place: Path) -> None:
        """Removes what was not asked for longest, but for `place`."""
        found, now = [], time.time()
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except OSError:
                continue  # removed by another process
            if path.suffix == ".tar":
                found.append((status.st_mtime, status.st_size, path))
            elif path.suffix == ".partial" and now - status.st_mtime > FORGOTTEN_SECONDS:
                path.unlink(missing_ok=True)
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit:
                break
            if path != place:
                path.unlink(missing_ok=True)
                total -= size


def _is(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
