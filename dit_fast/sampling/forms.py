"""The forms in which drawn images are kept: an .npz, a tar, a folder of PNG files."""

import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from dit_fast import files
from dit_fast.data.shards import LABEL_MEMBER, ShardWriter, key_of, scan_tar
from dit_fast.errors import DataError
from dit_fast.sampling.parts import Parts
from dit_fast.sampling.samples import Samples, png_bytes, write_samples

ENCODERS = 4  # threads that compress PNG files
LABELS = "dataset.json"


class FileParts(Parts):
    """FOLDER/images_FIRST.npz (or .tar): a file for each chunk."""

    ending: ClassVar[str]

    def done(self) -> set[int]:
        return set(self.numbers())

    def _path(self, first: int) -> Path:
        return self.folder / f"images_{first:08d}.{self.ending}"


class NpzParts(FileParts):
    """An .npz as `write_samples` has it; its chunks are such files too."""

    form: ClassVar[str] = "npz"
    ending: ClassVar[str] = "npz"
    name: ClassVar[str] = r"images_(\d{8,})\.npz"

    def add(self, samples: Samples) -> None:
        samples.save(self._path(samples.first))

    def __iter__(self) -> Iterator[Samples]:
        """The chunks in order, one held at a time."""
        for first in self.firsts():
            with _reading(self._path(first)):
                samples = Samples.load(self._path(first))
            yield samples

    def write(self, path: Path) -> None:
        write_samples(path, self, self.options.total)


class LatentParts(NpzParts):
    """The same with latents, float32 [N, C, h, w]."""

    form: ClassVar[str] = "latents"


class TarParts(FileParts):
    """A WebDataset: 000000007.png and 000000007.cls, the label in decimal. Its chunks are such tars too."""

    form: ClassVar[str] = "tar"
    ending: ClassVar[str] = "tar"
    name: ClassVar[str] = r"images_(\d{8,})\.tar"

    def add(self, samples: Samples) -> None:
        with files.replacing(self._path(samples.first)) as file, ThreadPoolExecutor(ENCODERS) as pool:
            tar = ShardWriter(file, ("png", LABEL_MEMBER), samples.first)
            for data, label in zip(pool.map(png_bytes, samples.images), samples.labels.tolist(), strict=True):
                tar.add({"png": data}, label)
            tar.finish()

    def write(self, path: Path) -> None:
        end = 2 * tarfile.BLOCKSIZE
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as file:
            for first in self.firsts():
                with _reading(self._path(first)):
                    index = scan_tar(self._path(first))
                    if (index.first_key, len(index)) != (first, self.size(first)):
                        raise DataError("holds other images")
                with self._path(first).open("rb") as part:
                    shutil.copyfileobj(part, file)
                file.seek(-end, 1)
                file.truncate()
            file.write(b"\0" * end)


class PngFolder(Parts):
    """FOLDER/000000007.png, and at the end dataset.json with the labels, {"labels": [["000000007.png", 3], ...]}, as
    the codes of StyleGAN and EDM read them.
    """

    form: ClassVar[str] = "png"

    name: ClassVar[str] = r"(\d{9})\.png"

    def done(self) -> set[int]:
        chunks, counts = np.unique(np.array(self.numbers(), np.int64) // self.options.chunk, return_counts=True)
        firsts = (chunks * self.options.chunk).tolist()
        return {first for first, count in zip(firsts, counts.tolist(), strict=True) if count == self.size(first)}

    def add(self, samples: Samples) -> None:
        def put(number: int) -> None:
            path = self.folder / f"{key_of(samples.first + number)}.png"
            partial = path.with_name(f"{path.name}.partial")
            files.write_synced(partial, png_bytes(samples.images[number]))
            files.rename(partial, path)

        with ThreadPoolExecutor(ENCODERS) as pool:
            list(pool.map(put, range(len(samples.images))))
        files.sync_folder(self.folder)

    def write(self, path: Path) -> None:
        labels = self.options.labels_of(torch.arange(self.options.total, dtype=torch.int64)).tolist()
        rows = ",\n".join(f'["{key_of(number)}.png", {label}]' for number, label in enumerate(labels))
        files.replace(path / LABELS, f'{{"labels": [\n{rows}\n]}}\n'.encode())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise DataError(f"{path}: damaged; remove it and give the same command again") from None
