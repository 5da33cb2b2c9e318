"""From labelled images to latent shards: crop, encode, write."""

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dit_fast.autoencoders import BESIDE, Autoencoder, load_autoencoder
from dit_fast.autoencoders.features import FeatureAutoencoder
from dit_fast.autoencoders.patch_pca import PatchPCA, to_float
from dit_fast.data.dataset import LatentDataset
from dit_fast.data.field import MOMENTS, Field
from dit_fast.data.files import check_output
from dit_fast.data.shards import MOMENTS_MEMBER
from dit_fast.data.writer import (
    SHARD,
    Unfinished,
    check_amounts,
    check_scaling,
    one_line_errors,
    one_thread,
    write_dataset,
)
from dit_fast.encoders import FeatureEncoder, load_encoder
from dit_fast.errors import ConfigError, DataError
from dit_fast.philox import Stream, uint32_numpy
from dit_fast.preparation.images import MAX_PIXELS
from dit_fast.preparation.sources import FolderSource, ImageSource, open_source

AUTOENCODER_FILE = "autoencoder.safetensors"
FIT_IMAGES, FIT_BYTES = 10_000, 1 << 28  # patch PCA is fitted on as many images as both allow
FIT_BATCH = 64  # images that a decoder of features is fitted on at a time
ORDER_SEED = 0
IMAGE = "image"  # the field that `store_images` writes
KINDS = ("features", "class_token")  # what encoders give


class ImageProducer:
    """Samples from images: of an autoencoder the moments and the labels, of an encoder its features. Networks are
    loaded when first used, once per process and device.
    """

    def __init__(
        self, source: ImageSource, autoencoder: str | None, size: int, fields: Mapping[str, Field],
        encoder: str | None, token_grid: int, batch_size: int, device: str,
    ):  # fmt: skip
        self.source, self.autoencoder, self.size, self.fields = source, autoencoder, size, fields
        self.encoder, self.token_grid, self.batch_size, self.device = encoder, token_grid, batch_size, device
        self._loaded: dict[str, tuple[Autoencoder | None, FeatureEncoder | None]] = {}

    def name(self, number: int) -> str:
        return self.source.name(number)

    def samples(self, numbers: np.ndarray, shard: int) -> Iterator[tuple[dict[str, np.ndarray], int | None]]:
        device = f"cuda:{shard % torch.cuda.device_count()}" if self.device == "cuda" else "cpu"
        if device not in self._loaded:
            encoder = load_encoder(self.encoder).to(device) if self.encoder else None
            autoencoder = load_autoencoder(self.autoencoder).to(device) if self.autoencoder else None
            self._loaded[device] = autoencoder, encoder
        autoencoder, encoder = self._loaded[device]
        for first in range(0, len(numbers), self.batch_size):
            chunk = numbers[first : first + self.batch_size].tolist()
            images = np.stack([read_image(self.source, number, self.size) for number in chunk])
            pixels, arrays = to_float(images), {IMAGE: images.transpose(0, 3, 1, 2)}
            if autoencoder is not None:
                moments = [part for part in autoencoder.encode(pixels.to(device)) if part is not None]
                arrays[MOMENTS] = torch.stack(moments, 1).float().cpu().numpy()
            if encoder is not None:
                given = encoder(pixels.to(device), self.token_grid)
                made = [name for name in self.fields if kind_of(name) in given]
                arrays |= {name: given[kind_of(name)].cpu().numpy() for name in made}
            for i, number in enumerate(chunk):
                label = int(self.source.labels[number]) if MOMENTS in arrays else None
                yield {name: array[i] for name, array in arrays.items()}, label

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": {}}


