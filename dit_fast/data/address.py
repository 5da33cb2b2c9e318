"""Address of a data set: a local folder or http(s). Addresses that would start a command are refused."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from dit_fast.data.remote import HttpStream
from dit_fast.errors import DataError

SCHEMES = ("http", "https")


def is_remote(root: str) -> bool:
    """True for http(s) addresses, in any case."""
    return root.lower().startswith(("http://", "https://"))


def check_address(root: str) -> str:
    """The root without a trailing slash, the scheme of an address in lower case.

    Raises DataError for an empty one, for `pipe:`, `exec:` and every other scheme, and for addresses without a host.
    """
    if not root.strip() or "\0" in root or "\n" in root:
        raise DataError(f"{root!r} is neither a folder nor an http(s) address; give the folder of the data set")
    scheme, separator, rest = root.partition(":")
    if is_remote(root):
        root = scheme.lower() + separator + rest
        try:
            host = urlsplit(root).hostname
        except ValueError:
            host = None
        if not host or "#" in root:
            raise DataError(f"'{root}' is not an address; write it as http://HOST/FOLDER, with ?QUERY if it is signed")
        path, mark, query = root.partition("?")
        return path.rstrip("/") + mark + query
    if separator and len(scheme) > 1 and "/" not in scheme and not Path(root).exists():
        if scheme.lower() in SCHEMES:
            raise DataError(f"'{root}' is not an address; write it as {scheme.lower()}://HOST/FOLDER")
        raise DataError(
            f"'{root}': only folders and http(s) addresses are read; '{scheme}:' could run or open another program"
        )
    return root.rstrip("/") or "/"


def absolute(root: str) -> str:
    """The root as it can be opened from any working directory."""
    return root if is_remote(root) else os.path.abspath(root)


def check_file_name(name: str, where: str) -> str:
    """`name` if it is a plain file name. Raises DataError for paths, `..`, schemes and hidden files."""
    plain = name.replace("-", "").replace("_", "").replace(".", "")
    if not (plain.isascii() and plain.isalnum()) or name.startswith(".") or len(name) > 200:
        raise DataError(
            f"{where}: '{name[:200]}' is not a plain file name (letters, digits, '-', '_', '.'); rebuild the data set"
        )
    return name


def join(root: str, name: str) -> str:
    """Path or address of a file of the data set, for opening and for messages. An address's query stays at its end."""
    if not is_remote(root):
        return f"{root}/{name}"
    path, mark, query = root.partition("?")
    return f"{path}/{name}{mark}{query}"


@contextmanager
def reading(location: str) -> Iterator[None]:
    """Turns what the system says about a file (EIO, ESTALE, no permission) into a DataError that names it."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or location}: cannot be read ({error.strerror or error})") from None


def open_stream(location: str, size: int | None = None) -> IO[bytes] | HttpStream:
    """Opens a local file or an http(s) address, from its start; inside `reading`. size: its bytes, where known."""
    return HttpStream(location, size) if is_remote(location) else open(location, "rb")


def read_bytes(location: str, limit: int) -> bytes:
    """All bytes of a small file. Raises DataError naming it when it cannot be read or holds more than `limit` bytes."""
    with reading(location), open_stream(location) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise DataError(f"{location}: has more than the {limit} bytes that it may have; restore or rebuild it")
    return data
