"""The compiled shard reader gives the same batches and the same errors as Python's, and is absent without harm."""

import io
import os
import zlib

import numpy as np
import pytest
import torch

from dit_fast import _C
from dit_fast._C import build
from dit_fast.data import open_dataset
from dit_fast.data.reader import IndexedReader
from dit_fast.data.shards import npy_bytes
from dit_fast.errors import DataError

needs_host = pytest.mark.skipif(_C.host_unavailable() is not None, reason=f"{_C.host_unavailable()}")


@pytest.fixture
def in_python(monkeypatch):
    """Switches the compiled reader off and on again."""
    compiled = _C.host()

    def switch(off):
        monkeypatch.setattr(_C, "host", lambda: None if off else compiled)

    return switch


def read_both(folder, samples, in_python, change=lambda dataset: None, **options):
    """What both readers return, a batch or the text of a DataError."""
    results, dataset = [], open_dataset(folder)
    change(dataset)  # opened before: opening looks at the sizes itself
    for off in (True, False):
        in_python(off)
        try:
            results.append(IndexedReader(dataset, ("image",), **options).read(np.arange(len(samples)), samples))
        except DataError as error:
            results.append(str(error))
    return results


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@needs_host
def test_batches_are_equal_bit_for_bit(built, in_python):
    order = np.random.default_rng(0).permutation(43)
    for samples in (order, order[:1], np.array([5, 5, 41, 5])):
        theirs, ours = read_both(built, samples, in_python)
        assert equal(ours, theirs)


@needs_host
def test_the_compiled_code_is_what_reads(built, in_python, monkeypatch):
    """Python reads one sample, from which the layout is learnt, and no more."""
    dataset, read = open_dataset(built), []
    reader = IndexedReader(dataset)
    put = reader._put
    monkeypatch.setattr(reader, "_put", lambda *arguments: read.append(arguments[1:]) or put(*arguments))
    reader.read(np.arange(20), np.arange(20))
    reader.read(np.arange(20), np.arange(20, 40))
    assert len(read) == 1


@needs_host
@pytest.mark.parametrize("check_crc", [True, False])
def test_a_tar_cut_since_it_was_opened_is_told_in_the_same_words(copied, in_python, check_crc):
    def cut(dataset):
        start = int(dataset.indexes[1].offset[3, dataset.indexes[1].members.index("moments.npy")])
        os.truncate(f"{dataset.root}/{dataset.info.shards[1].name}", start + 40)

    theirs, ours = read_both(copied, np.arange(43), in_python, cut, check_crc=check_crc)
    assert "000000011.moments.npy has 40 bytes where the index says" in theirs
    assert ours == theirs


def members(arrays, tmp_path):
    """(file descriptor, 1, offsets, lengths, crcs) of arrays written one after the other, and their header; the tables
    have another member first, which is nowhere."""
    payloads = [npy_bytes(array) for array in arrays]
    path = tmp_path / "members"
    path.write_bytes(b"".join(payloads))
    lengths = np.array([len(data) for data in payloads], np.uint32)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.uint64)
    stream = io.BytesIO(payloads[0])
    np.lib.format.read_magic(stream)
    np.lib.format.read_array_header_1_0(stream)
    header = payloads[0][: stream.tell()]
    tables = offsets, lengths, np.array([zlib.crc32(p) for p in payloads], np.uint32)
    return (os.open(path, os.O_RDONLY), 1, *(np.stack([each + 1, each], 1) for each in tables)), header


def decode(shard, places, *rest):
    """`read_npy` of a shard's first samples, by both kinds of instructions; their number."""
    slots, rows, out = np.zeros_like(places), np.arange(len(places)), rest[-1]
    portable = np.full_like(out, 77)
    counts = [
        _C.host().read_npy([shard], slots, rows, places, *rest[:-1], into, quick)
        for quick, into in ((False, portable), (True, out))
    ]
    done = places[: counts[0]]
    assert counts[0] == counts[1]
    assert np.array_equal(portable[done].view(np.uint8), out[done].view(np.uint8))
    return counts[0]


@needs_host
def test_every_finite_half_becomes_the_float_that_numpy_says(tmp_path):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(4, -1)
    shard, header = members(halves, tmp_path)
    out, places, items = np.full(halves.shape, np.nan, np.float32), np.array([2, 0, 3, 1]), halves.shape[1]
    assert decode(shard, places, True, header, True, items, out) == 4
    assert np.array_equal(out[places].view(np.uint32), halves.astype(np.float32).view(np.uint32))


@needs_host
def test_checksums_of_every_length(tmp_path):
    for length in (*range(1, 280), 1000, 4099):
        array = np.random.default_rng(length).integers(0, 256, (1, length), np.uint8)
        shard, header = members(array, tmp_path)
        out = np.zeros_like(array)
        assert decode(shard, np.array([0]), True, header, False, length, out) == 1
        shard[4][0, 1] ^= 1 << length % 32
        assert decode(shard, np.array([0]), True, header, False, length, out) == 0
        os.close(shard[0])


