"""Writing and scanning tar shards: uncompressed, deterministic, readable by any WebDataset user.

Samples are numbered over the whole data set; sample 1234 has the members `000001234.moments.npy` (mean and std,
[2, C, h, w]), `000001234.cls` (label in decimal) and, where asked for, `000001234.png` and `000001234.features.npy`.
Modification time, owner and mode are fixed, so equal samples give equal bytes.
"""

import errno
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dit_fast.data.index import ShardIndex, index_path, index_to_bytes
from dit_fast.errors import DataError

KEY_DIGITS = 9
LABEL_MEMBER = "cls"
MOMENTS_MEMBER = "moments.npy"
# name of a batch field -> member of the tar
FIELD_MEMBERS = {"moments": MOMENTS_MEMBER, "label": LABEL_MEMBER, "image": "png", "features": "features.npy"}


def key_of(sample: int) -> str:
    """Key of a sample: its number in the whole data set, nine digits."""
    return f"{sample:0{KEY_DIGITS}d}"


def npy_bytes(array: np.ndarray) -> bytes:
    """A `.npy` file (format 1.0, C order, no pickle) in memory."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


class NpyParser:
    """Reads `.npy` payloads without pickle; the header of a shard's members repeats, so it is parsed once."""

    def __init__(self) -> None:
        self._headers: dict[bytes, tuple[tuple[int, ...], np.dtype]] = {}

    def __call__(self, data: bytes, name: str) -> np.ndarray:
        """The array (a view of `data`). Raises DataError naming `name` for anything but a plain C-order array."""
        start = 10 + int.from_bytes(data[8:10], "little")
        head = data[:start]
        if head not in self._headers:
            self._headers[head] = self._parse(head, name)
        shape, dtype = self._headers[head]
        count = int(np.prod(shape))
        if len(data) != start + count * dtype.itemsize:
            raise DataError(
                f"{name}: {len(data)} bytes do not fit an array of shape {shape} {dtype}; rebuild the shard"
            )
        return np.frombuffer(data, dtype, count=count, offset=start).reshape(shape)

    @staticmethod
    def _parse(head: bytes, name: str) -> tuple[tuple[int, ...], np.dtype]:
        stream = io.BytesIO(head)
        try:
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("npy version is not 1.0")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        except (ValueError, OSError) as error:
            raise DataError(
                f"{name}: not a readable npy array ({str(error).splitlines()[0]}); rebuild the shard"
            ) from None
        if fortran or dtype.hasobject:
            raise DataError(f"{name}: Fortran order or Python objects are not accepted; rebuild the shard")
        return shape, dtype


