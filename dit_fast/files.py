"""Durable file operations, and the one way to give a file new content while others may read it."""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger("dit_fast")

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # what a file system without locks answers


def write(file: BinaryIO, data: bytes | memoryview) -> None:
    file.write(data)


def sync(file: BinaryIO) -> None:
    """Returns when the file's content is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Returns when the folder's entries (new names, renames) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    os.rename(source, target)


def write_synced(path: Path, data: bytes) -> None:
    """A whole small file, on the disk when this returns."""
    try:
        with path.open("wb") as file:
            write(file, data)
            sync(file)
    except OSError as error:  # of a write the system does not say which file it was
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, PATH.partial, that takes the name `path` at the end: readers see the old content or the new.

    After an exception, the system's refusal included, nothing is left of it and the old content stays.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            sync(file)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def replace(path: Path, data: bytes) -> None:
    """`replacing` with content that is at hand."""
    try:
        with replacing(path) as file:
            write(file, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def locked(path: Path, rank: int) -> BinaryIO:
    """The file, which one process at a time holds as this rank, until it is closed. It must be there.

    Raises BlockingIOError where another process holds it. A lock goes with every handle of the file that its process
    closes, so nobody may read the file meanwhile. On a file system without locks: a warning, and no lock.
    """
    file = path.open("rb+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
    except OSError as error:
        if isinstance(error, PermissionError):  # the other answer of the system where it is held
            error = BlockingIOError(*error.args)
        if isinstance(error, BlockingIOError) or error.errno not in NO_LOCKS:
            file.close()
            raise error from None
        logger.warning("%s: lies on a file system without locks; see that no other process writes there", path.parent)
    return file


def free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


def remove_tree(path: Path) -> None:
    """Whatever bears this name; a link itself, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
