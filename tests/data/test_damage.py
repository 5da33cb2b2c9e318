"""Whatever is done to the files: the right samples, or one line that names the file. Nothing is believed unchecked."""

import json
import math
import multiprocessing
import os
import resource
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from dit_fast import _C
from dit_fast.cli import main
from dit_fast.data import open_dataset
from dit_fast.data.index import index_from_bytes, index_to_bytes
from dit_fast.data.reader import IndexedReader
from dit_fast.data.shards import scan_tar
from dit_fast.errors import DataError
from dit_fast.preparation.verify import rebuild_index, verify_dataset
from tests.helpers.cases import refused
from tests.helpers.damage import READERS, attack, flip, read, replace_member
from tests.helpers.shard_sets import CLASSES, rewrite

SHARD = "shard-000001.tar"


def test_random_damage_gives_the_right_samples_or_one_line(built, tmp_path):
    assert attack(built, tmp_path, range(24)) == []


@pytest.mark.long
def test_much_random_damage(built, tmp_path):
    assert attack(built, tmp_path, range(100, 400)) == []


@pytest.mark.parametrize("reader", READERS)
def test_every_bit_of_an_array_header(copied, reader):
    """With the crc the flip is found; without it the header is parsed, and what it says is not believed."""
    tar, dataset = copied / SHARD, open_dataset(copied)
    start, truth = int(dataset.indexes[1].offset[2, 0]), read(copied, reader)
    for bit in range(8 * start, 8 * (start + 128), 7 if reader == "python" else 61):
        flip(tar, bit)
        assert f"{SHARD}: 000000010.moments.npy is corrupt" in refused(read, copied, reader)
        try:
            right, said = np.array_equal(read(copied, reader, False)["moments"], truth["moments"]), ""
        except DataError as error:
            right, said = False, str(error)
        assert right or f"{SHARD}: 000000010.moments.npy" in said
        flip(tar, bit)


def legal(folder, change, member="moments.npy"):
    """Changes one member of sample 10, with every checksum right."""
    index = open_dataset(folder).indexes[1]
    column = index.members.index(member)
    start, length = int(index.offset[2, column]), int(index.length[2, column])
    data = (folder / SHARD).read_bytes()[start : start + length]
    replace_member(folder, folder / SHARD, 2, column, change(data))


def with_value(place, value):
    def change(data):
        array = np.frombuffer(data[128:], np.float16).copy()
        array[place] = value
        return data[:128] + array.tobytes()

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_value(0, np.nan), "holds NaN or Inf"),
        (with_value(-1, -np.inf), "holds NaN or Inf"),
        (with_value(-1, -6e-8), "holds a negative standard deviation"),
        (
            lambda data: data.replace(b"<f2", b"<i2"),
            "is (2, 12, 4, 4) '<i2' where dataset.json says (2, 12, 4, 4) float16",
        ),
        (lambda data: data.replace(b"<f2", b">f2"), "is (2, 12, 4, 4) '>f2' where dataset.json says"),
        (lambda data: data.replace(b"False", b"True "), "is not a readable npy array"),
        (lambda data: data.replace(b"(2, 12, ", b"(2, 99, "), "is (2, 99, 4, 4)"),
        (lambda data: data.replace(b", 4, 4)", b"99999) "), "is not a readable npy array"),
    ],
    ids=["nan", "inf", "std", "int", "big-endian", "fortran", "shape", "count"],
)
def test_values_and_types_that_no_autoencoder_gives(copied, change, words):
    legal(copied, change)
    said = {refused(read, copied, reader) for reader in READERS} | {refused(verify_dataset, copied)}
    (message,) = said  # the same words everywhere
    assert f"{SHARD}: 000000010.moments.npy {words}" in message


def test_images_of_another_kind_are_not_converted(copied):
    """A grey one, a deep one and one that claims a size: Pillow would take them all."""
    original = (copied / SHARD).read_bytes()
    for header in (b"\0\0\0\x10\0\0\0\x10\x08\0", b"\0\0\0\x10\0\0\0\x10\x10\x02", b"\0\1\0\0\0\1\0\0\x08\x02"):
        legal(copied, lambda data, header=header: with_header(data, header), "png")
        (message,) = {refused(read, copied, reader) for reader in READERS}
        assert f"{SHARD}: 000000010.png is not a PNG of 8-bit RGB and 16x16 pixels" in message
        (copied / SHARD).write_bytes(original)


