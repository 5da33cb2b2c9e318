"""Files that come from outside: names fit for a message, arrays whose header is checked, a digest of content."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from dit_fast.errors import DataError

# What operating systems, archivers and storage boxes put beside the user's files; compared without regard to case.
# Names that begin with a dot (.Trash-1000, .DS_Store, ._photo.jpg) are skipped as well, at every level.
SYSTEM_FOLDERS = {
    "__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin", "recycler",
    "system volume information", "lost+found", "network trash folder", "temporary items",
}  # fmt: skip
CHUNK = 1 << 24  # bytes read at a time
LONGEST_REASON = 400  # characters: torch lists every key of a network


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name never counts as data: hidden, or made by a system."""
    return name.startswith(".") or name.casefold() in SYSTEM_FOLDERS


def shown(name: str | Path) -> str:
    """The name on one line, with what cannot be printed escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in str(name)
    )


def check_utf8(name: str | Path, what: str) -> None:
    """Raises DataError unless the name can be written to dataset.json as UTF-8."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} '{shown(name)}': not UTF-8; rename it") from None


def check_output(path: str | Path) -> Path:
    """The folder to write to. Raises DataError for a name that no message or file could hold, and for none at all."""
    if not str(path) or "\0" in str(path):
        raise DataError(f"output folder '{shown(path)}': not a path; give one")
    check_utf8(path, "output folder")
    return Path(path)


def reason(error: BaseException | str) -> str:
    """First line of an exception, with the next where that one ends in a colon; its type where it says nothing."""
    lines = (getattr(error, "strerror", None) or str(error)).splitlines()
    count = 2 if lines and lines[0].rstrip().endswith(":") else 1
    text = shown(" ".join(line.strip() for line in lines[:count])) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def read_npy(stream: IO[bytes], size: int) -> np.ndarray:
    """The array of an `.npy` file that has `size` bytes, read-only where it is empty. No pickle is read.

    Raises ValueError, one line, before allocating when the header does not account for exactly those bytes.
    """
    try:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = readers[version](stream)
    except OSError:
        raise
    except Exception as error:  # the header is parsed as Python: damage raises many kinds
        raise ValueError(f"damaged npy header: {reason(error)}") from None
    if dtype.hasobject:
        raise ValueError("holds Python objects, which only a pickle could read")
    count = math.prod(shape)
    needed = stream.tell() + count * dtype.itemsize
    if min(shape, default=0) < 0 or needed != size:
        raise ValueError(f"its header claims {dtype} {shape}, {needed} bytes, where {size} are there")
    data = np.empty(count * dtype.itemsize, np.uint8)
    for first in range(0, len(data), CHUNK):
        part = stream.read(min(CHUNK, len(data) - first))
        if len(part) != min(CHUNK, len(data) - first):
            raise ValueError("ends early")
        data[first : first + len(part)] = np.frombuffer(part, np.uint8)
    flat = data.view(dtype) if dtype.itemsize else np.empty(count, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def digest_files(root: Path, names: Sequence[str], progress: bool) -> str:
    """sha256 over names and bytes of files below `root`, in the given order; several are read at a time.

    Times and places do not count, so a copy has the same digest. Raises DataError naming a file that cannot be read.
    """

    def digests(chunk: Sequence[str]) -> list[bytes]:
        return [digest_file(root / name) for name in chunk]

    total = hashlib.sha256()
    chunks = [names[first : first + 32] for first in range(0, len(names), 32)]
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool, bar(len(names), 0, "source", progress) as step:
        for chunk, found in zip(chunks, pool.map(digests, chunks), strict=True):
            for name, digest in zip(chunk, found, strict=True):
                total.update(name.encode() + b"\0" + digest)
            step(len(chunk))
    return total.hexdigest()


def weights_identity(kind: str, files: Sequence[Path]) -> str:
    """`kind:` and 16 hex digits of the sha256 over the files."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return f"{kind}:{digest.hexdigest()[:16]}"


def digest_file(path: Path) -> bytes:
    """sha256 of a file. Raises DataError naming it when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read ({reason(error)}); restore or remove it") from None


@contextmanager
def bar(total: int, done: int, what: str, show: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar over files or images; yields the function that advances it."""
    if not show:
        yield lambda count: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        raise DataError("the progress bar needs tqdm; run `pip install tqdm` or give --no-progress") from None
    with tqdm(total=total, initial=done, unit="img", desc=what, smoothing=0) as shown_bar:
        yield shown_bar.update
