"""Small data sets and helpers for the tests of shards."""

import errno
import json
import os

import numpy as np

from dit_fast.data import shards
from dit_fast.data.dataset import open_dataset
from dit_fast.data.description import description_bytes
from dit_fast.data.reader import IndexedReader
from dit_fast.preparation.build import build_shards

CLASSES = ("ant", "bee", "cat")
COUNT, SIZE, PER_SHARD = 43, 16, 8


def make_images(count=COUNT, size=SIZE, seed=0):
    """Smooth coloured pictures, uint8 [count, size, size, 3], and labels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    phase, tint = rng.uniform(0, 6, (count, 1, 1)), rng.uniform(0.2, 1, (count, 1, 1, 3))
    wave = (np.sin(6 * x + phase) * np.cos(5 * y))[..., None]
    images = (127.5 + 120 * wave * tint + rng.normal(0, 3, (count, size, size, 3))).clip(0, 255).astype(np.uint8)
    return images, rng.integers(0, len(CLASSES), count)


def build(source, out, **options):
    settings = {"autoencoder": "pca", "size": SIZE, "samples_per_shard": PER_SHARD, "store_images": True}
    return build_shards(source, out, **{**settings, "progress": False, "device": "cpu", **options})


def contents(folder):
    """Relative name -> bytes of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def rewrite(folder, change):
    """Applies `change` to dataset.json's content and fills in the fingerprint again."""
    path = folder / "dataset.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_bytes(description_bytes(content))


def everything(folder, fields=()):
    """All samples of a data set as one batch."""
    dataset = open_dataset(folder)
    return IndexedReader(dataset, fields).read(np.arange(len(dataset)), np.arange(len(dataset)))


def make_tree(root, count=9, channels=4):
    """A vae-sd tree of five classes; returns moments and labels."""
    rng = np.random.default_rng(2)
    labels, arrays = [], []
    for number in range(count):
        name = f"{number // 4:05d}/img-mean-std-{number:08d}.npy"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        array = rng.normal(size=(2 * channels, 4, 4)).astype(np.float32)
        array[channels:] = np.abs(array[channels:])
        np.save(root / name, array)
        labels.append([name, number % 5])
        arrays.append(array.reshape(2, channels, 4, 4))
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return np.stack(arrays), [label for _, label in labels]


def full_after(monkeypatch, count):
    """Writes to shard files fail with ENOSPC from the count-th on."""
    real, calls = shards.ShardWriter._write, iter(range(10**9))

    def write(self, data):
        if next(calls) >= count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, data)

    monkeypatch.setattr(shards.ShardWriter, "_write", write)