@needs_host
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_integers_come_as_they_are(tmp_path, dtype):
    arrays = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (5, 7), dtype)
    shard, header = members(arrays, tmp_path)
    out, places = np.zeros_like(arrays), np.array([4, 2, 0, 1, 3])
    assert decode(shard, places, True, header, False, 7, out) == 5
    assert np.array_equal(out[places], arrays)
    with pytest.raises(ValueError, match="out must be"):
        decode(shard, places, True, header, True, 7, out)


@needs_host
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_it_stops_at_the_first_sample_that_is_not_right(tmp_path, dtype):
    arrays = np.arange(250, dtype=dtype).reshape(5, 50)  # not a whole number of vectors, in neither part
    arrays[:, 0], arrays[:, 29], arrays[:, 1] = -1, -0.0, np.finfo(dtype).min  # the first part may have any sign
    shard, header = members(arrays, tmp_path)
    shard[4][3] ^= 1

    def read(check, signless=20):
        out = np.zeros((5, 50), np.float32)
        return decode(shard, np.arange(5), check, header, dtype == np.float16, signless, out), out

    done, out = read(True)
    assert done == 3
    assert np.array_equal(out[:3], arrays[:3].astype(np.float32))
    assert not out[3:].any()
    done, out = read(False)
    assert done == 5
    assert np.array_equal(out, arrays.astype(np.float32))
    assert read(False, 0)[0] == 0
    least = np.nextafter(dtype(0), dtype(-1))
    for place in range(2, 50):
        for value in (np.nan, np.inf, -np.inf, *([least] if place >= 20 else [])):
            damaged = arrays.copy()
            damaged[2, place] = value
            shard, header = members(damaged, tmp_path)
            assert read(True)[0] == 2, (place, value)
            os.close(shard[0])


@needs_host
def test_buffers_that_do_not_fit_are_refused(tmp_path):
    (file, member, *tables), header = members(np.zeros((2, 8), np.float32), tmp_path)
    offset, length, crc = tables
    frozen = np.zeros((2, 8), np.float32)
    frozen.flags.writeable = False
    good = {
        "shards": [(file, member, *tables)],
        "slots": np.zeros(2, np.int64),
        "rows": np.arange(2),
        "places": np.arange(2),
        "signless": 8,
        "out": np.zeros((2, 8), np.float32),
    }

    def read(**change):
        now = good | change
        order = (now[name] for name in ("shards", "slots", "rows", "places"))
        return _C.host().read_npy(*order, True, header, False, now["signless"], now["out"])

    assert read() == 2
    for change in (
        {"places": np.array([0, 2])},
        {"places": np.array([-1, 0])},
        {"places": np.arange(3)},
        {"rows": np.array([0, 2])},
        {"rows": np.array([-1, 0])},
        {"rows": np.arange(3)},
        {"rows": np.arange(2, dtype=np.int32)},
        {"slots": np.array([0, 1])},
        {"slots": np.array([-1, 0])},
        {"shards": [(file, member, offset, length)]},
        {"shards": [(file, 2, *tables)]},
        {"shards": [(file, -1, *tables)]},
        {"shards": [(file, member, offset.astype(np.int64), length, crc)]},
        {"shards": [(file, member, offset, length[:1], crc)]},
        {"shards": [(file, member, offset, length, crc[:, ::-1])]},
        {"shards": [(file, member, offset[:, 1], length[:, 1], crc[:, 1])]},
        {"out": np.zeros((2, 8))},
        {"out": np.zeros((2, 16), np.float32)[:, ::2]},
        {"out": np.zeros(16, np.float32)},
        {"out": frozen},
        {"signless": 9},
        {"signless": -1},
    ):
        with pytest.raises(ValueError, match=r"must|writeable"):
            read(**change)


def test_without_it_python_reads_and_the_reason_is_said(built, monkeypatch, tmp_path, caplog):
    for cached in (_C.host, _C.host_unavailable):
        cached.cache_clear()
    monkeypatch.setattr(_C, "HOST", tmp_path / "_host.so")
    try:
        with caplog.at_level("INFO", logger="dit_fast"):
            batch = IndexedReader(open_dataset(built)).read(np.arange(3), np.arange(3))
            IndexedReader(open_dataset(built)).read(np.arange(3), np.arange(3))
        assert batch["moments"].isfinite().all()
        (message,) = [record.getMessage() for record in caplog.records]
        assert "shards are read by Python: _host.so is not built" in message
        assert "make native" in message
    finally:
        for cached in (_C.host, _C.host_unavailable):
            cached.cache_clear()


def test_what_cannot_be_built_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "HOST", tmp_path / "_host.so")
    real = build.importlib.util.find_spec
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None if name == "pybind11" else real(name))
    if build.compiler() is None:
        pytest.skip("no compiler")
    with pytest.raises(build.CannotBuild, match="pip install pybind11"):
        build.build_host()
