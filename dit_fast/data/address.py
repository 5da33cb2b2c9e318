"""Where a data set lies: a local folder or an http(s) address. Nothing that starts a command is accepted."""

import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from dit_fast.errors import DataError

TIMEOUT_SECONDS = 60


def is_remote(root: str) -> bool:
    """True for http(s) addresses."""
    return root.startswith(("http://", "https://"))


def check_address(root: str) -> str:
    """The root without a trailing slash. Raises DataError for `pipe:`, `exec:` and every other scheme."""
    scheme, separator, _ = root.partition(":")
    if separator and len(scheme) > 1 and "/" not in scheme and not is_remote(root) and not Path(root).exists():
        raise DataError(
            f"'{root}': only folders and http(s) addresses are read, '{scheme}:' would run or open another program"
        )
    return root.rstrip("/") or "/"


def check_file_name(name: str, where: str) -> str:
    """`name` if it is a plain file name. Raises DataError for paths, `..`, schemes and hidden files."""
    plain = name.replace("-", "").replace("_", "").replace(".", "")
    if not (plain.isascii() and plain.isalnum()) or name.startswith("."):
        raise DataError(
            f"{where}: '{name}' is not a plain file name (letters, digits, '-', '_', '.'); rebuild the data set"
        )
    return name


def join(root: str, name: str) -> str:
    """Path or address of a file of the data set, for opening and for messages."""
    return f"{root}/{name}"


def open_stream(location: str) -> IO[bytes]:
    """Opens a local file or an http(s) address for reading from its start. Raises DataError naming it."""
    try:
        if is_remote(location):
            return urllib.request.urlopen(location, timeout=TIMEOUT_SECONDS)
        return open(location, "rb")
    except FileNotFoundError:
        raise DataError(f"{location}: no such file; restore it or rebuild with `dit-fast shards build`") from None
    except (OSError, urllib.error.URLError) as error:
        raise DataError(f"{location}: cannot be read ({error})") from None


def read_bytes(location: str) -> bytes:
    """All bytes of a small file. Raises DataError naming it."""
    with open_stream(location) as stream:
        return stream.read()