def build_shards(
    source: str | Path | ImageSource,
    out: str | Path,
    *,
    autoencoder: str,
    size: int,
    samples_per_shard: int = 2048,
    processes: int = 1,
    dtype: Literal["float16", "float32"] = "float16",
    store_images: bool = False,
    encoder: str | None = None,
    token_grid: int | None = None,
    class_token: bool = False,
    patch: int = 4,
    channels: int = 12,
    batch_size: int = 32,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    shuffle: bool = True,
    exif: bool = True,
    progress: bool = True,
) -> LatentDataset:
    """Builds the shards of an image folder or array data set in `out`; run again, it continues or finds itself done.

    autoencoder: a spec of `load_autoencoder`, "pca" to fit a `PatchPCA(patch, channels)` on the source, or
    "features:ENCODER" for an encoder's tokens, one for each patch, with a decoder that is fitted on the source. size:
    pixels of the centre crop. store_images: keep the crop as PNG. encoder: a spec of `load_encoder`, stored as
    float16 [token_grid^2, width]; token_grid defaults to half the latent size (patch 2). class_token: also store the
    encoder's class token, float16 [width]. shuffle: write samples in a
    fixed random order, so that every shard holds all classes. exif: turn photographs as their orientation tag says,
    which ADM's script does not. The bytes do not depend on `processes`. What is skipped is printed to stderr.

    Raises DataError or ConfigError, one line; shards already finished are kept.
    """
    if dtype not in ("float16", "float32"):
        raise ConfigError(f"dtype '{dtype}': valid are float16, float32")
    for name, value in {"batch_size": batch_size, "size": size, "patch": patch, "channels": channels}.items():
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    if token_grid is not None and (encoder is None or token_grid < 1):
        raise ConfigError(f"token_grid={token_grid} must be at least 1 and needs an encoder; give --encoder")
    if class_token and encoder is None:
        raise ConfigError("class_token needs an encoder; give --encoder")
    if size * size > MAX_PIXELS:
        raise ConfigError(f"size={size} is more than {math.isqrt(MAX_PIXELS)} pixels a side; give a smaller --size")
    check_amounts(samples_per_shard, processes)
    place = device_of(device)
    folder = check_output(out)
    images: ImageSource
    if isinstance(source, str | Path):
        images = opened = open_source(source, out=folder, exif=exif, progress=progress)
        for note in opened.notes:
            print(note, file=sys.stderr)
    else:
        images = source
        _check_labels(images)
    order = order_of(len(images.labels), shuffle)
    with one_line_errors(Unfinished(folder, SHARD)):
        spec, stored_spec = _place_autoencoder(autoencoder, folder, images, order, size, patch, channels, place)
    model, scaling = load_autoencoder(spec), {}
    if model.scale is not None and model.shift is not None:
        check_scaling(model.scale, model.shift)
        scaling = {"scale": _plain(model.scale), "shift": _plain(model.shift)}
    if size % model.factor:
        raise DataError(
            f"size {size} is not a multiple of {model.factor}, the pixels per latent of {autoencoder}; change --size"
        )
    latent = size // model.factor
    network = load_encoder(encoder) if encoder else None
    grid = grid_of(token_grid, latent) if network else 0
    fields = {MOMENTS: Field(MOMENTS_MEMBER, (1 + model.std, model.channels, latent, latent), dtype)}
    if store_images:
        fields[IMAGE] = Field("png", (3, size, size), "uint8")
    for name in ("features", "class_token") if class_token else ("features",):
        if network is not None:
            fields[name] = encoded_field(network, name, grid)
    settings = {
        "source": images.digest, "images": len(order), "size": size, "autoencoder": model.identity, "dtype": dtype,
        "store_images": store_images, "encoder": network.identity if network else None,
        "token_grid": grid if network else None, "samples_per_shard": samples_per_shard, "batch_size": batch_size,
        "shuffle": shuffle, "device": place,
    }  # fmt: skip
    if isinstance(images, FolderSource):
        settings["exif"] = exif
    if model.config:
        settings["autoencoder_config"] = dict(model.config)
    if class_token:
        settings["class_token"] = True
    producer = ImageProducer(images, spec, size, fields, encoder, grid, batch_size, place)
    info = {
        "num_classes": len(images.class_names),
        "class_names": list(images.class_names),
        **scaling,
        "autoencoder": {"identity": model.identity, "spec": stored_spec},
    }
    return write_dataset(folder, producer, order, info, settings, samples_per_shard, processes, progress)


def order_of(count: int, shuffle: bool) -> np.ndarray:
    """Which sample of the source is written where, int64 [count]."""
    order = np.arange(count, dtype=np.int64)
    if shuffle:
        order = np.argsort(uint32_numpy(ORDER_SEED, order, Stream.SAMPLE_ORDER, 1)[:, 0], kind="stable")
    return order


def grid_of(token_grid: int | None, latent: int) -> int:
    """Feature tokens a side, by default half the latents (patch 2). Raises ConfigError for more than those or none."""
    grid = latent // 2 if token_grid is None else token_grid
    if not 1 <= grid <= latent:
        raise ConfigError(f"token_grid={grid} is outside 1..{latent}, the latents a side; give --token-grid")
    return grid


