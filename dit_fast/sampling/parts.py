"""A folder of drawn chunks, so that ranks share a drawing and a killed one goes on with the chunks that are missing."""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dit_fast.checkpoint.run import LoadedRun
from dit_fast.errors import DataError, UserError
from dit_fast.files import NO_LOCKS
from dit_fast.sampling.options import SampleOptions
from dit_fast.sampling.samples import Samples

logger = logging.getLogger("dit_fast")

DESCRIPTION = "sampling.json"
POLL = 0.5  # seconds between looks for the chunks of other ranks
_NAME = re.compile(r"images_(\d{8,})\.npz")


class Parts:
    """FOLDER/images_FIRST.npz, one file of `Samples` for each chunk, and sampling.json, which says what they are of.

    options: resolved. rank: of this process, of which one at a time may draw into a folder. Raises UserError where
    another one does, and where the folder holds chunks of other weights, data or options.
    """

    def __init__(self, folder: Path, run: LoadedRun, options: SampleOptions, rank: int):
        self.folder, self.options = folder, options
        content = {
            "options": asdict(options),
            "weights": {
                "step": run.step,
                "sha256": run.state["weights_sha256"],
                "dataset_fingerprint": run.state.get("dataset_fingerprint"),
            },
        }
        text = json.dumps(content, indent=1)
        path = folder / DESCRIPTION
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            partial = folder / f"{DESCRIPTION}.{os.getpid()}.partial"  # ranks write the same, perhaps at once
            partial.write_text(text)
            partial.replace(path)
        if difference := _difference(path.read_text(errors="replace"), json.loads(text)):
            raise UserError(
                f"{folder}: holds images of another command ({difference}); remove it, or give that command again to "
                "finish it"
            )
        self._held = path.open("rb+")  # with the lock, which goes when the file is closed: nobody reads it from here on
        try:
            fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"{folder}: another process draws into it as rank {rank}; wait for it, or name another place with --out"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("%s: lies on a file system without locks; see that no other process draws into it", folder)

    def done(self) -> set[int]:
        """Numbers of the first images of the chunks that are there."""
        return {int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))}

    def images(self) -> int:
        """How many images are there."""
        return sum(min(self.options.chunk, self.options.count - first) for first in self.done())

    def add(self, samples: Samples) -> None:
        samples.save(self._path(samples.first))

    def __iter__(self) -> Iterator[Samples]:
        """All chunks in order; waits for those that other ranks are drawing."""
        for first in range(0, self.options.count, self.options.chunk):
            while not self._path(first).exists():
                time.sleep(POLL)
            try:
                samples = Samples.load(self._path(first))
            except DataError:
                raise DataError(f"{self._path(first)}: damaged; remove it and give the same command again") from None
            yield samples

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def give_up(self) -> None:
        """Nothing may stay that would refuse the next command, where not one chunk could be drawn."""
        if not self.done():
            (self.folder / DESCRIPTION).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other files are there
                self.folder.rmdir()

    def _path(self, first: int) -> Path:
        return self.folder / f"images_{first:08d}.npz"


def _difference(found: str, wanted: dict[str, Any]) -> str:
    """What is not the same, in words; "" where all is. An option that was not known then had its default."""
    try:
        there = json.loads(found)
        there["options"] = {**{item.name: item.default for item in fields(SampleOptions)}, **there["options"]}
        for group, values in wanted.items():
            for name, value in values.items():
                if there[group].get(name) != value:
                    return f"{name} {there[group].get(name)} there, {value} here"
        if json.loads(json.dumps(there)) == wanted:
            return ""
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    return f"its {DESCRIPTION} is damaged or of another version"
