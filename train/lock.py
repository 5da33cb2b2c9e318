"""One writer per run folder: a kernel lock held for the whole run, and beside it a record of who holds it.

The lock is `flock` on RUN/lock.json. The kernel drops it when the process ends, however it ends, and it excludes every
other process of this kernel, in other containers too; most shared file systems carry it to other hosts. Where one does
not, the record decides: its holder renews the file's time, and one on another kernel that has not renewed it for
`PATIENCE` seconds is dead. Clocks of hosts are never compared: the time is read off the file system itself.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from dit_fast.errors import UserError
from dit_fast.files import NO_LOCKS

logger = logging.getLogger("dit_fast")

FILE = "lock.json"
LEAVING = 10.0  # seconds granted to a holder that may be about to end
BEAT = 10.0  # seconds between renewals
PATIENCE = 60.0  # without a renewal for so long, a holder on another kernel counts as dead
SETTLE = 2.0  # without locks: seconds until two starts at one moment have both written their record

_open_locks: set[int] = set()


def _close_in_child() -> None:
    """A forked process (one that reads data, say) shares the lock and may live longer: it must not keep it."""
    for fd in _open_locks:
        os.close(fd)
    _open_locks.clear()


os.register_at_fork(after_in_child=_close_in_child)


class RunLock:
    """Held from construction to `release` or to the end of the process.

    Raises UserError where the file cannot be opened, and where another process holds the folder, naming it, after
    waiting LEAVING seconds for one that is known to live and PATIENCE for one on another kernel that may be dead.
    """

    def __init__(self, run: Path):
        self.run, self.path = run, run / FILE
        boot, namespace = kernel()
        self._record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "boot": boot or socket.gethostname(),
            "namespace": namespace,
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "token": uuid.uuid4().hex,  # tells this holder from every other
        }
        self._fd: int | None = None
        self._lost = ""
        self._busy, self._ended = threading.Lock(), threading.Event()
        try:
            run.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            place = self.path if run.is_dir() else f"run.dir={run}"
            raise UserError(f"{place}: cannot be written ({error.strerror}); mend it or set another run.dir") from None
        threading.Thread(target=self._renew, daemon=True, name="run lock").start()

    def _acquire(self) -> None:
        deadline = time.monotonic() + LEAVING
        said = False
        while not self._try():
            holder = _read(self.path)
            if time.monotonic() >= deadline:
                raise UserError(f"{self._writing(holder)} (waited {LEAVING:.0f} s); stop it or set another run.dir")
            if not said:
                logger.info("%s: in use; waiting up to %.0f s for %s to end", self.run, LEAVING, self._who(holder))
                said = True
            time.sleep(0.2)

    def _try(self) -> bool:
        """Opens and locks the file that bears the name, and writes the record. False where another process holds it."""
        self._fd = fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        _open_locks.add(fd)
        taken, has_locks = False, True
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                has_locks = False
            if not _bears_the_name(fd, self.path):  # removed by somebody between open and lock
                return False
            holder = _parse(_content(fd))
            if holder is not None and not (has_locks and holder.get("boot") == self._record["boot"]):
                self._wait_for_signs_of_life(fd, holder)
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(self._record).encode(), 0)
            if not has_locks:  # two may have come this far: the later record stays
                time.sleep(SETTLE)
            taken = self._is_mine(fd)
            return taken
        finally:
            if not taken:
                self._close()

    def _wait_for_signs_of_life(self, fd: int, holder: dict[str, Any]) -> None:
        """Raises UserError where this holder, on another kernel, renews its lock; returns where it is dead."""
        seen = os.fstat(fd).st_mtime_ns
        wait = PATIENCE - max((_file_system_time(self.run) - seen) / 1e9, 0.0)
        if wait > 0:
            logger.info("%s: waiting %.0f s to see whether %s still lives", self.run, wait, self._who(holder))
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            time.sleep(min(1.0, wait))
            with self.path.open("rb") as fresh:  # opening, unlike stat, asks a file server anew
                if os.fstat(fresh.fileno()).st_mtime_ns != seen:
                    raise UserError(f"{self._writing(holder)} and renews its lock; stop it or set another run.dir")

    def _is_mine(self, fd: int) -> bool:
        record = _parse(_content(fd))
        return record is not None and record.get("token") == self._record["token"] and _bears_the_name(fd, self.path)

    def _who(self, holder: dict[str, Any] | None) -> str:
        if holder is None:
            return "another process"
        host = "".join(letter for letter in str(holder["host"])[:64] if letter.isprintable())
        other = holder.get("boot") == self._record["boot"] and holder.get("namespace") != self._record["namespace"]
        inside = " (in another container)" if other else ""
        return f"process {str(holder['pid'])[:20]} on {host}{inside}"

    def _writing(self, holder: dict[str, Any] | None) -> str:
        return f"{self.run}: {self._who(holder)} is writing to this run folder"

    def _renew(self) -> None:
        while not self._ended.wait(BEAT):
            with self._busy, contextlib.suppress(OSError):  # a file server that does not answer may do so next time
                self._look()

    def _look(self) -> None:
        if self._ended.is_set():
            return
        if self._fd is not None and self._is_mine(self._fd):
            os.utime(self._fd)
            return
        holder = _read(self.path)
        try:
            if holder is not None:  # a process elsewhere believed this one dead
                raise UserError(self._writing(holder))
            self._close()
            self._acquire()  # the file was removed: put it back, unless another process was faster
        except UserError as error:
            self._lost = str(error)
            self._ended.set()

    def renew(self) -> None:
        """Called between steps. Raises UserError once another process has taken the folder over."""
        if self._lost:
            raise UserError(f"{self._lost}; this process lost its lock and ends without writing more")

    def release(self) -> None:
        """Empties the record, if it is still this holder's, and lets the lock go."""
        self._ended.set()
        with self._busy:
            if self._fd is not None:
                with contextlib.suppress(OSError):
                    if self._is_mine(self._fd):
                        os.ftruncate(self._fd, 0)
                self._close()

    def _close(self) -> None:
        if self._fd is not None:
            _open_locks.discard(self._fd)
            os.close(self._fd)
            self._fd = None


def _content(fd: int) -> bytes:
    return os.pread(fd, 4096, 0)


def _read(path: Path) -> dict[str, Any] | None:
    """The record at a path as `_parse` gives it; None too where it cannot be read."""
    try:
        with path.open("rb") as file:
            return _parse(file.read(4096))
    except OSError:
        return None


def _parse(content: bytes) -> dict[str, Any] | None:
    """A holder's record, or None for an empty or damaged one: no living holder leaves such a file without its lock."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and {"host", "pid"} <= record.keys() else None


def _bears_the_name(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _file_system_time(folder: Path) -> int:
    """Now, in nanoseconds, by the clock that stamps the files of this folder."""
    with tempfile.NamedTemporaryFile(prefix=".clock-", dir=folder) as file:
        file.write(b"0")
        file.flush()
        return os.fstat(file.fileno()).st_mtime_ns


def kernel() -> tuple[str, str]:
    """This boot of the machine, and whose process numbers this process sees; "" for what the system does not tell."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return boot, namespace