def encoded_field(encoder: FeatureEncoder, name: str, grid: int) -> Field:
    """What an encoder gives under this name. Raises ConfigError where it gives nothing of the kind."""
    shapes = encoder.shapes(grid)
    if kind_of(name) not in shapes:
        raise ConfigError(
            f"encoder {encoder.identity} gives {', '.join(shapes)}, but no '{name}'; use one of those, "
            "or one with _ and a word behind"
        )
    return Field(f"{name}.npy", shapes[kind_of(name)], "float16", encoder.identity)


def kind_of(name: str) -> str:
    """What of an encoder a field holds: features_clip, for instance, its features."""
    return next((kind for kind in KINDS if name == kind or name.startswith(f"{kind}_")), name)


def device_of(device: str) -> str:
    """ "auto" resolved. Raises ConfigError for a device that is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device '{device}': valid are auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda': no CUDA device here; give --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _check_labels(source: ImageSource) -> None:
    """Raises DataError unless the labels of a source that others wrote are numbers of its classes."""
    labels, classes = np.asarray(source.labels), len(source.class_names)
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu":
        raise DataError(f"labels of the source are {labels.dtype} {labels.shape}, expected integers [N]; correct them")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"labels of the source lie in {low}..{high}, but it names {classes} classes; correct them")


def read_image(source: ImageSource, number: int, size: int) -> np.ndarray:
    """One image, checked: a float image, for instance, would be taken for one in 0..255."""
    image = source.read(number, size)
    if image.dtype != np.uint8 or image.shape != (size, size, 3):
        raise DataError(
            f"{source.name(number)}: is {image.dtype} {image.shape} where the source must give uint8 "
            f"{(size, size, 3)}; correct its read()"
        )
    return image


def _place_autoencoder(
    spec: str,
    out: Path,
    images: ImageSource,
    order: np.ndarray,
    size: int,
    patch: int,
    channels: int,
    device: str,
) -> tuple[str, str]:
    """(spec to load, spec to store). What is small and fitted lies beside the shards; others stay where they are."""
    kind, separator, path = spec.partition(":")
    fitted: PatchPCA | FeatureAutoencoder
    if kind not in BESIDE:
        return spec, f"{kind}:{Path(path).resolve()}" if separator else spec
    target = out / AUTOENCODER_FILE
    if kind == "features":
        fitted = _features(path, target, images, order, size, patch, device)
    elif spec == "pca":
        PatchPCA.check(size, size, patch, channels)
        count = min(len(order), FIT_IMAGES, max(1, FIT_BYTES // (3 * size * size)))
        with one_thread():
            fitted = PatchPCA.fit(
                np.stack([read_image(images, int(number), size) for number in order[:count]]), patch, channels
            )
    else:
        fitted = PatchPCA.load(path)
    if not target.is_file():
        out.mkdir(parents=True, exist_ok=True)
        fitted.save(target)
    elif fitted.file_bytes() != target.read_bytes():
        raise DataError(
            f"{target}: another autoencoder lies there (size, patch, channels, exif or images differ); "
            "use another folder or delete it"
        )
    return f"{kind}:{target.resolve()}", f"{kind}:./{AUTOENCODER_FILE}"


def _features(
    path: str, target: Path, images: ImageSource, order: np.ndarray, size: int, patch: int, device: str
) -> FeatureAutoencoder:
    """The stored one of a file; of an encoder, the one that lies there for these images already, or a new fit."""
    if Path(path).is_file():
        return FeatureAutoencoder.load(path)
    made_for = {"encoder": load_encoder(path).identity, "source": images.digest, "size": size}
    if target.is_file():
        found = FeatureAutoencoder.load(target)
        if found.factor == patch and {key: found.about.get(key) for key in made_for} == made_for:
            return found
    numbers = order[:FIT_IMAGES].tolist()
    chunks = (numbers[first : first + FIT_BATCH] for first in range(0, len(numbers), FIT_BATCH))
    with one_thread():
        batches = (to_float(np.stack([read_image(images, number, size) for number in chunk])) for chunk in chunks)
        return FeatureAutoencoder.fit(batches, path, patch, images.digest, device)


def _plain(value: Any) -> Any:
    return [float(item) for item in value] if isinstance(value, list | tuple) else float(value)
