"""What is read from a run folder, and what is refused."""

import json

import numpy as np
import pytest

from dit_fast.errors import DataError
from dit_fast.report.metrics import read_metrics, smooth


def write(folder, *lines):
    (folder / "metrics.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )


def test_columns_take_only_rows_that_have_them(tmp_path):
    write(tmp_path, {"step": 1, "flow": 2.0}, {"step": 2, "flow": 1.0, "mfu": 0.5}, {"step": 3, "note": "text"})
    metrics = read_metrics(tmp_path)
    np.testing.assert_array_equal(metrics.column("flow"), [[1, 2], [2.0, 1.0]])
    np.testing.assert_array_equal(metrics.column("mfu"), [[2], [0.5]])
    assert metrics.column("absent")[0].shape == (0,)
    assert metrics.has("mfu")
    assert not metrics.has("note")


def test_a_repeated_step_counts_once_as_last_written(tmp_path):
    write(tmp_path, {"step": 10, "flow": 3.0}, {"step": 20, "flow": 2.0}, {"step": 10, "flow": 1.0})
    np.testing.assert_array_equal(read_metrics(tmp_path).column("flow"), [[10, 20], [1.0, 2.0]])


def test_a_torn_last_line_is_left_out(tmp_path):
    write(tmp_path, {"step": 1, "flow": 3.0}, '{"step": 2, "fl')
    assert len(read_metrics(tmp_path).rows) == 1


@pytest.mark.parametrize("line", ["not json", "[1]", '{"step": 1e999}', '{"step": "2"}', '{"a": 1}', "[" * 100_000])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    write(tmp_path, {"step": 1}, line, {"step": 3})
    with pytest.raises(DataError, match="line 2"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("content", [None, ""])
def test_a_folder_without_rows_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)


def test_smoothing_keeps_length_and_constants_and_averages_neighbours():
    values = np.array([0.0, 3.0, 0.0, 3.0, 0.0])
    np.testing.assert_allclose(smooth(values, 3), [1.5, 1.0, 2.0, 1.0, 1.5])
    np.testing.assert_array_equal(smooth(values, 1), values)
    np.testing.assert_allclose(smooth(np.full(7, 2.5), 4), 2.5)
    np.testing.assert_allclose(smooth(np.array([1.0, np.nan, 3.0, np.inf]), 3), [1, 2, 3, 3])


def test_a_file_that_the_disk_does_not_give_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/proc/self/mem")  # its first byte is an error of input and output
    with pytest.raises(DataError, match=r"metrics\.jsonl: cannot be read \(Input/output error\)"):
        read_metrics(tmp_path)
