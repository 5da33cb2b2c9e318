"""A folder of drawn chunks, so that ranks share a drawing and a killed one goes on with the chunks that are missing.

What a chunk is there, and what becomes of them all: `dit_fast.sampling.forms`.
"""

import contextlib
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar

from dit_fast import files
from dit_fast.checkpoint.run import LoadedRun
from dit_fast.errors import UserError
from dit_fast.sampling.options import SampleOptions
from dit_fast.sampling.samples import Samples

DESCRIPTION = "sampling.json"


class Parts(ABC):
    """A folder with the chunks drawn so far, and sampling.json, which says what they are of.

    options: resolved. rank: of this process, of which one at a time may draw into a folder. decoder: identity of an
    autoencoder that the options name. Raises UserError where another process draws there, and where the folder holds
    images of other weights, data or options.
    """

    form: ClassVar[str]
    name: ClassVar[str]  # of its files, with their number

    def __init__(self, folder: Path, run: LoadedRun, options: SampleOptions, rank: int, decoder: str | None = None):
        self.folder, self.options = folder, options
        content: dict[str, Any] = {
            "form": self.form,
            "text": options.text(),
            "options": asdict(options),
            "weights": {
                "step": run.step,
                "sha256": run.state["weights_sha256"],
                "dataset_fingerprint": run.state.get("dataset_fingerprint"),
                "autoencoder": decoder,
            },
        }
        text = json.dumps(content, indent=1)
        path = folder / DESCRIPTION
        folder.mkdir(parents=True, exist_ok=True)
        there = self.numbers()  # before the look at the description, which another rank writes first
        if not path.exists():
            if there:
                raise UserError(f"{folder}: holds images without {DESCRIPTION}; name another place with --out")
            partial = folder / f"{DESCRIPTION}.{os.getpid()}.partial"  # ranks write the same, perhaps at once
            partial.write_text(text)
            partial.replace(path)
        if difference := _difference(path.read_text(errors="replace"), json.loads(text)):
            raise UserError(
                f"{folder}: holds images of another command ({difference}); remove it, or give that command again to "
                "finish it"
            )
        try:
            self._held = files.locked(path, rank)  # nobody reads it from here on
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process draws into it as rank {rank}; wait for it, or name another place with --out"
            ) from None

    def numbers(self) -> list[int]:
        """Of the files that are there."""
        matches = (re.fullmatch(self.name, path.name) for path in self.folder.iterdir())
        return [int(match[1]) for match in matches if match]

    @abstractmethod
    def done(self) -> set[int]:
        """Numbers of the first images of the chunks that are whole."""

    @abstractmethod
    def add(self, samples: Samples) -> None:
        """Puts a chunk there, whole or not at all."""

    @abstractmethod
    def write(self, path: Path) -> None:
        """What was asked for, at `path`, once every chunk is there. Raises DataError naming a damaged one."""

    def firsts(self) -> range:
        return range(0, self.options.total, self.options.chunk)

    def size(self, first: int) -> int:
        """Images of a chunk."""
        return min(self.options.chunk, self.options.total - first)

    def images(self) -> int:
        """How many images are there, in whole chunks."""
        return sum(map(self.size, self.done()))

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def give_up(self) -> None:
        """Nothing may stay that would refuse the next command, where not one chunk could be drawn."""
        if not self.done():
            (self.folder / DESCRIPTION).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other files are there
                self.folder.rmdir()


def _difference(found: str, wanted: dict[str, Any]) -> str:
    """What is not the same, in words; "" where all is. What was not known then had its default."""
    try:
        there = json.loads(found)
        defaults = {item.name: item.default for item in fields(SampleOptions)}
        for group, known in {"options": defaults, "weights": {}}.items():
            for name, value in wanted[group].items():
                if (before := {**known, **there[group]}.get(name)) != value:
                    return f"{name} {before} there, {value} here"
            if more := there[group].keys() - wanted[group].keys():
                return f"{min(more)} there, unknown here"
        form = there.get("form", "npz")
        return "" if form == wanted["form"] else f"form {form} there, {wanted['form']} here"
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"its {DESCRIPTION} is damaged or of another version"
