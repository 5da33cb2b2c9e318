"""Grids put each image in the row of its class."""

import numpy as np
import pytest

from dit_fast.errors import UserError
from dit_fast.sampling.grids import GAP, HEADER, class_grid, save_png


def plain(labels, size=8):
    """Images of one colour: red = 20 * label, green = 3 * running number."""
    images = np.zeros((len(labels), size, size, 3), np.uint8)
    for number, label in enumerate(labels):
        images[number, ..., 0], images[number, ..., 1] = 20 * label, 3 * number
    return images, np.array(labels)


def test_rows_are_classes_and_groups_stand_side_by_side():
    images, labels = plain([2, 0, 2, 0, 2])
    grid = np.asarray(
        class_grid({"a": (images, labels), "b": (images[:2], labels[:2])}, [0, 2], ["zero", "one", "two"])
    )
    step = 64 + GAP  # 8 pixels enlarged 8 times
    ends = np.flatnonzero((grid[HEADER + 10] != 255).any(axis=1))
    first = ends[ends > 40][0]
    for row, reds in enumerate(([0, 0, 0], [40, 40, 40])):
        y = HEADER + row * step + 5
        pixels = [grid[y, first + column * step + 5] for column in (0, 1)]
        assert [int(pixel[0]) for pixel in pixels] == reds[:2]
    assert grid[HEADER + 5, first + 5, 1] == 3 * 1  # the first image of class 0 is number 1
    assert grid[HEADER + step + 5, first + step + 5, 1] == 3 * 2
    assert grid[HEADER + step + 5, first + 2 * step + 18 + 5].tolist() == [40, 0, 0]  # group b, class 2


def test_every_group_shows_as_many_as_its_rarest_class():
    images, labels = plain([0, 0, 0, 1])
    narrow = class_grid({"a": (images, labels)}, [0, 1], ["zero", "one"])
    wide = class_grid({"a": (images, labels)}, [0], ["zero", "one"])
    assert narrow.width < wide.width


def test_captions_are_never_cut():
    images = plain([0])
    widths = [class_grid({title: images}, [0], ["zero"]).width for title in ("a", "heun, 20 steps\n" * 9, "b" * 300)]
    assert widths[0] < 200 < 800 < widths[1] < widths[2]


def test_a_class_without_images_is_named():
    with pytest.raises(UserError, match="no image of class 1"):
        class_grid({"a": plain([0, 0])}, [0, 1], ["zero", "one"])


def test_large_images_keep_their_size():
    grid = class_grid({"a": plain([0], size=96)}, [0], ["zero"])
    assert grid.height == HEADER + 96 + GAP + 8


def test_png_is_written_whole(tmp_path):
    save_png(class_grid({"a": plain([0])}, [0], ["zero"]), tmp_path / "deep" / "grid.png")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["grid.png"]


def test_odd_names_are_one_short_line():
    """Names come from folders: long, of several lines, with characters that no font or encoding has."""
    names = ["x" * 5000, "two\nlines\tand a tab", "\udcff", "🦋" * 3, "<b>&amp;", ""]
    images, labels = plain(list(range(len(names))))
    assert class_grid({"a": (images, labels)}, range(len(names)), names).width < 700


def test_what_does_not_fit_is_named():
    small, large = plain([0]), plain([0], size=16)
    with pytest.raises(UserError, match="'b' has images of"):
        class_grid({"a": small, "b": large}, [0], ["zero"])
    with pytest.raises(UserError, match=r"class 1 is not in this data set; labels are 0\.\.0"):
        class_grid({"a": plain([0, 1])}, [0, 1], ["zero"])
