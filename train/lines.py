"""Files of a run that grow by lines of JSON, each of a step, and are cut where a start goes on from."""

import contextlib
import json
import logging
from pathlib import Path

from dit_fast import files
from dit_fast.errors import UserError

logger = logging.getLogger("dit_fast")


class AppendedLines:
    """A text file that grows by whole lines. Lines a full disk refuses are kept and written with the next ones."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("ab", buffering=0)
        self._size, self._waiting = self._file.tell(), b""

    def add(self, line: str) -> None:
        self._waiting += line.encode() + b"\n"
        self._write()

    def close(self) -> None:
        """Tries once more what is still waiting."""
        if self._waiting:
            self._write()
        self._file.close()

    def _write(self) -> None:
        try:
            self._file.truncate(self._size)  # a part of a line that an earlier failure may have left
            if self._file.write(self._waiting) == len(self._waiting):
                self._size, self._waiting = self._size + len(self._waiting), b""
                return
            reason = "no space left on the disk"
        except OSError as error:
            reason = str(error)
        with contextlib.suppress(OSError):
            self._file.truncate(self._size)
        logger.warning("%s: %s; rows are kept until there is space", self._path, reason)


def truncate_lines(path: Path, step: int) -> None:
    """Drops lines after `step` and a last line cut short by a kill."""
    if not path.exists():
        return
    if not path.is_file():  # reading a pipe or a device would not end
        raise UserError(f"{path}: is not a regular file; remove it")
    kept, found = b"", path.read_bytes()
    for line in found.splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept += line + b"\n"
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            continue
    if kept != found:
        files.replace(path, kept)
