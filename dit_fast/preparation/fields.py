"""Fields that an encoder makes, added to finished shards: from the images in them, or from their source given again."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dit_fast.autoencoders.patch_pca import to_float
from dit_fast.data.added import add_fields, check_names
from dit_fast.data.dataset import LatentDataset, open_dataset
from dit_fast.data.description import FILE_NAME
from dit_fast.data.field import Field
from dit_fast.data.reader import IndexedReader
from dit_fast.data.shards import key_of
from dit_fast.data.writer import read_json
from dit_fast.encoders import FeatureEncoder, load_encoder
from dit_fast.errors import ConfigError, DataError
from dit_fast.preparation.build import encoded_field, grid_of, order_of, read_image
from dit_fast.preparation.sources import ImageSource, open_source

IMAGE = "image"  # the field that `build --store-images` writes


class _EncodedProducer:
    """What an encoder gives. Networks, shards and images are opened when first used, once per process."""

    def __init__(
        self, root: str, fields: Mapping[str, Field], encoder: str, grid: int, batch_size: int,
        images: "_Source | None",
    ):  # fmt: skip
        self.root, self.fields, self.encoder, self.grid, self.batch_size = root, fields, encoder, grid, batch_size
        self.images = images
        self._opened: tuple[FeatureEncoder, IndexedReader | None] | None = None

    def name(self, number: int) -> str:
        return self.images.name(number) if self.images else f"image of sample {key_of(number)}"

    def samples(self, numbers: np.ndarray, shard: int) -> Iterator[tuple[dict[str, np.ndarray], None]]:
        if self._opened is None:
            stored = None if self.images else IndexedReader(open_dataset(self.root), (IMAGE,))
            self._opened = load_encoder(self.encoder), stored
        encoder, stored = self._opened
        for first in range(0, len(numbers), self.batch_size):
            chunk = numbers[first : first + self.batch_size]
            if stored is not None:
                images = stored.read(chunk, chunk)[IMAGE].numpy().transpose(0, 2, 3, 1)
            else:
                assert self.images is not None
                images = np.stack([self.images.read(number) for number in chunk.tolist()])
            given = {name: value.numpy() for name, value in encoder(to_float(images), self.grid).items()}
            for i in range(len(chunk)):
                yield {name: given[name][i] for name in self.fields}, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


@dataclasses.dataclass
class _Source:
    """The images that a data set was built from, by key."""

    source: ImageSource
    order: np.ndarray
    size: int

    def name(self, key: int) -> str:
        return self.source.name(int(self.order[key]))

    def read(self, key: int) -> np.ndarray:
        return read_image(self.source, int(self.order[key]), self.size)


def add_encoded(
    shards: str | Path,
    names: Sequence[str],
    encoder: str,
    *,
    images: str | Path | None = None,
    token_grid: int | None = None,
    dtype: Literal["float16", "float32"] | None = None,
    batch_size: int = 32,
    processes: int = 1,
    progress: bool = True,
) -> LatentDataset:
    """Adds fields that an encoder gives ("features", "class_token"), in one family of tars; run again, it continues.

    encoder: a spec of `load_encoder`. images: the source that the shards were built from; None: the images stored in
    them. token_grid: tokens a side, by default half the latent size (patch 2). dtype: of the stored values, by default
    float16. The bytes do not depend on `processes`. Returns the data set, opened again. Raises DataError or
    ConfigError, one line.
    """
    dataset = open_dataset(shards)
    check_names(dataset, names)
    grid = grid_of(token_grid, dataset.info.size)
    if batch_size < 1 or dtype not in (None, "float16", "float32"):
        raise ConfigError(f"batch_size={batch_size}, dtype '{dtype}': at least 1, and float16 or float32")
    network = load_encoder(encoder)
    fields = {name: dataclasses.replace(encoded_field(network, name, grid), dtype=dtype or "float16") for name in names}
    source = _source(dataset, images, progress) if images is not None else None
    if source is None and IMAGE not in dataset.info.fields:
        raise DataError(
            f"{dataset.root}: holds no images to encode; give the source they were built from with --images"
        )
    settings = {
        "encoder": network.identity,
        "token_grid": grid,
        "batch_size": batch_size,
        "from": "source" if source else IMAGE,
    }
    producer = _EncodedProducer(dataset.root, fields, encoder, grid, batch_size, source)
    return add_fields(dataset, producer, settings, processes, progress)


def _source(dataset: LatentDataset, images: str | Path, progress: bool) -> _Source:
    """Raises DataError unless these are the images that the shards were built from."""
    built = read_json(Path(dataset.root) / FILE_NAME).get("settings")
    if not isinstance(built, dict) or not {"source", "size", "shuffle"} <= built.keys():
        raise DataError(f"{dataset.root}: was not built from images by `dit-fast shards build`; add an --array instead")
    opened = open_source(images, out=Path(dataset.root), exif=built.get("exif", True), progress=progress)
    for note in opened.notes:
        print(note, file=sys.stderr)
    if opened.digest != built["source"]:
        raise DataError(f"{images}: not the images that {dataset.root} was built from; give those, unchanged")
    return _Source(opened, order_of(len(opened.labels), built["shuffle"]), built["size"])
