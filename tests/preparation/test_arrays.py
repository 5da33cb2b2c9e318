"""Array data sets: shapes, labels, names, and archives that are not what they claim."""

import zipfile

import numpy as np
import pytest

from dit_fast.errors import DataError
from dit_fast.preparation.sources import open_source

GREY = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8)
LABELS = np.array([0, 1, 2, 1])


def write(path, **arrays):
    np.savez_compressed(path, **{"images": GREY, "labels": LABELS, **arrays})
    return open_source(path)


def test_grey_is_repeated_and_resized(tmp_path):
    source = write(tmp_path / "a.npz")
    assert (source.read(0, 8) == GREY[0][..., None]).all()
    assert source.read(0, 16).shape == (16, 16, 3)
    assert (source.class_names, source.labels.tolist()) == (("0", "1", "2"), LABELS.tolist())


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": np.asfortranarray(GREY)},
        {"labels": LABELS.astype(">i2")},
        {"labels": LABELS.astype(np.uint64)},
        {"class_names": np.array([b"0", b"1", b"2"])},
    ],
)
def test_layout_and_byte_order_change_nothing(tmp_path, arrays):
    plain, other = write(tmp_path / "a.npz"), write(tmp_path / "b.npz", **arrays)
    assert other.digest == plain.digest
    assert np.array_equal(other.read(3, 8), plain.read(3, 8))


def test_the_digest_sees_images_labels_and_names(tmp_path):
    sources = [
        write(tmp_path / "a.npz"),
        write(tmp_path / "a.npz", images=GREY ^ np.uint8(1)),
        write(tmp_path / "a.npz", labels=np.array([0, 1, 2, 2])),
        write(tmp_path / "a.npz", class_names=np.array(["ant", "bee", "cat"])),
    ]
    assert len({source.digest for source in sources}) == 4


def test_named_classes_may_lack_images_and_are_noted(tmp_path):
    source = write(tmp_path / "a.npz", class_names=np.array(["ant", "bee", "cat", "dog"]))
    assert source.class_names == ("ant", "bee", "cat", "dog")
    assert source.notes == [f"{tmp_path}/a.npz: 1 of 4 named classes have no images: 'dog'"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": GREY.astype(np.uint16)}, r"images are uint16 \(4, 8, 8\), expected uint8"),
        ({"images": GREY[..., None]}, "expected uint8"),
        ({"images": GREY[:, :, :0]}, "hold no pixels"),
        ({"images": GREY[:0], "labels": LABELS[:0]}, "hold no pixels"),
        ({"images": np.array([{}], dtype=object)}, "images.npy holds Python objects"),
        ({"labels": LABELS[:3]}, r"labels are int64 \(3,\), expected integers \[4\]"),
        ({"labels": LABELS[:, None]}, r"labels are int64 \(4, 1\)"),
        ({"labels": LABELS.astype(float)}, "labels are float64"),
        ({"labels": LABELS + 1}, "no image has label 0"),
        ({"labels": LABELS * 2}, "no image has label 1"),
        ({"labels": LABELS * 2**33}, "no image has label 1"),
        ({"labels": LABELS.astype(np.uint64) * np.uint64(2**63)}, "no image has label 1"),
        ({"labels": LABELS - 1}, r"-1..1, outside 0"),
        ({"labels": LABELS + 1, "class_names": np.array(["a", "b", "c"])}, r"1..3, outside 0..2"),
        ({"class_names": np.array(["a", "b", "a"])}, "class_names hold 'a' twice"),
        ({"class_names": np.array([b"a", b"\xff", b"c"])}, "not UTF-8"),
        ({"class_names": np.array(["a", "\udcff", "c"])}, r"class name '.udcff': not UTF-8"),
        ({"class_names": np.arange(3)}, "class_names are int64"),
        ({"class_names": np.array("abc")}, r"class_names are <U3 \(\)"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, arrays, message):
    with pytest.raises(DataError, match=f"a.npz: .*{message}") as caught:
        write(tmp_path / "a.npz", **arrays)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-30], "not a readable npz"),
        (lambda data: data[:200], "not a readable npz"),
        (lambda data: b"PK" + bytes(50), "not a readable npz"),
        (lambda data: b"", "not a readable npz"),
        (lambda data: data.replace(bytes(range(64)), bytes(64)), ".*Bad CRC-32"),
    ],
)
def test_damaged_archives_are_refused(tmp_path, damage, message):
    np.savez(tmp_path / "a.npz", images=GREY, labels=LABELS)
    (tmp_path / "a.npz").write_bytes(damage((tmp_path / "a.npz").read_bytes()))
    with pytest.raises(DataError, match=f"a.npz: {message}") as caught:
        open_source(tmp_path / "a.npz")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (b"(4, 8, 8888888888)", "its header claims"),
        (b"(4, -8, -8)", "its header claims"),
        (b"(4, 8, 8.0)", "damaged npy header"),
        (b"((((((((((", "damaged npy header"),
    ],
)
def test_a_header_is_not_believed(tmp_path, shape, message):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': %s}" % shape
    header = header.ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + GREY.tobytes())
    with pytest.raises(DataError, match=rf"a.npz: images\.npy {message}"):
        open_source(tmp_path / "a.npz")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_array_that_is_there_twice_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=GREY, labels=LABELS)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("labels.npy", archive.read("labels.npy"))
    with pytest.raises(DataError, match=r"a.npz: holds labels\.npy more than once"):
        open_source(tmp_path / "a.npz")


def test_a_member_that_claims_more_than_it_can_hold_is_refused_unread(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", images=GREY, labels=LABELS)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        size = archive.getinfo("images.npy").file_size
    data = (tmp_path / "a.npz").read_bytes()
    where = data.index(b"PK\1\2") + 24  # the central directory's word on the first member's size
    assert int.from_bytes(data[where : where + 4], "little") == size
    (tmp_path / "a.npz").write_bytes(data[:where] + (3 << 30).to_bytes(4, "little") + data[where + 4 :])
    with pytest.raises(DataError, match=r"images\.npy claims 3221225472 bytes in"):
        open_source(tmp_path / "a.npz")
