"""Opening a data set: its description, every shard's index, and the checks made before a run starts."""

import hashlib
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dit_fast.data.address import check_address, is_remote, join, read_bytes, reading
from dit_fast.data.description import FILE_NAME, DatasetInfo, parse_description
from dit_fast.data.field import Family, ShardInfo
from dit_fast.data.index import ShardIndex, index_bytes, index_from_bytes, index_path
from dit_fast.data.shards import LABEL_MEMBER, key_of, parse_npy
from dit_fast.errors import DataError
from dit_fast.world import World

DESCRIPTION_BYTES = 1 << 28  # at most
LABEL_BYTES = 10  # at most
KEPT_BYTES = 1 << 26  # of indexes in memory: ImageNet's whole, with two members a sample
DIGEST_BYTES = 16  # of each index
CHECKED_FIRST = 64  # shards whose indexes are checked when a data set is opened; the others' when their group comes up
CHECKED_AT_ONCE = 4  # indexes


class Indexes(Sequence[ShardIndex]):
    """The indexes of a family's shards, each read and checked when it is asked for; those used last are kept, in
    `KEPT_BYTES`. Several threads may ask.

    digests: `DIGEST_BYTES` for each index that another process has checked, from the first on; such an index has to be
    that one and is not checked again.
    """

    def __init__(self, root: str, info: DatasetInfo, family: Family, digests: bytes = b""):
        self._root, self._family, self._classes, self._digests = root, family, info.num_classes, digests
        self._first_keys = np.cumsum([0, *info.shard_sizes[:-1]])
        self._most = max(KEPT_BYTES // index_bytes(max(info.shard_sizes), family.members), 2)
        self._kept: OrderedDict[int, ShardIndex] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._family.shards)

    def __getitem__(self, shard):
        if isinstance(shard, slice):
            return [self[number] for number in range(*shard.indices(len(self)))]
        shard = range(len(self))[shard]
        with self._lock:
            index = self._kept.pop(shard, None)
            if index is not None:
                self._kept[shard] = index
        return index if index is not None else self._keep(shard, self._read(shard)[0])

    def keep(self, shards: int) -> None:
        """At least so many stay, whatever their bytes: those that are shuffled together."""
        self._most = max(self._most, shards)

    def check(self) -> bytes:
        """Looks whether all files are there (local folders), then reads and checks the first `CHECKED_FIRST` indexes,
        several at a time; returns their digests. Raises DataError for the first that is wrong."""
        if not is_remote(self._root):
            with reading(self._root):
                there = set(os.listdir(self._root))
            for part in self._family.shards:
                if part.name not in there:
                    raise DataError(_shard_missing(join(self._root, part.name)))
                if index_path(Path(part.name)).name not in there:
                    raise DataError(_index_missing(self._root, part))

        def digest(shard: int) -> bytes:
            index, found = self._read(shard)
            self._keep(shard, index)
            return found

        with ThreadPoolExecutor(CHECKED_AT_ONCE) as pool:
            return b"".join(pool.map(digest, range(min(len(self), CHECKED_FIRST))))

    def _keep(self, shard: int, index: ShardIndex) -> ShardIndex:
        with self._lock:
            self._kept[shard] = index
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return index

    def _read(self, shard: int) -> tuple[ShardIndex, bytes]:
        first_key, part = int(self._first_keys[shard]), self._family.shards[shard]
        checked = self._digests[DIGEST_BYTES * shard : DIGEST_BYTES * (shard + 1)]
        if not checked:
            return open_index(self._root, part, self._family, first_key, self._classes)
        index, found = _open_index(self._root, part, self._family, first_key)
        if found != checked:
            raise DataError(
                f"{index_address(self._root, part)}: is not what rank 0 checked; give all ranks the same files"
            )
        return index, found

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


@dataclass(frozen=True)
class LatentDataset:
    """An opened data set: its description and the indexes of the shards with latents. Holds no open files.

    digest: what `open_dataset` gives to processes that are to trust this one's checks; None where it trusts another.
    """

    root: str
    info: DatasetInfo
    indexes: Sequence[ShardIndex]
    digest: str | None = None

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


