"""The `.idx` file beside each tar: where every member of every sample lies, its checksum, and the label.

Layout, little-endian: magic `DITFIDX1`; u64 first key, u64 bytes of the tar, u32 samples, u32 members, u32 length of
the member names; the names joined by commas (ASCII); then per sample `members` times (u64 offset, u32 length, u32
crc32) and one i32 label (0 where the tar holds none); last a u32 crc32 of everything before it. Samples are
consecutive: sample i has key `first_key + i`.
"""

import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dit_fast.errors import DataError

MAGIC = b"DITFIDX1"
_HEADER = struct.Struct("<8sQQIII")


@dataclass(frozen=True)
class ShardIndex:
    """One shard's index. offset, length, crc: uint64/uint32/uint32 [samples, members]; label: int32 [samples]."""

    first_key: int
    tar_bytes: int
    members: tuple[str, ...]
    offset: np.ndarray
    length: np.ndarray
    crc: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


def _record(members: int) -> np.dtype:
    entry = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc", "<u4")])
    return np.dtype([("member", entry, (members,)), ("label", "<i4")])


def index_to_bytes(index: ShardIndex) -> bytes:
    """The file's bytes; a pure function of the index."""
    names = ",".join(index.members).encode("ascii")
    table = np.zeros(len(index), _record(len(index.members)))
    table["member"]["offset"], table["member"]["length"] = index.offset, index.length
    table["member"]["crc"], table["label"] = index.crc, index.label
    header = _HEADER.pack(MAGIC, index.first_key, index.tar_bytes, len(index), len(index.members), len(names))
    body = header + names + table.tobytes()
    return body + struct.pack("<I", zlib.crc32(body))


def index_bytes(samples: int, members: tuple[str, ...]) -> int:
    """Length of the file that `index_to_bytes` makes."""
    return _HEADER.size + len(",".join(members)) + samples * (16 * len(members) + 4) + 4


def index_from_bytes(data: bytes, name: str) -> ShardIndex:
    """Inverse of `index_to_bytes`.

    Raises DataError naming `name` when a byte is missing, added or changed, or when the members do not lie where a
    shard has them: one after the other, each behind its header, up to the end mark.
    """
    fix = "rebuild it with `dit-fast shards index FOLDER`"
    if len(data) < _HEADER.size + 4 or data[:8] != MAGIC:
        raise DataError(f"{name}: not a shard index (bad magic or too short); {fix}")
    if zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise DataError(f"{name}: index checksum does not match its content; {fix}")
    _, first_key, tar_bytes, samples, count, name_bytes = _HEADER.unpack_from(data)
    start = _HEADER.size + name_bytes
    members = tuple(data[_HEADER.size : start].decode("latin-1").split(","))
    if len(members) != count or len(data) != start + samples * (16 * count + 4) + 4:
        raise DataError(f"{name}: index has {len(data)} bytes, not what its header says; {fix}")
    table = np.frombuffer(data, _record(count), count=samples, offset=start)
    entry = table["member"]
    index = ShardIndex(
        first_key=first_key,
        tar_bytes=tar_bytes,
        members=members,
        offset=np.ascontiguousarray(entry["offset"]),
        length=np.ascontiguousarray(entry["length"]),
        crc=np.ascontiguousarray(entry["crc"]),
        label=np.ascontiguousarray(table["label"]),
    )
    order = sorted(range(count), key=lambda column: index.offset[:1, column].tolist())  # as in the tar
    places, end = layout(index.length[:, order])
    if end != tar_bytes or not np.array_equal(places, index.offset[:, order]):
        raise DataError(f"{name}: members do not lie one after the other in {tar_bytes} bytes of tar; {fix}")
    return index


def layout(length: np.ndarray) -> tuple[np.ndarray, int]:
    """Where a shard has members of these lengths [samples, members], in its order: (offsets uint64, bytes of tar)."""
    block = np.uint64(tarfile.BLOCKSIZE)
    padded = -(-length.astype(np.int64) // tarfile.BLOCKSIZE).astype(np.uint64) * block
    ends = np.cumsum(padded.ravel() + block).reshape(length.shape).astype(np.uint64)
    return ends - padded, int(ends.ravel()[-1] if ends.size else 0) + 2 * tarfile.BLOCKSIZE


def index_path(tar: Path) -> Path:
    """`shard-000000.tar` -> `shard-000000.idx`."""
    return tar.with_suffix(".idx")
