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
    """(file descriptors, offsets, lengths, crcs, header) of arrays written one after the other."""
    payloads = [npy_bytes(array) for array in arrays]
    path = tmp_path / "members"
    path.write_bytes(b"".join(payloads))
    lengths = np.array([len(data) for data in payloads], np.uint32)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.uint64)
    stream = io.BytesIO(payloads[0])
    np.lib.format.read_magic(stream)
    np.lib.format.read_array_header_1_0(stream)
    header = payloads[0][: stream.tell()]
    return (
        np.full(len(arrays), os.open(path, os.O_RDONLY), np.int32),
        offsets,
        lengths,
        np.array([zlib.crc32(p) for p in payloads], np.uint32),
        header,
    )


@needs_host
def test_every_finite_half_becomes_the_float_that_numpy_says(tmp_path):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(4, -1)
    files, offsets, lengths, crcs, header = members(halves, tmp_path)
    out, rows, items = np.full(halves.shape, np.nan, np.float32), np.array([2, 0, 3, 1]), halves.shape[1]
    assert _C.host().read_npy(files, offsets, lengths, crcs, rows, True, header, True, items, out) == 4
    assert np.array_equal(out[rows].view(np.uint32), halves.astype(np.float32).view(np.uint32))


@needs_host
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_integers_come_as_they_are(tmp_path, dtype):
    arrays = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (5, 7), dtype)
    files, offsets, lengths, crcs, header = members(arrays, tmp_path)
    out, rows = np.zeros_like(arrays), np.array([4, 2, 0, 1, 3])
    assert _C.host().read_npy(files, offsets, lengths, crcs, rows, True, header, False, 7, out) == 5
    assert np.array_equal(out[rows], arrays)
    with pytest.raises(ValueError, match="out must be"):
        _C.host().read_npy(files, offsets, lengths, crcs, rows, True, header, True, 7, out)


@needs_host
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_it_stops_at_the_first_sample_that_is_not_right(tmp_path, dtype):
    arrays = np.arange(40, dtype=dtype).reshape(5, 8)
    arrays[:, 0], arrays[:, 7], arrays[:, 1] = -1, -0.0, np.finfo(dtype).min  # the first half may have any sign
    files, offsets, lengths, crcs, header = members(arrays, tmp_path)
    crcs[3] ^= 1

    def read(check, signless=4):
        out = np.zeros((5, 8), np.float32)
        rows, half = np.arange(5), dtype == np.float16
        return _C.host().read_npy(files, offsets, lengths, crcs, rows, check, header, half, signless, out), out

    done, out = read(True)
    assert done == 3
    assert np.array_equal(out[:3], arrays[:3].astype(np.float32))
    assert not out[3:].any()
    done, out = read(False)
    assert done == 5
    assert np.array_equal(out, arrays.astype(np.float32))
    assert read(False, 0)[0] == 0
    for place, value in ((0, np.nan), (3, np.inf), (3, -np.inf), (6, np.nan), (6, np.inf), (6, -np.finfo(dtype).tiny)):
        damaged = arrays.copy()
        damaged[2, place] = value
        files, offsets, lengths, crcs, header = members(damaged, tmp_path)
        assert read(True)[0] == 2, (place, value)


@needs_host
def test_buffers_that_do_not_fit_are_refused(tmp_path):
    files, offsets, lengths, crcs, header = members(np.zeros((2, 8), np.float32), tmp_path)
    good = {
        "files": files,
        "rows": np.arange(2),
        "out": np.zeros((2, 8), np.float32),
        "offsets": offsets,
        "signless": 8,
    }
    frozen = np.zeros((2, 8), np.float32)
    frozen.flags.writeable = False
    for change in (
        {"rows": np.array([0, 2])},
        {"rows": np.array([-1, 0])},
        {"rows": np.arange(3)},
        {"files": np.zeros(3, np.int32)},
        {"rows": np.arange(2, dtype=np.int32)},
        {"offsets": offsets.astype(np.int64)},
        {"out": np.zeros((2, 8))},
        {"out": np.zeros((2, 16), np.float32)[:, ::2]},
        {"out": np.zeros(16, np.float32)},
        {"out": frozen},
        {"signless": 9},
        {"signless": -1},
    ):
        now = good | change
        with pytest.raises(ValueError, match=r"must|writeable"):
            _C.host().read_npy(
                now["files"], now["offsets"], lengths, crcs, now["rows"], True, header, False, now["signless"],
                now["out"],
            )  # fmt: skip


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
