"""Drawn images with their labels, and their file: an .npz whose `arr_0` and `label` are what ADM's evaluation reads."""

import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dit_fast import files
from dit_fast.errors import DataError

FILE_NAME = "samples.npz"
_KINDS = (("uint8", 4, True), ("float32", 4, False), ("float32", 4, True))  # dtype, dimensions, three in the last


@dataclass(frozen=True)
class Samples:
    """images uint8 [N, H, W, 3], labels int64 [N], the step of the weights and how the images were drawn.

    Where latents were asked for, images holds those, float32 [N, C, h, w], unscaled as an autoencoder takes them.
    first: number of the first image, where these are a part of what was asked for.
    """

    images: np.ndarray
    labels: np.ndarray
    step: int
    text: str
    first: int = 0

    @classmethod
    def join(cls, parts: Iterable["Samples"]) -> "Samples":
        """All of `sample_images` in memory."""
        every = list(parts)
        images, labels = (np.concatenate([getattr(part, name) for part in every]) for name in ("images", "labels"))
        return cls(images, labels, every[0].step, every[0].text, every[0].first)

    def save(self, path: Path) -> None:
        write_samples(path, [self], len(self.images))

    @classmethod
    def load(cls, path: Path) -> "Samples":
        """Raises DataError when the file was not written by `save`."""
        try:
            with np.load(path, allow_pickle=False) as file:
                loaded = cls(file["arr_0"], file["label"], int(file["step"]), str(file["text"]))
            known = (loaded.images.dtype.name, loaded.images.ndim, loaded.images.shape[3:] == (3,))
            if known not in _KINDS or loaded.labels.dtype.kind != "i":
                raise ValueError("images or labels of another type")
            if loaded.labels.shape != loaded.images.shape[:1] or not len(loaded.labels):
                raise ValueError("no label for each image")
        except Exception as error:  # damaged archives raise whatever their readers stumble over
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(f"{path}: not a file of samples ({reason}); make one with `dit-fast sample RUN`") from None
        return loaded


def write_samples(path: Path, parts: Iterable[Samples], count: int) -> None:
    """One file of `count` images from parts in order, of which one at a time is held; the bytes are np.savez's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels: list[np.ndarray] = []
    with files.replacing(path) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, value: np.ndarray) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, value)

        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for part in parts:
                if not labels:
                    header = np.lib.format.header_data_from_array_1_0(part.images[:0])
                    np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *part.images.shape[1:])})
                file.write(np.ascontiguousarray(part.images).data)
                labels.append(part.labels)
        add("label", np.concatenate(labels))
        add("step", np.asarray(np.int64(part.step)))
        add("text", np.array(part.text))


def png_bytes(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
