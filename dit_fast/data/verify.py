"""Full check of a local data set: every byte of every tar."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dit_fast.data.dataset import LatentDataset, open_dataset
from dit_fast.data.shards import scan_tar
from dit_fast.errors import DataError

CHUNK_BYTES = 1 << 22


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def verify_dataset(path: str | Path, progress: Callable[[str], None] | None = None) -> LatentDataset:
    """Opens the data set, then compares each tar's sha256 with `dataset.json` and each index with a fresh scan.

    `progress` is called with each shard's name when it has passed. Returns the opened data set.
    Raises DataError naming the first file that differs and the fix.
    """
    dataset = open_dataset(path)
    if dataset.remote:
        raise DataError(f"{dataset.root}: only local data sets are verified; download it first")
    for shard, index in zip(dataset.info.shards, dataset.indexes, strict=True):
        tar = Path(dataset.root) / shard.name
        if file_sha256(tar) != shard.sha256:
            raise DataError(f"{tar}: sha256 differs from dataset.json, the file is damaged; restore it or rebuild it")
        fresh = scan_tar(tar)
        order = [fresh.members.index(member) for member in index.members]
        same = np.array_equal(fresh.label, index.label) and all(
            np.array_equal(getattr(fresh, name)[:, order], getattr(index, name)) for name in ("offset", "length", "crc")
        )
        if not same:
            raise DataError(f"{tar}: its .idx differs from it; rebuild it with `dit-fast shards index {dataset.root}`")
        if progress is not None:
            progress(shard.name)
    return dataset
