"""Importer for the `vae-sd` tree of the published REPA-family code: one npy of moments per image and a dataset.json.

Layout: SRC/dataset.json = {"labels": [[relative path, label], ...]}, SRC/00000/img-mean-std-00000000.npy float32
[2 C, h, w], first C channels mean, last C the standard deviation. The published loader pairs files and labels by sorted
position, so one file too many shifts every label after it; here files are found by name and both sides must agree.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from dit_fast.data.dataset import LatentDataset
from dit_fast.data.shards import LABEL_MEMBER, MOMENTS_MEMBER
from dit_fast.data.writer import Sample, write_dataset
from dit_fast.errors import DataError

SD_VAE_SCALE = 0.18215


class _TreeProducer:
    members: tuple[str, ...] = (MOMENTS_MEMBER, LABEL_MEMBER)

    def __init__(self, root: Path, entries: list[tuple[str, int]], dtype: str):
        self.root, self.entries, self.dtype = root, entries, dtype
        self._shape = load_moments(root / entries[0][0]).shape

    @property
    def shape(self) -> tuple[int, ...]:
        """[2, C, h, w] of the first file; all others must equal it."""
        return self._shape

    def samples(self, numbers: np.ndarray, shard: int) -> Iterator[Sample]:
        for number in numbers.tolist():
            name, label = self.entries[number]
            moments = load_moments(self.root / name)
            if moments.shape != self._shape:
                first = self.entries[0][0]
                raise DataError(
                    f"{self.root / name}: moments {moments.shape}, {first} has {self._shape}; encode it again"
                )
            yield {}, label, moments


def load_moments(path: Path) -> np.ndarray:
    """float32 [2, C, h, w]. Raises DataError naming the file when it is missing, misshapen or holds log variances."""
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: named in dataset.json but missing; restore it or correct dataset.json") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a readable npy array ({error}); encode it again") from None
    if array.ndim != 3 or array.shape[0] % 2 or array.shape[1] != array.shape[2] or array.dtype.kind != "f":
        raise DataError(f"{path}: {array.dtype} {array.shape}, expected float [2 C, h, h]; encode it again")
    moments = array.astype(np.float32).reshape(2, array.shape[0] // 2, *array.shape[1:])
    if moments[1].min() < 0:
        raise DataError(f"{path}: the second half has negative values, so it is a log variance; store exp(logvar / 2)")
    return moments


def import_vae_sd(
    src: str | Path,
    out: str | Path,
    *,
    num_classes: int | None = None,
    scale: float = SD_VAE_SCALE,
    shift: float = 0.0,
    autoencoder: str = "",
    dtype: Literal["float16", "float32"] = "float16",
    samples_per_shard: int = 2048,
    processes: int = 1,
    progress: bool = True,
) -> LatentDataset:
    """Writes the tree's moments to shards in `out`, in the order of its dataset.json; continues what is there.

    num_classes: default largest label + 1. autoencoder: where the decoder lies (a spec of `load_autoencoder`), "" if
    unknown. Raises DataError naming the file that is missing, not listed, misshapen or holds log variances.
    """
    root = Path(src)
    entries = _entries(root)
    largest = max(label for _, label in entries)
    classes = largest + 1 if num_classes is None else num_classes
    bad = [(name, label) for name, label in entries if not 0 <= label < classes]
    if bad:
        raise DataError(
            f"{root / 'dataset.json'}: {bad[0][0]} has label {bad[0][1]}, outside 0..{classes - 1}; correct it"
        )
    producer = _TreeProducer(root, entries, dtype)
    _, channels, height, width = producer.shape
    identity = "sd-vae (imported tree)"
    if autoencoder:
        from dit_fast.data.autoencoders import load_autoencoder

        identity = load_autoencoder(autoencoder).identity
    settings = {
        "imported": "vae-sd", "images": len(entries), "num_classes": classes, "scale": scale, "shift": shift,
        "autoencoder": identity, "dtype": dtype, "samples_per_shard": samples_per_shard,
    }  # fmt: skip
    info = {
        "num_classes": classes,
        "class_names": [str(label) for label in range(classes)],
        "members": list(producer.members),
        "dtype": dtype,
        "latent_shape": [channels, height, width],
        "scale": scale,
        "shift": shift,
        "autoencoder": {"identity": identity, "spec": autoencoder},
        "image_size": None,
        "features": None,
    }
    order = np.arange(len(entries), dtype=np.int64)
    return write_dataset(Path(out), producer, order, info, settings, samples_per_shard, processes, progress)


def _entries(root: Path) -> list[tuple[str, int]]:
    where = root / "dataset.json"
    try:
        labels = json.loads(where.read_bytes())["labels"]
        entries = [(str(name), int(label)) for name, label in labels]
    except FileNotFoundError:
        raise DataError(
            f"{where}: missing; give the vae-sd folder itself, its own dataset.json holds the labels"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f'{where}: expected {{"labels": [[path, label], ...]}}; write it again with the encode step'
        ) from None
    if not entries:
        raise DataError(f"{where}: lists no images; write it again with the encode step")
    listed = {name for name, _ in entries}
    if len(listed) != len(entries):
        raise DataError(f"{where}: names a file twice; correct it")
    for name in sorted(listed):
        if name.startswith("/") or ".." in Path(name).parts:
            raise DataError(f"{where}: '{name}' leaves the folder; correct it")
    there = {path.relative_to(root).as_posix() for path in root.rglob("*.npy")}
    if there - listed:
        extra = sorted(there - listed)
        raise DataError(
            f"{root / extra[0]}: not listed in dataset.json ({len(extra)} such files); remove them or list them"
        )
    return entries
