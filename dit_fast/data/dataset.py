"""Opening a data set: its description, every shard's index, and the checks made before a run starts."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dit_fast.data.address import check_address, is_remote, join, read_bytes, reading
from dit_fast.data.description import FILE_NAME, DatasetInfo, parse_description
from dit_fast.data.field import Family, ShardInfo
from dit_fast.data.index import ShardIndex, index_bytes, index_from_bytes, index_path
from dit_fast.data.shards import LABEL_MEMBER, key_of, parse_npy
from dit_fast.errors import DataError

DESCRIPTION_BYTES = 1 << 28  # at most
LABEL_BYTES = 10  # at most


@dataclass(frozen=True)
class LatentDataset:
    """An opened data set: its description and the index of every shard with latents. Holds no open files; may be sent
    to workers.
    """

    root: str
    info: DatasetInfo
    indexes: tuple[ShardIndex, ...]

    def __len__(self) -> int:
        return self.info.num_samples

    @property
    def remote(self) -> bool:
        return is_remote(self.root)

    @property
    def labels(self) -> np.ndarray:
        """int64 [num_samples]."""
        return np.concatenate([index.label for index in self.indexes]).astype(np.int64)

    def require(self, fields: Iterable[str]) -> None:
        """Raises DataError when batches cannot have these fields."""
        for name in fields:
            try:
                self.info.field(name)
            except DataError as error:
                raise DataError(f"{self.root}: {error}") from None


def open_dataset(path_or_url: str | Path) -> LatentDataset:
    """Reads `dataset.json` and all indexes of a folder or http(s) address and checks them against the tars.

    Checked here: every field of the description has its type and range; every shard is present (local folders), has the
    bytes the description names, agrees with its index in samples, keys and extent; every member has a size that the
    description allows, and the first array of each shard the expected shape and dtype; labels lie in [0, num_classes).
    Payload checksums and values are checked when samples are read.

    Raises DataError, one line naming the file and the fix.
    """
    root, info = read_description(path_or_url)
    return LatentDataset(root=root, info=info, indexes=open_family(root, info, info.families[0]))


def open_family(root: str, info: DatasetInfo, family: Family) -> tuple[ShardIndex, ...]:
    """The checked indexes of a family's shards. Raises DataError."""
    first_keys = np.cumsum([0, *info.shard_sizes[:-1]]).tolist()
    return tuple(
        open_index(root, shard, family, first_key, info.num_classes)
        for shard, first_key in zip(family.shards, first_keys, strict=True)
    )


def read_description(path_or_url: str | Path) -> tuple[str, DatasetInfo]:
    """(root, description) of a folder or http(s) address. Raises DataError."""
    root = check_address(str(path_or_url))
    where = join(root, FILE_NAME)
    with reading(root):
        if not is_remote(root):
            _require_folder(root, where)
        return root, parse_description(read_bytes(where, DESCRIPTION_BYTES), where, root)


def _require_folder(root: str, where: str) -> None:
    absolute = "" if Path(root).is_absolute() else f" (that is {Path(root).absolute()})"
    moved = "if it was moved give its new place (train: data.path=FOLDER, sample: --data FOLDER)"
    build = f"`dit-fast shards build SOURCE {root}`"
    if not Path(root).is_dir():
        what = "is a file, not a folder" if Path(root).exists() else "no such folder"
        raise DataError(f"{root}{absolute}: {what}; make the data set with {build}; {moved}")
    if not Path(where).is_file():
        raise DataError(f"{where}{absolute}: missing; finish the data set with {build}; {moved}")


def open_index(root: str, shard: ShardInfo, family: Family, first_key: int, num_classes: int) -> ShardIndex:
    """The checked index of one shard, whose first sample has this key. Raises DataError."""
    tar, idx = join(root, shard.name), join(root, index_path(Path(shard.name)).name)
    with reading(tar):
        index = _open_index(root, tar, idx, shard, family, first_key)
        if LABEL_MEMBER in index.members:
            _check_labels(tar, idx, index, num_classes)
        _check_sizes(tar, index, family)
        return index


def _open_index(root: str, tar: str, idx: str, shard: ShardInfo, family: Family, first_key: int) -> ShardIndex:
    reindex = f"rebuild it with `dit-fast shards index {root}`"
    if not is_remote(root):
        if not Path(tar).is_file():
            raise DataError(f"{tar}: shard is missing; restore it or build again in another folder")
        size = Path(tar).stat().st_size
        if size != shard.bytes:
            raise DataError(
                f"{tar}: has {size} bytes where dataset.json says {shard.bytes}; restore it or build again elsewhere"
            )
        if not Path(idx).is_file():
            raise DataError(f"{idx}: index is missing; {reindex}")
    wanted = family.members
    index = index_from_bytes(read_bytes(idx, index_bytes(shard.samples, wanted)), idx)
    if index.first_key != first_key or len(index) != shard.samples or index.tar_bytes != shard.bytes:
        raise DataError(
            f"{idx}: describes samples {index.first_key}..{index.first_key + len(index)} of a tar of {index.tar_bytes} "
            f"bytes, dataset.json says {first_key}..{first_key + shard.samples} of {shard.bytes}; {reindex}"
        )
    if sorted(index.members) != sorted(wanted):
        raise DataError(
            f"{idx}: members {sorted(index.members)} differ from dataset.json's {sorted(wanted)}; {reindex}"
        )
    return index


def _check_labels(tar: str, idx: str, index: ShardIndex, num_classes: int) -> None:
    """The index holds each label twice: as a number, and as the crc of the member it was taken from."""
    bad = np.flatnonzero((index.label < 0) | (index.label >= num_classes))
    if len(bad):
        raise DataError(
            f"{tar}: sample {key_of(index.first_key + int(bad[0]))} has label {int(index.label[bad[0]])}, outside "
            f"0..{num_classes - 1} ({len(bad)} such samples); correct the labels and rebuild the shard"
        )
    labels, where = np.unique(index.label, return_inverse=True)
    crcs = np.array([zlib.crc32(str(label).encode()) for label in labels.tolist()], np.uint32)
    wrong = np.flatnonzero(crcs[where] != index.crc[:, index.members.index(LABEL_MEMBER)])
    if len(wrong):
        raise DataError(
            f"{idx}: the label of sample {key_of(index.first_key + int(wrong[0]))} is not that of its member "
            f"{LABEL_MEMBER}; rebuild it with `dit-fast shards index FOLDER`"
        )


def _check_sizes(tar: str, index: ShardIndex, family: Family) -> None:
    """All members by their length, so that nothing is read that cannot be right; the first array by its header too."""
    limits = {LABEL_MEMBER: (1, LABEL_BYTES)} if LABEL_MEMBER in index.members else {}
    limits |= {field.member: field.limits for field in family.fields.values()}
    for member, (low, high) in limits.items():
        lengths = index.length[:, index.members.index(member)]
        wrong = np.flatnonzero((lengths < low) | (lengths > high))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{tar}: {key_of(index.first_key + row)}.{member} has {int(lengths[row])} bytes where dataset.json "
                f"allows {low}..{high}; rebuild the shard"
            )
    if is_remote(tar):
        return
    for field in family.fields.values():
        if field.is_png:
            continue
        column = index.members.index(field.member)
        with open(tar, "rb") as stream:
            stream.seek(int(index.offset[0, column]))
            data = stream.read(int(index.length[0, column]))
        name = f"{tar}: {key_of(index.first_key)}.{field.member}"
        if zlib.crc32(data) == int(index.crc[0, column]):  # else damage, found when it is read
            parse_npy(data, field.shape, field.dtype, name)
