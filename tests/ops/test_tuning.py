"""A tuned table decides where it was measured, and names nothing but declared configurations."""

import json
from contextlib import nullcontext

import pytest
import torch

from dit_fast.errors import ConfigError
from dit_fast.kernels import tuning
from dit_fast.nn.attention import Attention

CPU = torch.device("cpu")
DECLARED = ((128, 8), (64, 4), (32, 2))


@pytest.fixture
def table(monkeypatch):
    """Of the CPU, and empty at first."""
    entries = []
    monkeypatch.setattr(tuning, "TABLES", {"cpu": {"kernel": entries}})
    return entries


def entry(rows, configuration, width=1152):
    return {"rows": rows, "width": width, "configuration": configuration}


def found(rows, width=1152, kernel="kernel"):
    return tuning.tuned(kernel, CPU, rows, DECLARED, width=width)


def test_the_nearest_rows_within_a_factor_of_two_decide(table):
    table += [entry(8192, [64, 4]), entry(16384, [32, 2])]
    assert [found(rows) for rows in (8192, 8193, 11000, 12000, 16384, 32768)] == [*[(64, 4)] * 3, *[(32, 2)] * 3]
    assert found(4096) == (64, 4)
    assert found(4095) is found(32769) is found(0) is None


def test_the_rest_of_the_key_is_exact(table):
    table += [entry(8192, [64, 4])]
    assert found(8192, width=1024) is found(8192, kernel="other") is None
    assert tuning.tuned("kernel", torch.device("meta"), 8192, DECLARED, width=1152) is None


def test_a_configuration_that_was_not_compiled_is_refused_by_name(table):
    table += [entry(8192, [256, 8])]
    with pytest.raises(ConfigError, match=r"cpu\.json: \[256, 8\] for kernel is none .*: \[128, 8\], \[64, 4\]"):
        found(8192)


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"kernel": [{"rows": 8}]}', '{"kernel": [{"rows": "8", "configuration": 1}]}']
)
def test_a_file_that_is_no_table_is_named(text, tmp_path):
    (tmp_path / "sm_90.json").write_text(text)
    with pytest.raises(ConfigError, match=r"sm_90\.json is no table of tuned configurations"):
        tuning.read(tmp_path)


def test_a_table_is_read_as_it_was_written(tmp_path, monkeypatch):
    (tmp_path / "cpu.json").write_text(json.dumps({"kernel": [entry(8192, [64, 4])]}))
    monkeypatch.setattr(tuning, "TABLES", tuning.read(tmp_path))
    assert found(9000) == (64, 4)


def test_attention_takes_the_back_end_of_the_table(monkeypatch):
    asked = []
    choose = lambda backend: asked.append(backend.name) or nullcontext()  # noqa: E731
    monkeypatch.setattr("dit_fast.nn.attention.sdpa_kernel", choose)
    measured = {"width": 16, "compute": "float32"}
    rows = [measured | {"rows": 8, "configuration": "math"}, measured | {"rows": 64, "configuration": "torch"}]
    monkeypatch.setattr(tuning, "TABLES", {"cpu": {"attention": rows}})
    monkeypatch.setattr("dit_fast.nn.attention.attention_cpp.takes", lambda *_: False)  # before any table
    attention, fixed = Attention(32, 2), Attention(32, 2, kind="sdpa")
    for tokens in (8, 17, 64):
        assert attention(torch.randn(2, tokens, 32)).shape == fixed(torch.randn(2, tokens, 32)).shape
    assert asked == ["MATH"]