def with_header(data, header):
    chunk = b"IHDR" + header + data[26:29]
    return data[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[33:]


PNG = {"member": "png", "shape": [3, 16, 16], "dtype": "uint8", "source": ""}
FIELD_JUNK = (
    {"member": "exe"}, {"member": 1}, {"shape": [3, 16]}, {"shape": [3, 16, 8]}, {"shape": [1] * 9},
    {"dtype": "float16"}, {"shape": "3"}, {"source": None}, {"shape": [3, 10**9, 10**9]},
    {"dtype": "float64"}, {"shards": []}, {"shards": 3},
)  # fmt: skip
JUNK = {
    "num_classes": (True, "3", 3.0, 0, -1, None, 10**12, math.nan, [3]),
    "class_names": ("abc", ["a"], ["a", "b", 3], None, [["a", "b", "c"]]),
    "latent_shape": ([12, 4], [12, 4, 10**9], [12, -4, -4], [12.0, 4, 4], "444", [65536, 65536, 65536]),
    "scale": (math.nan, 0, -1, math.inf, True, "1", None, [1.0], [1.0] * 11 + [0.0], 10**400),
    "shift": (math.nan, -math.inf, "0", [0.0], {}),
    "dtype": ("float64", "f2", None, 16),
    "fields": (
        None,
        [],
        {"image": 3},
        {"Image": PNG},
        {"label": PNG},
        {"shard": PNG},
        {"a": PNG, "b": PNG},
        *({"image": {**PNG, **change}} for change in FIELD_JUNK),
    ),
    "statistics": ([], {"mean": [1.0]}, {"mean": [math.nan] * 12, "std": [1.0] * 12}),
    "autoencoder": (None, "pca", {"spec": 3, "identity": "x"}),
    "shards": ({}, [], [1], None),
    "num_samples": (44, "43", True, -1),
}


@pytest.mark.parametrize("field", JUNK)
def test_every_field_of_the_description_has_a_type_and_a_range(copied, field):
    original = json.loads((copied / "dataset.json").read_bytes())[field]
    for value in (*JUNK[field], "absent"):
        rewrite(
            copied,
            lambda content, value=value: (
                content.pop(field, None) if value == "absent" else content.update({field: value})
            ),
        )
        message = refused(open_dataset, copied)
        assert f"{copied}/dataset.json: " in message, value
        assert field in message, value
        rewrite(copied, lambda content: content.update({field: original}))
    open_dataset(copied)


JUNK_BEFORE = {
    "members": ("cls", ["cls"], ["moments.npy", "cls"], ["moments.npy", "cls", "png", "exe"], [1]),
    "image_size": (None, "16", 0, 10**9),
    "features": (3, {"encoder": "e", "shape": [1, 2]}, []),
}


def as_before(content):
    """A description with images as version 1 wrote it."""
    del content["fields"]
    content |= {"version": 1, "members": ["moments.npy", "cls", "png"], "image_size": 16, "features": None}


def test_what_was_written_before_fields_were_declared(copied):
    today = open_dataset(copied).info
    rewrite(copied, as_before)
    assert open_dataset(copied).info.fields == today.fields
    verify_dataset(copied)
    original = (copied / "dataset.json").read_bytes()
    for field, values in JUNK_BEFORE.items():
        for value in values:
            rewrite(copied, lambda content, field=field, value=value: content.update({field: value}))
            assert field in refused(open_dataset, copied), value
            (copied / "dataset.json").write_bytes(original)
    before = open_dataset(Path(__file__).parents[1] / "data" / "before_seams" / "shards").info
    assert before.fingerprint == "50b952914c7118054256c1559da2228b23ba3dcb8d5c798fa9aa5682be2af548"
    assert list(before.fields) == ["features"]
    assert before.field("features").source.startswith("efficientnet-lite0-stride16:")


@pytest.mark.parametrize("field", ["name", "samples", "bytes", "sha256"])
def test_the_table_of_shards_too(copied, field):
    for value in (None, True, -1, 1.5, 2**70, [], ""):
        if field == "sha256" and value == "":
            continue  # a wrong hash is found by verify
        rewrite(copied, lambda content, value=value: content["shards"][1].update({field: value}))
        message = refused(open_dataset, copied)
        assert f"{copied}/dataset.json: " in message
    rewrite(copied, lambda content: content["shards"][1].update(content["shards"][0]))
    assert "different names" in refused(open_dataset, copied)


def test_description_that_is_no_json_or_too_deep(copied):
    for data in (b"", b"\xff\xfe", b"[]", b"3", b'"format"', b"[" * 100_000, b'{"format": []}', b"1" * 5000):
        (copied / "dataset.json").write_bytes(data)
        assert "dataset.json: not a data set of dit_fast" in refused(open_dataset, copied)


@pytest.mark.parametrize("number", ["offset", "length", "label", "cls"])
def test_an_index_that_lies_is_refused_before_anything_is_read(copied, number):
    path = (copied / SHARD).with_suffix(".idx")
    index = index_from_bytes(path.read_bytes(), "x")
    if number == "cls":
        index.label[3] = (index.label[3] + 1) % len(CLASSES)
    else:
        getattr(index, number).flat[5] = {"offset": 2**40, "length": 2**32 - 1, "label": -1}[number]
    path.write_bytes(index_to_bytes(index))
    message = refused(open_dataset, copied)
    assert SHARD[:-4] in message
    assert "dit-fast shards index" in message or "outside 0..2" in message


def test_an_index_of_a_damaged_tar_is_never_made(copied, capsys):
    """Its checksums would make the damage legal, whichever byte it hit."""
    index, before = open_dataset(copied).indexes[1], (copied / SHARD).with_suffix(".idx").read_bytes()
    flip(copied / SHARD, 8 * (int(index.offset[3, 0]) + 300))
    (copied / SHARD).with_suffix(".idx").unlink()
    (copied / "shard-000000.tar").unlink()
    (copied / "shard-000002.idx").unlink()
    assert "sha256 differs from dataset.json" in refused(rebuild_index, copied / SHARD)
    assert main(["shards", "index", str(copied)]) != 0
    out, err = capsys.readouterr()
    assert "shard-000000.tar: no such shard" in err
    assert "the first of 2 shards" in err
    assert f"{SHARD}: sha256 differs" in out
    assert (copied / "shard-000002.idx").exists()  # the others get theirs
    assert not (copied / SHARD).with_suffix(".idx").exists()
    flip(copied / SHARD, 8 * (int(index.offset[3, 0]) + 300))
    rebuild_index(copied / SHARD)
    assert (copied / SHARD).with_suffix(".idx").read_bytes() == before
    stray = (copied / SHARD).rename(copied / "other.tar")
    assert "dataset.json does not name this shard" in refused(rebuild_index, stray)
    (copied / "dataset.json").unlink()
    assert "dataset.json: missing" in refused(rebuild_index, stray)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda info: setattr(info, "type", tarfile.SYMTYPE), "not a plain file"),
        (lambda info: setattr(info, "type", tarfile.CHRTYPE), "not a plain file"),
        (lambda info: setattr(info, "type", tarfile.GNUTYPE_SPARSE), "not a plain file|damaged tar"),
        (lambda info: setattr(info, "size", 58 << 40), "cut short|damaged tar"),
        (lambda info: setattr(info, "pax_headers", {"GNU.sparse.major": "1"}), "not a plain file"),
        (lambda info: setattr(info, "name", "000000002.cls"), "out of sequence"),
        (lambda info: setattr(info, "name", "1.cls"), "not a plain file"),
        (lambda info: setattr(info, "name", "000000000.moments.npy"), "cut short or repeated"),
    ],
)
def test_tars_with_other_members_get_no_index(tmp_path, change, words):
    path = tmp_path / "s.tar"
    with open(path, "wb") as file:
        for name in ("000000000.moments.npy", "000000000.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            if name.endswith("cls"):
                change(info)
            form = tarfile.PAX_FORMAT if info.pax_headers else tarfile.GNU_FORMAT
            file.write(info.tobuf(form) + b"1" + bytes(511))
        file.write(bytes(1024))
    with pytest.raises(DataError, match=words):
        scan_tar(path)
    path.write_bytes(bytes(1024))
    assert "holds 0 samples" in refused(scan_tar, path)


def test_verify_checks_every_shard_and_says_each_problem_once(copied, capsys):
    legal(copied, with_value(3, np.inf))  # shard 1
    flip(copied / "shard-000002.tar", 8 * 5000)
    (copied / "shard-000003.idx").write_bytes(b"junk")
    (copied / "shard-000004.tar").unlink()
    (copied / "autoencoder.safetensors").write_bytes(b"junk")
    assert main(["shards", "verify", str(copied)]) != 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(": ok")] == ["shard-000000.tar: ok", "shard-000005.tar: ok"]
    bad = [line for line in lines if not line.endswith(": ok")]
    assert len(bad) == 5
    for line, words in zip(
        bad,
        ("holds NaN or Inf", "sha256 differs", "not a shard index", "shard is missing", "autoencoder.safetensors"),
        strict=True,
    ):
        assert words in line