class ShardWriter:
    """Writes one tar and its index to `.partial` names, then renames both into place when `close` is called.

    Leaving the context with an exception removes what was written of this shard; earlier shards are untouched.
    """

    def __init__(self, path: Path, members: tuple[str, ...], first_key: int):
        self.path, self.members, self.first_key = path, members, first_key
        self._partial = path.with_name(path.name + ".partial")
        self._file = open(self._partial, "wb")  # noqa: SIM115
        self._offset: list[list[int]] = []
        self._length: list[list[int]] = []
        self._crc: list[list[int]] = []
        self._label: list[int] = []
        self._position = 0
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Hex sha256 of the bytes written so far."""
        return self._digest.hexdigest()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self.abort()

    def add(self, payload: Mapping[str, bytes], label: int) -> None:
        """Appends the next sample. `payload`: member -> bytes for all members but the label's."""
        key = key_of(self.first_key + len(self._label))
        full = {**payload, LABEL_MEMBER: str(label).encode("ascii")}
        if set(full) != set(self.members):
            raise DataError(f"sample {key}: members {sorted(full)} where the data set has {sorted(self.members)}")
        offsets, lengths, crcs = [], [], []
        for member in self.members:
            data = full[member]
            self._write(_header(f"{key}.{member}", len(data)))
            offsets.append(self._position)
            lengths.append(len(data))
            crcs.append(zlib.crc32(data))
            self._write(data + b"\0" * (-len(data) % tarfile.BLOCKSIZE))
        self._offset.append(offsets)
        self._length.append(lengths)
        self._crc.append(crcs)
        self._label.append(label)

    def close(self) -> ShardIndex:
        """Finishes the tar, syncs it and its index to disk and renames them into place; returns the index."""
        self._write(b"\0" * (2 * tarfile.BLOCKSIZE))
        index = ShardIndex(
            first_key=self.first_key,
            tar_bytes=self._position,
            members=self.members,
            offset=np.array(self._offset, np.uint64).reshape(-1, len(self.members)),
            length=np.array(self._length, np.uint32).reshape(-1, len(self.members)),
            crc=np.array(self._crc, np.uint32).reshape(-1, len(self.members)),
            label=np.array(self._label, np.int32),
        )
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        write_atomic(index_path(self.path), index_to_bytes(index))
        os.replace(self._partial, self.path)
        sync_folder(self.path.parent)
        return index

    def abort(self) -> None:
        """Removes the unfinished tar; what does not fit on a full disk any more is dropped."""
        self._partial.unlink(missing_ok=True)
        try:
            self._file.close()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._position += len(data)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o644
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return info.tobuf(tarfile.USTAR_FORMAT)


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `data` to `path` through a synced temporary file and a rename; nothing is left behind on failure."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def scan_tar(path: Path) -> ShardIndex:
    """Builds the index of a tar by reading it from start to end.

    Raises DataError when the tar is truncated or damaged, when keys are not consecutive numbers, when samples differ in
    their members, or when a label is not a number.
    """
    rows: list[dict[str, tuple[int, int, int]]] = []
    labels: list[int] = []
    first_key = 0
    try:
        with open(path, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if not member.isreg() or not (key.isascii() and key.isdecimal()) or not suffix:
                    raise DataError(
                        f"{path}: member '{member.name}' is not of the form 000001234.name; rebuild the shard"
                    )
                if not rows:
                    first_key = int(key)
                if int(key) == first_key + len(rows):
                    rows.append({})
                elif int(key) != first_key + len(rows) - 1:
                    raise DataError(f"{path}: sample {key} is out of sequence; rebuild the shard")
                data = os.pread(raw.fileno(), member.size, member.offset_data)
                if len(data) != member.size or suffix in rows[-1]:
                    raise DataError(f"{path}: member '{member.name}' is cut short or repeated; rebuild the shard")
                rows[-1][suffix] = (member.offset_data, member.size, zlib.crc32(data))
                if suffix == LABEL_MEMBER:
                    labels.append(int(data))
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: damaged tar ({error}); rebuild the shard with `dit-fast shards build`") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: a label is not a decimal number; rebuild the shard") from None
    # a tar cut between two members, or with a damaged header, reads as a shorter tar: only the end mark tells
    with open(path, "rb") as raw:
        raw.seek(end)
        tail = raw.read(2 * tarfile.BLOCKSIZE)
    if len(tail) < 2 * tarfile.BLOCKSIZE or any(tail):
        raise DataError(
            f"{path}: tar is damaged or cut after {len(rows)} samples; rebuild it with `dit-fast shards build`"
        )
    members = tuple(rows[0]) if rows else ()
    for number, row in enumerate(rows):
        if set(row) != set(members) or LABEL_MEMBER not in row:
            raise DataError(f"{path}: sample {key_of(first_key + number)} has members {sorted(row)}; rebuild the shard")
    table = np.array([[row[member] for member in members] for row in rows], np.uint64).reshape(
        len(rows), len(members), 3
    )
    return ShardIndex(
        first_key=first_key,
        tar_bytes=path.stat().st_size,
        members=members,
        offset=table[..., 0],
        length=table[..., 1].astype(np.uint32),
        crc=table[..., 2].astype(np.uint32),
        label=np.array(labels, np.int32),
    )


def rebuild_index(tar: str | Path) -> ShardIndex:
    """Scans a tar and writes the `.idx` beside it; equal to the one its writer made.

    Raises DataError when the tar is missing or damaged.
    """
    path = Path(tar)
    if not path.is_file():
        raise DataError(f"{path}: no such shard; rebuild it with `dit-fast shards build`")
    index = scan_tar(path)
    write_atomic(index_path(path), index_to_bytes(index))
    return index
