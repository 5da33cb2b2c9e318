"""Output files of samples and reports: checked before anything is computed; disk errors become one line."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dit_fast.errors import UserError

FLAG = "name another place with --out"


def check_writable(folder: Path, fix: str = FLAG) -> None:
    """Raises UserError, before anything is computed, where no file could be made in a folder that may not exist yet."""
    with writing(folder, fix):
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        tempfile.TemporaryFile(dir=existing).close()


@contextmanager
def writing(place: Path, fix: str = FLAG) -> Iterator[None]:
    """Errors of the disk as one line, which ends in the fix: commands that have no --out give another."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{place}: cannot be written ({reason}); {fix}") from None
