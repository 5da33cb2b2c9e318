"""Writing and scanning tar shards: uncompressed, deterministic, readable by any WebDataset user.

Samples are numbered over the whole data set; sample 1234 has the members `000001234.moments.npy` (mean and std,
[2, C, h, w]), `000001234.cls` (label in decimal) and one more for each further field. A field that is added later lies
in tars of its own, as `000001234.NAME.npy` alone. Modification time, owner and mode are fixed, so equal samples give
equal bytes.
"""

import hashlib
import io
import math
import os
import re
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dit_fast.data.address import reading
from dit_fast.data.index import ShardIndex, layout
from dit_fast.errors import DataError

KEY_DIGITS = 9
LABEL_MEMBER = "cls"
MOMENTS_MEMBER = "moments.npy"


def key_of(sample: int) -> str:
    """Key of a sample: its number in the whole data set, nine digits."""
    return f"{sample:0{KEY_DIGITS}d}"


def npy_bytes(array: np.ndarray) -> bytes:
    """A `.npy` file (format 1.0, C order, no pickle) in memory."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([^'\n]{1,20})', 'fortran_order': (False|True), "
    rb"'shape': \(((?:\d{1,20}(?:, \d{1,20})*,?)?)\), \} *\n",
    re.DOTALL,
)


def parse_npy(data: bytes, shape: tuple[int, ...], dtype: str, name: str) -> np.ndarray:
    """The array of a `.npy` payload (a view of `data`), which must be of this shape and dtype, in C order.

    numpy's own parser is not used: it evaluates the header and takes what that claims for true. Raises DataError naming
    `name`.
    """
    start = 10 + int.from_bytes(data[8:10], "little")
    header = _NPY_HEADER.fullmatch(data[:start])
    if header is None:
        raise DataError(f"{name} is not a readable npy array (damaged header); restore or rebuild the shard")
    descr, order, sides = (part.decode("latin-1") for part in header.groups())
    found = tuple(int(side) for side in sides.split(",") if side.strip())
    if found != shape or descr != np.dtype(dtype).str or order == "True":
        raise DataError(
            f"{name} is {found} {descr!a}{' in Fortran order' * (order == 'True')} where dataset.json says {shape} "
            f"{dtype}; restore or rebuild the shard"
        )
    count = math.prod(shape)
    if len(data) != start + count * np.dtype(dtype).itemsize:
        raise DataError(f"{name}: {len(data)} bytes do not fit an array of shape {shape} {dtype}; rebuild the shard")
    return np.frombuffer(data, dtype, count=count, offset=start).reshape(shape)


class ShardWriter:
    """Writes a tar, sample by sample, to an open file, and knows its index."""

    def __init__(self, file: BinaryIO, members: tuple[str, ...], first_key: int):
        self.members, self.first_key, self._file = members, first_key, file
        self._rows: list[list[tuple[int, int, int]]] = []
        self._labels: list[int] = []
        self._position = 0
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Hex sha256 of the bytes written so far."""
        return self._digest.hexdigest()

    def add(self, payload: Mapping[str, bytes], label: int | None = None) -> None:
        """Appends the next sample. `payload`: member -> bytes for all members but the label's; None: it has none."""
        key, row = key_of(self.first_key + len(self._rows)), []
        full = dict(payload) if label is None else {**payload, LABEL_MEMBER: str(label).encode("ascii")}
        for member in self.members:
            data = full[member]
            self._write(member_header(f"{key}.{member}", len(data)))
            row.append((self._position, len(data), zlib.crc32(data)))
            self._write(data + b"\0" * (-len(data) % tarfile.BLOCKSIZE))
        self._rows.append(row)
        self._labels.append(label or 0)

    def finish(self) -> ShardIndex:
        """Writes the end mark; returns the index."""
        self._write(b"\0" * (2 * tarfile.BLOCKSIZE))
        return _index(self.first_key, self._position, self.members, self._rows, self._labels)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._position += len(data)


def _index(
    first_key: int,
    tar_bytes: int,
    members: tuple[str, ...],
    rows: Sequence[Sequence[tuple[int, int, int]]],
    labels: Sequence[int],
) -> ShardIndex:
    """rows: (offset, length, crc32) of each member of each sample."""
    table = np.array(rows, np.uint64).reshape(len(rows), len(members), 3)
    offset, length, crc = table[..., 0], table[..., 1].astype(np.uint32), table[..., 2].astype(np.uint32)
    return ShardIndex(first_key, tar_bytes, members, offset, length, crc, np.array(labels, np.int32))


def member_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member's payload."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o644
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return info.tobuf(tarfile.USTAR_FORMAT)


def scan_tar(path: Path) -> ShardIndex:
    """Builds the index of a tar by reading it from start to end.

    Raises DataError when the tar is truncated or damaged or holds anything but plain files, when keys are not
    consecutive numbers, when samples differ in their members, or when a label is not a number.
    """
    rows: list[dict[str, tuple[int, int, int]]] = []
    labels: list[int] = []
    first_key = 0
    try:
        with reading(str(path)), open(path, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            size = os.fstat(raw.fileno()).st_size
            for member in tar:
                found = re.fullmatch(r"(\d{9,18})\.([\w.]+)", member.name, re.ASCII)
                plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.pax_headers
                if not found or not plain:
                    raise DataError(
                        f"{path}: member {member.name!a} is not a plain file of the form 000001234.name; "
                        "rebuild the shard"
                    )
                key, suffix = found.groups()
                first_key = first_key if rows else int(key)
                if key == key_of(first_key + len(rows)):
                    rows.append({})
                elif key != key_of(first_key + len(rows) - 1):
                    raise DataError(f"{path}: sample {key} is out of sequence; rebuild the shard")
                if suffix in rows[-1] or member.offset_data + member.size > size:
                    raise DataError(f"{path}: member '{member.name}' is cut short or repeated; rebuild the shard")
                data = os.pread(raw.fileno(), member.size, member.offset_data)
                rows[-1][suffix] = (member.offset_data, member.size, zlib.crc32(data))
                if suffix == LABEL_MEMBER:
                    if not re.fullmatch(rb"\d{1,9}", data):
                        raise DataError(f"{path}: the label of sample {key} is not a number; rebuild the shard")
                    labels.append(int(data))
            tail = os.pread(raw.fileno(), 2 * tarfile.BLOCKSIZE, tar.offset)
    except DataError:
        raise
    except Exception as error:  # tarfile raises many kinds for damaged headers
        raise DataError(
            f"{path}: damaged tar ({type(error).__name__}); rebuild the shard with `dit-fast shards build`"
        ) from None
    # a tar cut between two members, or with a damaged header, reads as a shorter tar: only the end mark tells
    if len(tail) < 2 * tarfile.BLOCKSIZE or any(tail):
        raise DataError(
            f"{path}: tar is damaged or cut after {len(rows)} samples; rebuild it with `dit-fast shards build`"
        )
    members = tuple(rows[0]) if rows else ()
    for number, row in enumerate(rows):
        if tuple(row) != members:
            raise DataError(f"{path}: sample {key_of(first_key + number)} has members {sorted(row)}; rebuild the shard")
    table = [[row[member] for member in members] for row in rows]
    index = _index(first_key, size, members, table, labels or [0] * len(rows))
    places, length = layout(index.length)
    if not rows or length != size or not np.array_equal(places, index.offset):
        raise DataError(
            f"{path}: holds {len(rows)} samples and something between or behind them; rebuild it with "
            "`dit-fast shards build`"
        )
    return index
