"""The table of measured cases that picks the long skip's implementation."""

import json
import logging

import pytest
import torch

from dit_fast.errors import ConfigError
from dit_fast.ops import long_skip_op, long_skip_table
from tests.helpers.long_skip_cases import inputs

ENTRY = {"arch": "sm_90", "width": 8, "rows": 64, "dtype": "bfloat16", "backend": "triton"}


def _written(tmp_path, *entries, **changes):
    path = tmp_path / "table.json"
    content = {"format": 1, "op": "long_skip", "source": "a test", "entries": list(entries)}
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_the_shipped_table_is_valid_and_everything_unlisted_takes_gemm():
    assert long_skip_table.shipped() == long_skip_table.load(long_skip_table.PATH)
    assert json.loads(long_skip_table.PATH.read_text())["source"]
    assert long_skip_table.preferred("sm_1", 1152, 8192, torch.bfloat16) == "gemm"


def test_two_row_counts_of_a_bucket_give_one_decision(monkeypatch, tmp_path):
    table = long_skip_table.load(_written(tmp_path, ENTRY))
    monkeypatch.setattr(long_skip_table, "shipped", lambda: table)
    answers = [long_skip_table.preferred("sm_90", 8, rows, torch.bfloat16) for rows in range(1, 130)]
    assert answers == ["gemm"] * 32 + ["triton"] * 32 + ["gemm"] * 65
    assert [long_skip_table.bucket(rows) for rows in (0, 1, 2, 3, 4, 5, 65536, 65537)] == [
        1, 1, 2, 4, 4, 8, 65536, 131072,
    ]  # fmt: skip
    for other in (("sm_80", 8, torch.bfloat16), ("sm_90", 16, torch.bfloat16), ("sm_90", 8, torch.float16)):
        assert long_skip_table.preferred(other[0], other[1], 64, other[2]) == "gemm"


@pytest.mark.parametrize(
    ("entries", "changes", "named"),
    [
        ([{**ENTRY, "backend": "cudnn"}], {}, "entry 0: backend 'cudnn' is none of gemm, triton"),
        ([ENTRY, {**ENTRY, "dtype": "bf16"}], {}, "entry 1: dtype 'bf16'"),
        ([{**ENTRY, "rows": 100}], {}, "entry 0: .* rows a power of two"),
        ([{**ENTRY, "width": 0}], {}, "entry 0: width must be at least 1"),
        ([{**ENTRY, "width": "8"}], {}, "entry 0: width must be of type int, not '8'"),
        ([{**ENTRY, "rows": True}], {}, "entry 0: rows must be of type int"),
        ([{**ENTRY, "arch": "90"}], {}, "entry 0: arch '90' must be like sm_90"),
        ([{**ENTRY, "speed": 2}], {}, "entry 0 must have exactly the fields"),
        (["gemm"], {}, "entry 0 must have exactly the fields"),
        ([ENTRY, {**ENTRY, "backend": "gemm"}], {}, "entry 1 repeats"),
        ([], {"format": 2}, '"format": 1'),
        ([], {"op": "adaln"}, '"op": "long_skip"'),
        ([], {"entries": {}}, "a list of entries"),
        ([], {"notes": ""}, "must hold format, op, source"),
    ],
)
def test_a_bad_table_is_one_line_that_names_file_and_entry(tmp_path, entries, changes, named):
    path = _written(tmp_path, *entries, **changes)
    with pytest.raises(ConfigError, match=named) as caught:
        long_skip_table.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unreadable_table_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "absent.json"):
        with pytest.raises(ConfigError, match=name):
            long_skip_table.load(tmp_path / name)


class _OnCuda:
    """What `_choose` asks of a tensor, on a device that this machine may not have."""

    is_cuda, dtype, device, shape = True, torch.bfloat16, torch.device("cuda", 0), (50, 8)


@pytest.mark.parametrize("reasons", [[], ["rows are not aligned"]])
def test_auto_follows_the_table_and_says_where_it_cannot(monkeypatch, caplog, tmp_path, reasons):
    table = long_skip_table.load(_written(tmp_path, ENTRY))
    monkeypatch.setattr(long_skip_table, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(long_skip_op.kernels, "unavailable", lambda: None)
    monkeypatch.setattr(long_skip_op, "supports", lambda *arguments: reasons if arguments[-1] == "triton" else [])
    long_skip_op._say_once.cache_clear()
    choose = lambda: long_skip_op._choose("auto", _OnCuda(), _OnCuda(), (), torch.bfloat16)  # noqa: E731
    assert choose() == "gemm"
    monkeypatch.setattr(long_skip_table, "shipped", lambda: table)
    with caplog.at_level(logging.INFO, "dit_fast"):
        assert [choose(), choose()] == ["gemm" if reasons else "triton"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        f"long_skip: triton is not used: {reason}" for reason in reasons
    ]


def test_the_op_asks_for_the_table_only_on_a_gpu(monkeypatch):
    monkeypatch.setattr(long_skip_table, "preferred", lambda *arguments: pytest.fail("asked"))
    x, skip, *parameters = inputs((4,), 8, torch.float32)
    assert long_skip_op._choose("auto", x, skip, tuple(parameters), torch.float32) == "torch"
