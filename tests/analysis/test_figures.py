"""What the figures of an analysis show, read off their axes."""

import numpy as np
import pytest

from dit_fast.analysis import figures


def is_picture(figure):
    return figures.to_png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [1, 6, 28])
def test_similarity_shows_every_matrix_on_one_scale(count):
    matrices = {"one": np.eye(count), "two": np.full((count, count), 0.5)}
    figure = figures.heat_maps(matrices, "linear CKA")
    images = [axes.images[0] for axes in figure.axes if axes.images and axes.get_title(loc="left")]
    assert [image.get_clim() for image in images] == [(0, 1), (0, 1)]
    np.testing.assert_array_equal(images[1].get_array(), matrices["two"])
    assert is_picture(figure)


def test_runs_in_one_map_are_named_at_their_blocks():
    figure = figures.heat_maps({"t = 0.04": np.eye(5)}, "RBF CKA", [2, 3], ["a$b", "c"])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["A", "B"]
    assert figure.get_suptitle() == "A: a\\$b\nB: c"
    assert "between runs 0.00" in axes.get_title(loc="left")
    assert figures.between(np.arange(9).reshape(3, 3), [1, 2]) == (1 + 2 + 3 + 6) / 4
    assert axes.get_xticks().tolist() == [0.5, 3.0]
    assert is_picture(figure)


def test_shares_of_each_block_add_up_to_one_and_terms_keep_their_colour():
    norms = np.array([[3.0, 0.0], [1.0, 0.0]])
    figure = figures.shares_figure({"one": (["flow"], np.ones((1, 2))), "two": (["repa/a", "flow"], norms)})
    one, two = figure.axes
    tops = [bar.get_y() + bar.get_height() for bar in two.patches]
    assert tops == pytest.approx([0.75, 0, 1, 0])
    assert one.patches[0].get_facecolor() == two.patches[2].get_facecolor()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["flow", "repa/a"]
    assert is_picture(figure)


def test_lines_run_over_the_blocks():
    panels = {"a": {"one": np.arange(3.0), "two": np.ones(3)}, "b": {"three": np.arange(4.0)}}
    figure = figures.lines_figure(panels, "rank")
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]
    assert figure.axes[1].lines[0].get_xdata().tolist() == [1, 2, 3, 4]
    assert is_picture(figure)