def open_dataset(path_or_url: str | Path, digest: str | None = None) -> LatentDataset:
    """Reads `dataset.json` of a folder or an address and checks indexes against it and the tars.

    Checked here: every field of the description has its type and range; every shard and index is present (local
    folders). Checked here for the first `CHECKED_FIRST` shards, for the others when an index is first asked for: the
    shard has the bytes the description names (local folders) and agrees with its index in samples, keys and extent;
    every member has a size that the description allows, and the first array of each shard the expected shape and dtype;
    labels lie in [0, num_classes). Payload checksums and values are checked when samples are read.

    digest: of the same data set as another process has opened it. Then nothing but the description is read, and the
    indexes which that process checked must be the same.

    Raises DataError, one line naming the file and the fix.
    """
    root, info = read_description(path_or_url)
    if digest is None:
        indexes = Indexes(root, info, info.families[0])
        return LatentDataset(root, info, indexes, f"{info.fingerprint}:{indexes.check().hex()}")
    fingerprint, _, checked = digest.partition(":")
    if fingerprint != info.fingerprint:
        raise DataError(f"{root}: is not the data set that rank 0 opened; give all ranks the same files")
    return LatentDataset(root, info, Indexes(root, info, info.families[0], bytes.fromhex(checked)))


def open_together(path_or_url: str | Path, world: World) -> LatentDataset:
    """`open_dataset` in every process of a job: rank 0 checks, the others trust its digest. Collective."""
    opened: list[LatentDataset] = []

    def check() -> str | None:
        opened.append(open_dataset(path_or_url))
        return opened[0].digest

    if world.size == 1:
        return open_dataset(path_or_url)
    digest = world.agree(check)
    return opened[0] if opened else open_dataset(path_or_url, digest)


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


def index_address(root: str, shard: ShardInfo) -> str:
    return join(root, index_path(Path(shard.name)).name)


def open_index(
    root: str, shard: ShardInfo, family: Family, first_key: int, num_classes: int
) -> tuple[ShardIndex, bytes]:
    """The checked index of one shard, whose first sample has this key, and its digest. Raises DataError."""
    tar, idx = join(root, shard.name), index_address(root, shard)
    with reading(tar):
        if not is_remote(root):
            _check_tar(root, tar, shard)
        index, digest = _open_index(root, shard, family, first_key)
        if LABEL_MEMBER in index.members:
            _check_labels(tar, idx, index, num_classes)
        _check_sizes(tar, index, family)
        return index, digest


def _shard_missing(tar: str) -> str:
    return f"{tar}: shard is missing; restore it or build again in another folder"


def _index_missing(root: str, shard: ShardInfo) -> str:
    return f"{index_address(root, shard)}: index is missing; rebuild it with `dit-fast shards index {root}`"


def _check_tar(root: str, tar: str, shard: ShardInfo) -> None:
    if not Path(tar).is_file():
        raise DataError(_shard_missing(tar))
    size = Path(tar).stat().st_size
    if size != shard.bytes:
        raise DataError(
            f"{tar}: has {size} bytes where dataset.json says {shard.bytes}; restore it or build again elsewhere"
        )


def _open_index(root: str, shard: ShardInfo, family: Family, first_key: int) -> tuple[ShardIndex, bytes]:
    reindex, idx = f"rebuild it with `dit-fast shards index {root}`", index_address(root, shard)
    if not is_remote(root) and not Path(idx).is_file():
        raise DataError(_index_missing(root, shard))
    wanted = family.members
    data = read_bytes(idx, index_bytes(shard.samples, wanted))
    index = index_from_bytes(data, idx)
    if index.first_key != first_key or len(index) != shard.samples or index.tar_bytes != shard.bytes:
        raise DataError(
            f"{idx}: describes samples {index.first_key}..{index.first_key + len(index)} of a tar of {index.tar_bytes} "
            f"bytes, dataset.json says {first_key}..{first_key + shard.samples} of {shard.bytes}; {reindex}"
        )
    if sorted(index.members) != sorted(wanted):
        raise DataError(
            f"{idx}: members {sorted(index.members)} differ from dataset.json's {sorted(wanted)}; {reindex}"
        )
    return index, hashlib.sha256(data).digest()[:DIGEST_BYTES]


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
