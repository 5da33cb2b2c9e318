"""Class folders: which files count, in which order, and what is refused."""

import os

import pytest
from PIL import Image

from dit_fast.errors import DataError
from dit_fast.preparation.sources import open_source


def put(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value,) * 3).save(path, "PNG")


@pytest.fixture
def tree(tmp_path):
    """Two classes, three images."""
    for name, value in (("b/2.png", 20), ("b/1.PNG", 10), ("a/x/9.png", 90)):
        put(tmp_path / "in" / name, value)
    return tmp_path / "in"


def refused(tree, message, **options):
    with pytest.raises(DataError, match=message) as caught:
        open_source(tree, **options)
    assert str(caught.value).isprintable()


def test_classes_and_files_are_sorted_and_read_on_white(tree):
    source = open_source(tree)
    assert source.class_names == ("a", "b")
    assert source.files == ["a/x/9.png", "b/1.PNG", "b/2.png"]
    assert source.labels.tolist() == [0, 1, 1]
    assert source.notes == []
    assert (source.read(0, 8) == 90).all()
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tree / "b" / "2.png")
    assert (source.read(2, 8) == 255).all()
    (tree / "b" / "2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b/2.png: not a readable image"):
        source.read(2, 8)


def test_the_order_is_torchvisions(tree):
    for name in ("a/x-y/0.png", "a/0.png", "a/x/B.png", "a/x/a.png", "B/z.png", "\u00e4/1.png", "10/1.png", "9/1.png"):
        put(tree / name)
    walked = [  # torchvision.datasets.folder: find_classes and make_dataset
        os.path.relpath(os.path.join(folder, name), tree)
        for label in sorted(entry.name for entry in os.scandir(tree) if entry.is_dir())
        for folder, _, names in sorted(os.walk(tree / label, followlinks=True))
        for name in sorted(names)
    ]
    source = open_source(tree)
    assert source.class_names == ("10", "9", "B", "a", "b", "\u00e4")
    assert source.files == walked


@pytest.mark.parametrize(
    "ignored", ["__MACOSX", "@eaDir", "$Recycle.Bin", "lost+found", ".Trash-1000", ".ipynb_checkpoints"]
)
def test_hidden_and_system_folders_are_no_data_at_any_level(tree, ignored):
    plain = open_source(tree)
    put(tree / ignored / "1.png")
    put(tree / "b" / ignored / "1.png")
    put(tree / "b" / "._2.png")
    source = open_source(tree)
    assert (source.class_names, source.files, source.digest) == (plain.class_names, plain.files, plain.digest)


def test_the_output_is_no_data_wherever_it_lies(tree):
    plain = open_source(tree)
    for out in (tree / "aa", tree / "b" / "shards"):
        put(out / "1.png")
        (tree / "a" / "link").symlink_to(out)
        source = open_source(tree, out=out)
        assert source.files == plain.files
        assert f"{out}: skipped as the output folder, although it holds images" in source.notes
        (tree / "a" / "link").unlink()
        os.remove(out / "1.png")
        out.rmdir()
    put(tree / "aa" / "deep" / "1.png")
    assert len(open_source(tree, out=tree / "aa").notes) == 1
    os.remove(tree / "aa" / "deep" / "1.png")
    assert open_source(tree, out=tree / "aa" / "deep").files == plain.files  # a folder made for the output is no class
    os.removedirs(tree / "aa" / "deep")
    assert open_source(tree, out=tree.parent).files == plain.files  # shards around the images
    (tree.parent / "same").symlink_to(tree)
    refused(tree, "both source and output", out=tree.parent / "same")


def test_links_are_followed_and_cycles_refused(tree, tmp_path):
    put(tmp_path / "elsewhere" / "7.png", 7)
    (tree / "c").symlink_to(tmp_path / "elsewhere")
    (tree / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root").symlink_to(tree)
    assert open_source(tmp_path / "root").files == ["a/more/7.png", "a/x/9.png", "b/1.PNG", "b/2.png", "c/7.png"]
    for target in (tree, tree / "a", tree / "a" / "x"):
        (tree / "a" / "x" / "loop").symlink_to(target)
        refused(tree, "a/x/loop: a link to a folder above it")
        (tree / "a" / "x" / "loop").unlink()
    (tree / "b" / "3.png").symlink_to(tmp_path / "gone.png")
    refused(tree, "b/3.png: a link to nothing")


def test_a_class_without_images_is_refused_by_name(tree):
    (tree / "notes").mkdir()
    (tree / "notes" / "x.txt").write_text("x")
    refused(tree, r"no images in class folder 'notes' \(1 such\)")
    refused(tree / "notes", "no images in class folders")
    refused(tree / "absent", "no such file or folder")
    refused("", "empty path")


def test_what_cannot_be_read_is_an_error(tree, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("a/x"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        refused(tree, "a/x: cannot be listed .Permission denied.")
    os.mkfifo(tree / "b" / "pipe.png")
    refused(tree, "b/pipe.png: neither a file nor a folder")


@pytest.mark.parametrize("name", ["bad\udcff/1.png", "b/bad\udcff.png"])
def test_names_that_are_not_utf8_are_refused_escaped(tree, name):
    put(tree / name)
    refused(tree, r"the name 'bad\\udcff.*': not UTF-8; rename it")


def test_files_that_are_no_images_are_counted_by_suffix(tree):
    for name in ("a/1.txt", "a/x/2.TXT", "b/list.json", "README", "lost.png"):
        (tree / name).write_bytes(b"x")
    (line,) = open_source(tree).notes
    outside = "1 .png outside the class folders, 1 without suffix outside the class folders"
    assert line == f"{tree}: skipped 5 files: 2 .txt, 1 .json, {outside}"


def test_the_digest_sees_content_names_and_classes_but_not_the_place(tree, tmp_path):
    before = open_source(tree).digest
    tree.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    os.utime(moved / "b" / "2.png", (1, 1))
    assert open_source(moved).digest == before
    file = moved / "b" / "2.png"
    data, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(data[:-20] + bytes(8) + data[-12:])  # same size, and the same time below
    os.utime(file, ns=times)
    assert open_source(moved).digest != before
    file.write_bytes(data)
    assert open_source(moved).digest == before
    file.rename(moved / "a" / "2.png")
    assert open_source(moved).digest != before


def test_a_file_that_cannot_be_read_names_itself(tree, monkeypatch):
    import hashlib

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", fail)
    refused(tree, r"a/x/9.png: cannot be read \(Input/output error\)")


@pytest.mark.parametrize("name", ["absent", "absent.npz"])
def test_a_source_that_is_not_there_is_not_called_one_of_another_form(tmp_path, name):
    with pytest.raises(DataError, match=f"{name}: no such file or folder; give"):
        open_source(tmp_path / name)
