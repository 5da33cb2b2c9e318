"""Address of a data set: a local folder, http(s) or an object store. Others could start a command and are refused."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from dit_fast.data import remote
from dit_fast.errors import DataError


def is_remote(root: str) -> bool:
    """True for addresses of http(s), S3 (`s3://`) and GCS (`gs://`), in any case."""
    return root.lower().startswith(tuple(f"{scheme}://" for scheme in remote.NEEDS))


def check_address(root: str) -> str:
    """The root without a trailing slash, the scheme of an address in lower case.

    Raises DataError for an empty one, for `pipe:`, `exec:` and every other scheme, and for addresses without a host.
    """
    if not root.strip() or "\0" in root or "\n" in root:
        raise DataError(f"{root!r} is neither a folder nor an address; give the folder of the data set")
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
        if scheme.lower() in remote.NEEDS:
            raise DataError(f"'{root}' is not an address; write it as {scheme.lower()}://HOST/FOLDER")
        raise DataError(
            f"'{root}': only folders, http(s)://, s3:// and gs:// are read; '{scheme}:' could start another program"
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


def read_part(location: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a local file or an address, fewer where it ends before. Raises DataError naming it."""
    if is_remote(location):
        data = remote.request(location, start, stop)
        return data if len(data) <= stop - start else data[start:stop]  # a server that does not know ranges
    with reading(location), open(location, "rb") as file:
        file.seek(start)
        return file.read(stop - start)


def read_bytes(location: str, limit: int) -> bytes:
    """All bytes of a small file. Raises DataError naming it when it cannot be read or holds more than `limit` bytes."""
    data = read_part(location, 0, limit + 1)
    if len(data) > limit:
        raise DataError(f"{location}: has more than the {limit} bytes that it may have; restore or rebuild it")
    return data
