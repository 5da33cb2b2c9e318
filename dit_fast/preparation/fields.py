"""Fields that an encoder makes, added to finished shards: from the images in them, or from their source given again.

The source of an imported `vae-sd` tree is the tree of pictures beside it.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dit_fast.data.added import add_fields, check_names
from dit_fast.data.dataset import LatentDataset, open_dataset
from dit_fast.data.description import FILE_NAME
from dit_fast.data.field import Field
from dit_fast.data.reader import IndexedReader
from dit_fast.data.shards import key_of
from dit_fast.data.writer import read_json
from dit_fast.encoders import load_encoder
from dit_fast.errors import ConfigError, DataError
from dit_fast.preparation.build import IMAGE, ImageProducer, device_of, encoded_field, grid_of, order_of
from dit_fast.preparation.sources import ImageSource, open_source
from dit_fast.preparation.vae_sd import FACTOR, TreePictures


class _StoredImages:
    """The images in the shards, by key; opened when first used, once per process."""

    def __init__(self, dataset: LatentDataset):
        self.root, self.labels = dataset.root, dataset.labels
        self.class_names, self.digest = dataset.info.class_names, dataset.info.fingerprint
        self._reader: IndexedReader | None = None

    def name(self, index: int) -> str:
        return f"image of sample {key_of(index)}"

    def read(self, index: int, size: int) -> np.ndarray:
        if self._reader is None:
            self._reader = IndexedReader(open_dataset(self.root), (IMAGE,))
        key = np.array([index])
        return self._reader.read(key, key)[IMAGE][0].numpy().transpose(1, 2, 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}


def add_encoded(
    shards: str | Path,
    names: Sequence[str],
    encoder: str | None = None,
    *,
    images: str | Path | None = None,
    token_grid: int | None = None,
    dtype: Literal["float16", "float32"] | None = None,
    batch_size: int = 32,
    device: Literal["auto", "cpu", "cuda"] = "cpu",
    processes: int = 1,
    progress: bool = True,
) -> LatentDataset:
    """Adds fields that an encoder gives, or the images themselves, in one family of tars; run again, it continues.

    names: "features", "class_token", or one of these with "_" and a word behind, so that several encoders find room;
    "image": what they are shown, for encoders that run while training. encoder: a spec of `load_encoder`; None where
    images alone are added. images: the source that the shards were built from, or for an imported `vae-sd`
    tree the folder that holds it and `images`; None: the images stored in the shards. They are cropped as the latents
    were and never flipped. token_grid: tokens a side, by default half the latent size (patch 2). dtype: of the stored
    values, by default float16. device: where the encoder runs. The bytes do not depend on `processes`. Returns the data
    set, opened again. Raises DataError or ConfigError, one line.
    """
    dataset = open_dataset(shards)
    check_names(dataset, names)
    place = device_of(device)
    grid = grid_of(token_grid, dataset.info.size)
    if batch_size < 1 or dtype not in (None, "float16", "float32"):
        raise ConfigError(f"batch_size={batch_size}, dtype '{dtype}': at least 1, and float16 or float32")
    source: ImageSource
    if images is not None:
        source, order, size = _source(dataset, images, progress)
    elif IMAGE in dataset.info.fields:
        source, order, size = _StoredImages(dataset), np.arange(len(dataset)), dataset.info.field(IMAGE).shape[-1]
    else:
        raise DataError(
            f"{dataset.root}: holds no images to encode; give the source they were built from with --images"
        )
    network = load_encoder(encoder) if encoder else None
    fields: dict[str, Field] = {}
    for name in names:
        if name == IMAGE:
            fields[name] = Field("png", (3, size, size), "uint8")
        elif network is None:
            raise ConfigError(f"'{name}' needs an encoder; give --encoder (without one, only '{IMAGE}' can be added)")
        else:
            fields[name] = dataclasses.replace(encoded_field(network, name, grid), dtype=dtype or "float16")
    settings = {
        "encoder": network.identity if network else None,
        "token_grid": grid,
        "batch_size": batch_size,
        "from": IMAGE if images is None else "source",
        **({"device": place} if place != "cpu" else {}),
    }
    producer = ImageProducer(source, None, size, fields, encoder, grid, batch_size, place)
    return add_fields(dataset, producer, order, settings, processes, progress)


def _source(dataset: LatentDataset, images: str | Path, progress: bool) -> tuple[ImageSource, np.ndarray, int]:
    """The images that the shards were built from, the number of each key's, and their size. DataError for others."""
    built = read_json(Path(dataset.root) / FILE_NAME).get("settings")
    if isinstance(built, dict) and built.get("imported") == "vae-sd":
        pictures = TreePictures(Path(images), dataset.labels, dataset.info.class_names)
        if pictures.size != FACTOR * dataset.info.size:
            raise DataError(
                f"{images}: its pictures are {pictures.size} pixels a side, the latents of {dataset.root} are of "
                f"{FACTOR * dataset.info.size}; give those they were encoded from"
            )
        return pictures, np.arange(len(dataset), dtype=np.int64), pictures.size
    if not isinstance(built, dict) or not {"source", "size", "shuffle"} <= built.keys():
        raise DataError(f"{dataset.root}: was not built from images by `dit-fast shards build`; add an --array instead")
    opened = open_source(images, out=Path(dataset.root), exif=built.get("exif", True), progress=progress)
    for note in opened.notes:
        print(note, file=sys.stderr)
    if opened.digest != built["source"]:
        raise DataError(f"{images}: not the images that {dataset.root} was built from; give those, unchanged")
    return opened, order_of(len(opened.labels), built["shuffle"]), built["size"]
