"""Random damage to a small data set, and the rule that every reader keeps: the right samples, or DataError in one line.

`attack` is what the tests, and whoever looks for more, call.
"""

import hashlib
import json
import math
import shutil
import tarfile
import traceback
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np

from dit_fast import _C, autoencoders
from dit_fast.data import open_dataset
from dit_fast.data.cache import ShardCache
from dit_fast.data.description import description_bytes
from dit_fast.data.index import index_from_bytes, index_to_bytes
from dit_fast.data.reader import IndexedReader
from dit_fast.errors import DataError, UserError
from dit_fast.preparation.verify import verify_dataset

READERS = ("python", "compiled", "stream")
JUNK = (
    None, True, False, -1, 0, 1, 1.5, -0.0, math.nan, math.inf, 1e300, 10**12, 2**31, 2**70, "", "x", "1", "\ud800",
    "../x", "a\nb", [], [1], [[[1]]], [None] * 3, {}, {"a": {"b": []}},
)  # fmt: skip


def attack(folder: Path, scratch: Path, seeds) -> list[str]:
    """Damages a copy of `folder` once per seed; returns what broke the rule, one text each."""
    truth, found = read(folder, "python"), []
    for seed in seeds:
        copy = shutil.copytree(folder, scratch / f"damaged-{seed}")
        what = damage(copy, np.random.default_rng(seed))
        found += [f"seed {seed}, {what}: {problem}" for problem in problems(copy, truth)]
        shutil.rmtree(copy)
    return found


def problems(folder: Path, truth: dict[str, np.ndarray]) -> list[str]:
    """How reading a damaged folder breaks the rule. Without crc other values may come, but no other error."""
    found, said = [], {}
    for reader in READERS:
        for check_crc in (True, False):
            who = f"{reader}{'' if check_crc else ' without crc'}"
            try:
                batch = read(folder, reader, check_crc)
                if check_crc and any(not np.array_equal(batch[name], truth[name]) for name in batch):
                    found.append(f"{who} gives other samples")
            except DataError as error:
                said[reader, check_crc] = str(error)
                if len(str(error).splitlines()) != 1:
                    found.append(f"{who} says more than a line: {error!r}")
            except Exception:
                found.append(f"{who}: {traceback.format_exc()}")
    for check_crc in (True, False):
        if said.get(("python", check_crc)) != said.get(("compiled", check_crc)):
            found.append(f"Python and compiled code differ: {said}")
    for call in (verify_dataset, lambda path: autoencoders.of(open_dataset(path))):
        try:
            call(folder)
            if call is verify_dataset and said.keys() & {(reader, True) for reader in READERS}:
                found.append(f"verify found nothing, a reader did: {said}")
        except UserError as error:
            if len(str(error).splitlines()) != 1:
                found.append(f"says more than a line: {error!r}")
        except Exception:
            found.append(traceback.format_exc())
    return found


def read(folder: Path, reader: str, check_crc: bool = True) -> dict[str, np.ndarray]:
    """Every sample, in order of their numbers."""
    dataset = open_dataset(folder)
    count, fields = len(dataset), tuple(dataset.info.fields)
    every = np.arange(count)
    with mock.patch.object(_C, "host", _C.host if reader != "python" else lambda: None), TemporaryDirectory() as kept:
        cache = ShardCache(kept) if reader == "stream" else None
        batch = IndexedReader(dataset, fields, check_crc, cache).read(every, every)
    names = ("moments", "label", *fields)
    return {name: batch[name].numpy() for name in names}


def damage(folder: Path, rng: np.random.Generator) -> str:
    """Does one random damage to a data set; returns what was done, for messages."""
    kinds = (_flip, _flip_header, _cut, _append, _zero, _swap_files, _swap_samples, _vanish, _header, _json, _index,
             _payload)  # fmt: skip
    return kinds[rng.integers(len(kinds))](folder, rng)


def _file(folder: Path, rng: np.random.Generator) -> Path:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return files[rng.integers(len(files))]


def _tar(folder: Path, rng: np.random.Generator) -> Path:
    tars = sorted(folder.glob("*.tar"))
    return tars[rng.integers(len(tars))]


