"""Importer for the `vae-sd` tree of the published REPA-family code: one npy of moments per image and a dataset.json.

Layout: SRC/dataset.json = {"labels": [[relative path, label], ...]}, SRC/00000/img-mean-std-00000000.npy float32
[2 C, h, w], first C channels mean, last C the standard deviation. The published loader pairs files and labels by sorted
position, so one file too many shifts every label after it; here files are found by name and both sides must agree.
"""

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from dit_fast.data.address import reading
from dit_fast.data.dataset import LatentDataset
from dit_fast.data.field import MOMENTS, Field
from dit_fast.data.files import check_output, check_utf8, digest_files, read_npy, reason, shown
from dit_fast.data.shards import MOMENTS_MEMBER
from dit_fast.data.writer import check_amounts, check_scaling, write_dataset
from dit_fast.errors import ConfigError, DataError

SD_VAE_SCALE = 0.18215
FACTOR = 8  # pixels per latent a side
MAX_CLASSES = 1 << 20


class _TreeProducer:
    def __init__(self, root: Path, entries: list[tuple[str, int]], dtype: str):
        self.root, self.entries = root, entries
        self.shape = load_moments(root / entries[0][0]).shape  # all others must equal it
        self.fields = {MOMENTS: Field(MOMENTS_MEMBER, self.shape, dtype)}

    def name(self, number: int) -> str:
        return shown(self.root / self.entries[number][0])

    def samples(self, numbers: np.ndarray, shard: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        for number in numbers.tolist():
            name, label = self.entries[number]
            moments = load_moments(self.root / name)
            if moments.shape != self.shape:
                first = self.entries[0][0]
                raise DataError(
                    f"{self.root / name}: moments {moments.shape}, {first} has {self.shape}; encode it again"
                )
            yield {MOMENTS: moments}, label


class TreePictures:
    """The pictures of an imported tree, by key: DATA/images beside DATA/vae-sd, paired by the numbers in their names.

    The published loader pairs them by sorted position. labels: of the shards. Pictures are cropped already, so all
    have the first one's size. Raises DataError naming the file that is missing, has no partner or another label.
    """

    def __init__(self, root: Path, labels: np.ndarray, class_names: tuple[str, ...]):
        latents, pictures = (root / name for name in ("vae-sd", "images"))
        for folder in (latents, pictures):
            if not (folder / "dataset.json").is_file():
                raise DataError(f"{shown(folder)}/dataset.json: missing; give the folder with images/ and vae-sd/")
        entries = _listed(latents)
        if [label for _, label in entries] != labels.tolist():
            raise DataError(f"{shown(latents)}: lists other labels than the shards; give the tree they were made of")
        found = {_number(pictures, name): (name, label) for name, label in _listed(pictures)}
        numbers = [_number(latents, name) for name, _ in entries]
        for number, (name, label) in zip(numbers, entries, strict=True):
            partner = found.get(number)
            if partner is None or partner[1] != label:
                has = "has no picture" if partner is None else f"has label {label}, {shown(partner[0])} {partner[1]}"
                raise DataError(f"{shown(latents / name)}: {has} in {shown(pictures)}; restore both trees")
        if len(found) != len(entries):
            raise DataError(f"{shown(pictures)}: lists {len(found)} pictures for {len(entries)} latents; restore both")
        self.root, self.labels, self.class_names = pictures, labels, class_names
        self.files = [found[number][0] for number in numbers]
        self.digest = hashlib.sha256("\n".join(self.files).encode()).hexdigest()
        self.size = len(self.read(0, 0))

    def name(self, index: int) -> str:
        return shown(self.root / self.files[index])

    def read(self, index: int, size: int) -> np.ndarray:
        try:
            with Image.open(self.root / self.files[index]) as picture:
                return np.asarray(picture.convert("RGB"))
        except Exception as error:  # damaged files raise many kinds
            raise DataError(f"{self.name(index)}: not a readable image ({reason(error)}); restore it") from None


def _number(folder: Path, name: str) -> int:
    digits = re.search(r"(\d+)\.\w+$", name)
    if digits is None:
        raise DataError(f"{shown(folder / name)}: has no number in its name, by which pictures and latents are paired")
    return int(digits[1])


def load_moments(path: Path) -> np.ndarray:
    """float32 [2, C, h, w]. Raises DataError naming the file when it is missing, misshapen or holds log variances."""
    where = shown(path)
    try:
        with open(path, "rb") as file:
            array = read_npy(file, os.fstat(file.fileno()).st_size)
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: not a readable npy array ({reason(error)}); encode it again") from None
    if array.ndim != 3 or array.shape[0] % 2 or array.shape[1] != array.shape[2] or array.dtype.kind != "f":
        raise DataError(f"{where}: {array.dtype} {array.shape}, expected float [2 C, h, h]; encode it again")
    if not array.size:
        raise DataError(f"{where}: {array.dtype} {array.shape} holds nothing; encode it again")
    with np.errstate(over="ignore"):
        moments = array.astype(np.float32).reshape(2, array.shape[0] // 2, *array.shape[1:])
    if not np.isfinite(moments).all():
        raise DataError(f"{where}: holds NaN or infinite values; encode it again")
    if moments[1].min() < 0:
        raise DataError(f"{where}: the second half has negative values, so it is a log variance; store exp(logvar / 2)")
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

    num_classes: default largest label + 1, and then every class must have an image. autoencoder: where the decoder lies
    (a spec of `load_autoencoder`), "" if unknown. Raises DataError naming the file that is missing, listed twice, not
    listed, misshapen, not finite or holds log variances.
    """
    root, folder = Path(src), check_output(out)
    check_amounts(samples_per_shard, processes)
    if dtype not in ("float16", "float32"):
        raise ConfigError(f"dtype '{dtype}': valid are float16, float32")
    check_scaling(scale, shift)
    if folder.resolve() == root.resolve():
        raise DataError(f"{shown(root)}: is both source and output; choose another folder for the output")
    entries = _entries(root)
    classes = count_classes(entries, num_classes, root / "dataset.json")
    producer = _TreeProducer(root, entries, dtype)
    identity = "sd-vae (imported tree)"
    if autoencoder:
        from dit_fast.autoencoders import load_autoencoder

        identity = load_autoencoder(autoencoder).identity
    settings = {
        "imported": "vae-sd", "source": _digest(root, entries, progress), "images": len(entries),
        "num_classes": classes, "scale": scale, "shift": shift,
        "autoencoder": identity, "dtype": dtype, "samples_per_shard": samples_per_shard,
    }  # fmt: skip
    info = {
        "num_classes": classes,
        "class_names": [str(label) for label in range(classes)],
        "scale": scale,
        "shift": shift,
        "autoencoder": {"identity": identity, "spec": autoencoder},
    }
    order = np.arange(len(entries), dtype=np.int64)
    return write_dataset(folder, producer, order, info, settings, samples_per_shard, processes, progress)


def count_classes(entries: list[tuple[str, int]], num_classes: int | None, where: Path) -> int:
    """The number of classes; nothing is allocated by a label or by the number asked for before it is checked."""
    if num_classes is not None and not 1 <= num_classes <= MAX_CLASSES:
        raise ConfigError(f"num_classes={num_classes} is outside 1..{MAX_CLASSES}; give --num-classes")
    present = {label for _, label in entries}
    classes = max(present) + 1 if num_classes is None else num_classes
    bad = next(((name, label) for name, label in entries if not 0 <= label < classes), None)
    if bad:
        raise DataError(f"{where}: {shown(bad[0])} has label {bad[1]}, outside 0..{classes - 1}; correct it")
    if num_classes is None and len(present) < classes:
        missing = next(label for label in range(classes) if label not in present)
        raise DataError(
            f"{where}: no image has label {missing} and labels run to {classes - 1}; correct it or give --num-classes"
        )
    return classes


def _digest(root: Path, entries: list[tuple[str, int]], progress: bool) -> str:
    names, labels = [name for name, _ in entries], [label for _, label in entries]
    return hashlib.sha256(f"{digest_files(root, names, progress)} {labels}".encode()).hexdigest()


def _listed(root: Path) -> list[tuple[str, int]]:
    """(path, label) of every file that a tree's dataset.json lists, each once and there, in its shortest spelling."""
    where = root / "dataset.json"
    if not where.exists():
        raise DataError(f"{where}: missing; give the vae-sd folder itself, its own dataset.json holds the labels")
    with reading(str(where)):
        data = where.read_bytes()
    try:
        entries = [(name, label) for name, label in json.loads(data)["labels"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(
            f'{where}: expected {{"labels": [[path, label], ...]}}; write it again with the encode step'
        ) from None
    if not entries:
        raise DataError(f"{where}: lists no images; write it again with the encode step")
    spelled: dict[str, str] = {}
    for name, label in entries:
        if type(name) is not str or type(label) is not int:
            pair = shown(json.dumps([name, label])[:100])
            raise DataError(f"{where}: {pair} is not a path and a whole number; write it again with the encode step")
        check_utf8(name, f"{where}: path")
        path = posixpath.normpath(name)
        if path.startswith("/") or path.split("/")[0] == "..":
            raise DataError(f"{where}: '{shown(name)}' leaves the folder; correct it")
        if path in spelled:
            raise DataError(f"{where}: names a file twice, as '{shown(spelled[path])}' and '{shown(name)}'; correct it")
        spelled[path] = name
    real: dict[str, str] = {}  # without links -> as listed
    for path in spelled:
        if not os.path.isfile(root / path):
            raise DataError(
                f"{shown(root / path)}: named in dataset.json but missing or no file; restore it or correct the list"
            )
        first = real.setdefault(os.path.realpath(root / path), path)
        if first != path:
            raise DataError(
                f"{where}: names a file twice, as '{shown(first)}' and, by a link, '{shown(path)}'; correct it"
            )
    return list(zip(spelled, (label for _, label in entries), strict=True))


def _entries(root: Path) -> list[tuple[str, int]]:
    """What a tree of latents lists, which are all that lie there."""
    entries = _listed(root)
    spelled = dict(entries)
    there = {path.relative_to(root).as_posix() for path in root.rglob("*.npy")}
    if there - spelled.keys():
        extra = sorted(there - spelled.keys())
        raise DataError(
            f"{shown(root / extra[0])}: not listed in dataset.json ({len(extra)} such files); remove them or list them"
        )
    return entries
