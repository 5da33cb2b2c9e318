"""The dispatch table follows the measurements, and only valid ones."""

import copy
import json

import pytest

from dit_fast.benchmarks import tune
from dit_fast.ops import long_skip_table

EMPTY = {"format": 1, "op": "long_skip", "source": "none", "entries": []}


def entry(arch, width, backend="gemm"):
    return {"arch": arch, "width": width, "rows": 1024, "dtype": "bfloat16", "backend": backend}


@pytest.fixture
def result(small, open_gate, tmp_path):
    from dit_fast.benchmarks.run import run

    path = run("long_skip", small, tmp_path / "measured", budget=0.1, say=lambda line: None)
    made = json.loads(path.read_text())
    made["device"]["arch"] = "sm_90"
    (case,) = made["cases"]
    case["dtype"] = "bf16"
    sides = case["parts"]["forward_backward"]["sides"]
    sides["dit_fast, gemm"] = {**sides["eager"], "median_s": 2e-3}
    sides["dit_fast, triton"] = {**sides["eager"], "median_s": 1e-3}
    return made


def write(tmp_path, result, table=EMPTY):
    paths = tmp_path / "result.json", tmp_path / "table.json"
    for path, content in zip(paths, (result, table), strict=True):
        path.write_text(json.dumps(content))
    return paths


def test_the_faster_one_is_written_and_other_devices_stay(result, tmp_path):
    old = {**EMPTY, "entries": [entry("sm_80", 64), entry("sm_90", 64)]}
    source, table = write(tmp_path, result, old)
    assert tune.main([str(source), "--out", str(table)]) == 0
    loaded = long_skip_table.load(table)
    assert loaded == {("sm_80", 64, 1024, "bfloat16"): "gemm", ("sm_90", 160, 512, "bfloat16"): "triton"}
    sides = result["cases"][0]["parts"]["forward_backward"]["sides"]
    sides["dit_fast, triton"]["median_s"] = 3e-3
    source, table = write(tmp_path, result)
    assert tune.main([str(source), "--out", str(table)]) == 0
    assert set(long_skip_table.load(table).values()) == {"gemm"}


def test_what_is_no_measurement_changes_nothing(result, tmp_path, capsys):
    on_cpu, alone = copy.deepcopy(result), copy.deepcopy(result)
    on_cpu["device"]["arch"] = None
    del alone["cases"][0]["parts"]["forward_backward"]["sides"]["dit_fast, triton"]
    for broken, message in (
        (on_cpu, "not a result of long_skip on a GPU"),
        (alone, "both gemm and triton"),
        ({}, "lacks"),
    ):
        source, table = write(tmp_path, broken)
        assert tune.main([str(source), "--out", str(table)]) == 2
        assert message in capsys.readouterr().err
        assert json.loads(table.read_text()) == EMPTY
    assert tune.main([str(tmp_path / "absent.json"), "--out", str(table)]) == 2