def _member(path: Path, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(row, column, offset, length) of a random member of a shard."""
    index = index_from_bytes(path.with_suffix(".idx").read_bytes(), "index")
    row, column = int(rng.integers(len(index))), int(rng.integers(len(index.members)))
    return row, column, int(index.offset[row, column]), int(index.length[row, column])


def flip(path: Path, bit: int) -> None:
    """Inverts one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def _flip(folder, rng):
    path = _file(folder, rng)
    bit = int(rng.integers(8 * path.stat().st_size))
    flip(path, bit)
    return f"bit {bit} of {path.name}"


def _flip_header(folder, rng):
    path = _tar(folder, rng)
    bit = 8 * (_member(path, rng)[2] - tarfile.BLOCKSIZE) + int(rng.integers(8 * (tarfile.BLOCKSIZE + 128)))
    flip(path, bit)
    return f"bit {bit} of {path.name}"


def _cut(folder, rng):
    path = _file(folder, rng)
    size = int(rng.integers(path.stat().st_size)) // rng.choice([1, 512, 10**9])
    path.write_bytes(path.read_bytes()[:size])
    return f"{path.name} cut to {size} bytes"


def _append(folder, rng):
    path, kind = _file(folder, rng), int(rng.integers(3))
    path.write_bytes(path.read_bytes() + (bytes(1024), rng.bytes(77), _file(folder, rng).read_bytes())[kind])
    return f"{path.name} with more behind it ({kind})"


def _zero(folder, rng):
    path = _file(folder, rng)
    data = bytearray(path.read_bytes())
    first = int(rng.integers(len(data)))
    data[first : first + 512] = bytes(len(data[first : first + 512]))
    path.write_bytes(data)
    return f"512 bytes from {first} of {path.name} zeroed"


def _swap_files(folder, rng):
    suffix = (".tar", ".idx")[rng.integers(2)]
    first, second = rng.choice(sorted(folder.glob(f"*{suffix}")), 2, replace=False)
    ours, theirs = first.read_bytes(), second.read_bytes()
    first.write_bytes(theirs)
    second.write_bytes(ours)
    return f"{first.name} and {second.name} swapped"


def _swap_samples(folder, rng):
    """Two members of one shard change places, with their headers or without."""
    path = _tar(folder, rng)
    data, head = path.read_bytes(), tarfile.BLOCKSIZE * int(rng.integers(2))
    (_, _, first, length), (_, _, second, other) = sorted((_member(path, rng) for _ in range(2)), key=lambda m: m[2])
    ends = first + length, second + other
    swapped = data[second - head : ends[1]] + data[ends[0] : second - head] + data[first - head : ends[0]]
    if first != second:
        path.write_bytes(data[: first - head] + swapped + data[ends[1] :])
    return f"members at {first} and {second} of {path.name} swapped"


def _vanish(folder, rng):
    path = _file(folder, rng)
    path.unlink()
    if rng.integers(2):
        path.mkdir()
    return f"{path.name} gone or a folder"


def _header(folder, rng):
    """A header that claims another kind or size of member, with its checksum right."""
    path = _tar(folder, rng)
    data, place = bytearray(path.read_bytes()), _member(path, rng)[2] - tarfile.BLOCKSIZE
    kind, size = rng.choice([b"0", b"1", b"2", b"3", b"5", b"7", b"S", b"L", b"x", b"g"]), int(rng.integers(2))
    data[place + 156 : place + 157] = bytes(kind)
    if size:
        claims = (b"77777777777\0", b"\x80" + bytes(3) + b"\0\0\x3a" + bytes(5), b"00000000000\0", b"-0000000001\0")
        data[place + 124 : place + 136] = claims[rng.integers(len(claims))]
    data[place + 148 : place + 156] = b" " * 8
    data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
    path.write_bytes(data)
    return f"header at {place} of {path.name} made {bytes(kind)!r}, size claimed {size}"


def _json(folder, rng):
    """One value of dataset.json becomes another, or goes; the fingerprint is right."""
    path = folder / "dataset.json"
    content = json.loads(path.read_bytes())
    place, trail = content, []
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = keys[rng.integers(len(keys))]
        trail.append(key)
        if not isinstance(place[key], dict | list) or not place[key] or rng.integers(4) == 0:
            break
        place = place[key]
    value = JUNK[rng.integers(len(JUNK))]
    if rng.integers(5) == 0:
        del place[key]
    else:
        place[key] = value
    path.write_bytes(description_bytes(content))
    return f"dataset.json {trail} now {value!r}, or gone"


def _index(folder, rng):
    """One number of an index becomes another; its checksum is right."""
    path = _tar(folder, rng).with_suffix(".idx")
    data = bytearray(path.read_bytes()[:-4])
    place = 8 + 4 * int(rng.integers((len(data) - 8) // 4))
    value = int(rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, int(rng.integers(2**32))]))
    data[place : place + 4] = value.to_bytes(4, "little")
    path.write_bytes(data + zlib.crc32(data).to_bytes(4, "little"))
    return f"{path.name} says {value} at {place}"


def _payload(folder, rng):
    """Values, types and shapes that no autoencoder gives, in a tar that is legal throughout."""
    shards = sorted(folder.glob("shard-*.tar"))
    path, what = shards[rng.integers(len(shards))], int(rng.integers(6))
    index = index_from_bytes(path.with_suffix(".idx").read_bytes(), "index")
    row, column = int(rng.integers(len(index))), index.members.index("moments.npy")
    start, length = int(index.offset[row, column]), int(index.length[row, column])
    data = bytearray(path.read_bytes())
    array = np.frombuffer(data[start + 128 : start + length], np.float16).copy()
    array[rng.integers(len(array))] = (np.nan, np.inf, -np.inf, 1, 1, 1)[what]
    if what == 3:
        array[-1 - rng.integers(len(array) // 2)] = -1
    header = bytes(data[start : start + 128])
    for number, before, after in ((4, b"<f2", b"<i2"), (5, b"(2, 12", b"(3, 12")):
        header = header.replace(before, after) if what == number else header
    replace_member(folder, path, row, column, header + array.tobytes())
    return f"moments of row {row} of {path.name}, kind {what}"


def replace_member(folder: Path, tar: Path, row: int, column: int, payload: bytes) -> None:
    """Puts a payload of the same length into a shard, with its crc in the index and its sha256 in dataset.json."""
    index = index_from_bytes(tar.with_suffix(".idx").read_bytes(), "index")
    start, length = int(index.offset[row, column]), int(index.length[row, column])
    assert len(payload) == length
    data = bytearray(tar.read_bytes())
    data[start : start + length] = payload
    tar.write_bytes(data)
    index.crc[row, column] = zlib.crc32(payload)
    tar.with_suffix(".idx").write_bytes(index_to_bytes(index))
    content = json.loads((folder / "dataset.json").read_bytes())
    added = [field["shards"] for field in content["fields"].values() if "shards" in field]
    for entry in (shard for table in (content["shards"], *added) for shard in table if shard["name"] == tar.name):
        entry["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "dataset.json").write_bytes(description_bytes(content))