def test_files_that_the_disk_refuses_are_one_line(copied, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    dataset = open_dataset(copied)
    monkeypatch.setattr(os, "pread", broken)
    monkeypatch.setattr(_C, "host", lambda: None)
    message = refused(IndexedReader(dataset).read, np.arange(2), np.arange(2))
    assert message.endswith("shard-000000.tar: 000000000.moments.npy cannot be read (Input/output error)")
    monkeypatch.setattr("builtins.open", broken)
    assert "cannot be read (Input/output error)" in refused(open_dataset, copied)


def test_a_data_set_that_moved_is_told_with_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(open_dataset, "data/shards")
    assert str(tmp_path / "data" / "shards") in message
    assert "no such folder" in message
    assert "--data FOLDER" in message
    (tmp_path / "file").write_text("")
    assert "is a file, not a folder" in refused(open_dataset, "file")
    for root in ("", "a\0b", "https:/host/x", "http://", "HTTP://[", "http://h/x#y"):
        refused(open_dataset, root)


def read_with_few_files(folder):
    os.closerange(3, 4096)
    resource.setrlimit(resource.RLIMIT_NOFILE, (10, 10))
    dataset = open_dataset(folder)
    reader, order = IndexedReader(dataset, dataset.info.fields), np.random.default_rng(0).permutation(len(dataset))
    for part in np.array_split(order, 10):
        reader.read(part, part)
    os._exit(len(reader._files))


def test_open_files_are_bounded(built):
    """Six shards, and a process that may have ten files open, three of them its own."""
    read(built, "compiled")  # what is imported later needs files too
    process = multiprocessing.get_context("fork").Process(target=read_with_few_files, args=(built,))
    process.start()
    process.join()
    assert process.exitcode == 5
