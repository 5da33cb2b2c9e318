"""Durable file operations: every write, flush and rename of a checkpoint goes through these functions."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import BinaryIO


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


def replace(path: Path, data: bytes) -> None:
    """New content for a file that others may read at any time: they see the old or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


def remove_tree(path: Path) -> None:
    """Whatever bears this name; a link itself, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
