"""A small run of every benchmark, the file it leaves, and what the report makes of it."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from dit_fast.benchmarks import report, results
from dit_fast.benchmarks.__main__ import main
from dit_fast.benchmarks.cases import BENCHMARKS, case, long_skip
from dit_fast.benchmarks.cases.case import Benchmark, Case, Setting, Side, Target, Work
from dit_fast.benchmarks.ceilings import Ceilings
from dit_fast.benchmarks.measure import measure_case
from dit_fast.benchmarks.report import markdown
from dit_fast.benchmarks.results import check, environment, load_all, save
from dit_fast.benchmarks.run import _judged, run
from dit_fast.benchmarks.step import StepSetting, step_cases, step_measures
from dit_fast.errors import UserError


def numbers(value):
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, float | int):
        yield value


@pytest.fixture(scope="module")
def folder(small, open_gate, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    path = run("diversity_loss", small, folder, budget=0.1, say=lambda line: None)
    assert path == folder / "cpu" / "diversity_loss.json"
    return folder


@pytest.fixture
def result(folder):
    return json.loads((folder / "cpu" / "diversity_loss.json").read_text())


def test_file_says_what_was_measured_where_and_against_what(result):
    check(result)
    assert result["device"]["slug"] == "cpu"
    assert result["device"]["threads"] == 1
    assert result["versions"].keys() >= {"python", "torch", "triton", "dit_fast"}
    assert result["gate"]["passed"] == 3
    assert result["commit"] is None or len(result["commit"]) == 40
    assert result["ceilings"]["copy_bytes_per_s"] > 1e8
    assert all(math.isfinite(number) for number in numbers(result))
    case = result["cases"][0]
    assert case["shape"] == {"blocks": 6, "batch": 2, "tokens": 256, "width": 160}
    assert case["baseline"] == "published"
    assert max(error for errors in case["errors"].values() for error in errors.values()) < 1e-4
    both = case["parts"]["forward_backward"]
    elements = 6 * 2 * 256 * 160
    for part, passes in (("forward", 1), ("backward", 2), ("forward_backward", 3)):
        assert {side["bytes"] for side in case["parts"][part]["sides"].values()} == {4 * passes * elements}
    ten, all_pairs = (both["sides"][f"dit_fast, {which} pairs"]["flops"] for which in ("same 10", "all 15"))
    assert all_pairs - ten == 6 * 5 * elements // 6
    for name, side in both["sides"].items():
        assert len(side["samples_s"]) >= 3
        assert side["bytes_per_s"] == pytest.approx(side["bytes"] / side["median_s"], rel=1e-4)
        parts = (case["parts"][part]["sides"][name]["samples_s"] for part in ("forward", "backward"))
        assert side["samples_s"] == pytest.approx([sum(pair) for pair in zip(*parts, strict=True)], rel=1e-4)
    assert both["sides"]["published"]["speedup"] == 1


def test_costs_are_of_the_right_size(result):
    costs = result["cases"][0]["costs"]
    features = 6 * 2 * 256 * 160 * 4
    ours, published = costs["dit_fast, all 15 pairs"], costs["published"]
    assert features <= ours["peak_memory_bytes"] < published["peak_memory_bytes"]
    assert "traffic_bytes" not in ours
    assert published["traffic_bytes"] > 100 * features
    assert ours["host_waits"] == 0
    # 4 tests for each of ten pairs and two terms, 2 for each of six blocks, 3 of the total
    assert published["host_waits"] == 10 * 4 * 2 + 6 * 2 + 3
    assert costs["published, without checks"]["host_waits"] == 0


def test_incomplete_results_are_refused_by_name(result, tmp_path):
    for path, message in (
        (("commit",), "lacks 'commit'"),
        (("cases", 0, "costs"), "case lacks 'costs'"),
        (("cases", 0, "parts", "forward", "sides", "published", "samples_s"), "forward, published lacks 'samples_s'"),
    ):
        broken = copy.deepcopy(result)
        inner = broken
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        with pytest.raises(UserError, match=message):
            save(broken, tmp_path)
    with pytest.raises(UserError, match="schema 99"):
        check({**result, "schema": 99})


def test_saved_is_what_was_measured_with_short_lists_on_one_line(result, tmp_path):
    path = save(result, tmp_path / "again")
    assert json.loads(path.read_text()) == result
    assert any(
        line.strip().startswith('"samples_s": [') and line.count(",") > 2 for line in path.read_text().splitlines()
    )
    (tmp_path / "again" / "cpu" / "suite.json").write_text('{"parts": []}')
    assert load_all(tmp_path / "again") == [result]
    (tmp_path / "again" / "cpu" / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json is not JSON"):
        load_all(tmp_path / "again")


def test_what_is_committed_can_be_shown():
    results = load_all()
    assert {"cpu", "nvidia-h200"} <= {result["device"]["slug"] for result in results}
    assert all(markdown(result).startswith(f"## {result['benchmark']} on ") for result in results)


def test_targets_are_judged_both_ways():
    cases = [{"value": 4.0}]
    for wanted, at_most, met in ((3, False, True), (5, False, False), (5, True, True), (3, True, False)):
        target = Target("t", wanted, lambda found, _: found[0]["value"], at_most)
        assert _judged(target, cases, None)["met"] is met
    assert _judged(Target("t", 1, lambda found, _: None), cases, None)["met"] is None


def test_what_runs_on_request_alone_is_measured_by_its_name(monkeypatch):
    monkeypatch.setattr(case, "explain", lambda op, device: [("slow", "on request"), ("torch", "used")])
    monkeypatch.setattr(case, "runnable", lambda op, device: ["slow", "torch"])
    called = []
    sides = case.ours_and_eager(Setting(torch.device("cpu")), "op", lambda inputs, backend: called.append(backend))
    assert [side.name for side in sides] == ["eager", "dit_fast, slow"]
    sides[1].compute(())
    assert called == ["slow"]


def test_every_target_names_a_case_and_a_side_that_exist(monkeypatch):
    monkeypatch.setattr(case, "explain", lambda op, device: [("triton", "used"), ("torch", "not used")])
    monkeypatch.setattr(case, "runnable", lambda op, device: ["triton", "torch"])
    monkeypatch.setattr(long_skip, "layer_norms", lambda: {"Liger": None})
    ceilings = Ceilings(100.0, 100.0, {})
    side = {"speedup": 1.0, "median_s": 2.0, "bytes_per_s": 1.0}
    for benchmark in BENCHMARKS.values():
        for device, targets in benchmark.targets.items():
            sides = {
                each.name: [side.name for side in each.sides] for each in benchmark.cases(Setting(torch.device(device)))
            }
            parts = ("forward", "backward", "forward_backward")
            everything = [
                {"name": name, "parts": {part: {"sides": dict.fromkeys(names, side)} for part in parts}}
                for name, names in sides.items()
            ]
            assert [target.measure(everything, ceilings) for target in targets] == [1.0] * len(targets)
            assert [target.measure([], ceilings) for target in targets] == [None] * len(targets)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "diversity_loss"])
def test_other_ops(name, small, open_gate, tmp_path):
    check(json.loads(run(name, small, tmp_path, budget=0.1, say=lambda line: None).read_text()))


def test_whole_step(small, open_gate, tmp_path):
    lines = []
    setting = StepSetting(small.device, True, ("plain",), overrides=("optimizer.weight_decay=0.1",))
    path = run("step", setting, tmp_path, budget=0.1, say=lines.append)
    found = json.loads(path.read_text())
    check(found)
    assert path.name == "step-nano-2-b2-fp32-64px.json"
    (case,) = found["cases"]
    assert case["name"] == "Nano/2 b2 fp32 64px"
    sides = case["parts"]["step"]["sides"]
    assert list(sides) == ["as published", "dit_fast, all pairs", "dit_fast, no diversity loss"]
    for side in sides.values():
        assert side["samples_per_s"] == pytest.approx(2 / side["median_s"], rel=1e-4)
        assert side["mfu"].keys() == {"the sustained rate"}  # no data sheet of a CPU
        assert 0 < side["host_s"] < 2 * side["quartiles_s"][1]
        assert {part: len(times) for part, times in side["parts_s"].items()} == {
            "forward": 3,
            "backward": 3,
            "update": 3,
        }
    assert list(case["parts"]["diversity_loss"]["sides"]) == ["diversity loss alone"]
    assert case["overrides"] == ["optimizer.weight_decay=0.1"]
    assert any("samples/s, MFU" in line and "backward" in line for line in lines)


def test_steps_in_a_row_keep_the_time_of_each_that_counts(small, open_gate, tmp_path, monkeypatch):
    """diffusion-bench's protocol, without its compiler."""
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    found = json.loads(run("step", StepSetting(small.device, True, ("diffusion-bench",)), tmp_path, budget=0.1,
                           say=lambda line: None).read_text())  # fmt: skip
    (case,) = found["cases"]
    sides = case["parts"]["diffusion_bench"]["sides"]
    assert list(sides)[:2] == ["diffusion-bench", "dit_fast, no diversity loss"]
    for side in sides.values():
        assert len(side["samples_s"]) == 2
        assert side["samples_per_s"] == pytest.approx(2 * 2 / sum(side["samples_s"]), rel=1e-4)
    assert torch.get_float32_matmul_precision() == "highest"


def test_cases_of_the_step_are_every_combination_asked_for(small):
    setting = StepSetting(
        small.device, models=("B/2", "SiT-XL/2"), batches=(32,), precisions=("bf16",), pixels=(256, 512)
    )
    names = ["B/2 b32 bf16", "B/2 b32 bf16 512px", "XL/2 b32 bf16", "XL/2 b32 bf16 512px"]
    assert [case.name for case in step_cases(setting)] == names
    assert list(step_measures(replace(setting, groups=("plain", "types")))) == [
        *names, *(f"{name}, types" for name in names)
    ]  # fmt: skip


def broken(inputs):
    raise AssertionError("wrong number of dimensions\nhere")


def right(inputs):
    return (inputs[0].square(),)


def case_of(name, *sides):
    def inputs(generator):
        return (torch.randn(5, generator=generator, requires_grad=True),)

    return Case(name, "fp32", {}, inputs, sides, Work(4, 1), Work(4, 1), (1e-5, 1e-4))


WRONG = Side("wrong", lambda x: (1.01 * x[0].square(),), may_fail=True)
BROKEN = Side("broken", broken, may_fail=True)


def test_a_side_that_is_wrong_or_breaks_is_left_out_with_the_reason(small):
    ours = replace(WRONG, name="ours", may_fail=False)
    one = case_of("c", Side("eager", right), WRONG, BROKEN, ours, Side("same", right))
    found = measure_case(one, small, Ceilings(1e9, 1e9, {"fp32": 1e9}), 0.0)
    assert list(found["parts"]["forward"]["sides"]) == ["eager", "same"]
    assert found["skipped"]["broken"] == "AssertionError: wrong number of dimensions"
    assert found["skipped"]["wrong"].startswith("c: outputs of 'wrong' are off by 1.0e-02")
    assert found["failed"]["ours"].startswith("c: outputs of 'ours' are off by 1.0e-02")


def test_a_case_that_breaks_takes_no_other_with_it(small, open_gate, monkeypatch, tmp_path, capsys):
    cases = [
        case_of("first", Side("eager", broken), Side("ours", right)),
        case_of("second", Side("eager", right), BROKEN),
        case_of("third", Side("eager", right), replace(BROKEN, name="ours", may_fail=False)),
    ]
    monkeypatch.setitem(BENCHMARKS, "adaln", Benchmark("adaln", (), lambda setting: cases))
    arguments = ["adaln", "--small", "--device", "cpu", "--out", str(tmp_path), "--budget", "9"]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    failure = "AssertionError: wrong number of dimensions"
    assert printed.err == f"dit-fast bench: adaln: first: {failure}; third: ours: {failure}\n"
    assert f"first: not run ({failure})" in printed.out
    (found,) = load_all(tmp_path)
    assert [case["name"] for case in found["cases"]] == ["second", "third"]
    assert found["failed"] == {"first": failure}
    assert failure in report.markdown(found)


def test_a_commit_that_is_given_wins_over_an_older_history(monkeypatch):
    monkeypatch.setattr(results, "_git", lambda *arguments: {"rev-parse": "abcdef", "status": " M x"}[arguments[0]])
    given = {commit: environment(torch.device("cpu"), commit) for commit in (None, "abc", "123")}
    assert [(each["commit"], each["dirty"]) for each in given.values()] == [
        ("abcdef", True), ("abcdef", True), ("123", None)
    ]  # fmt: skip


def test_no_time_leaves_cases_out_and_says_so(small, open_gate, tmp_path):
    found = json.loads(run("adaln", small, tmp_path, budget=0.0, say=lambda line: None).read_text())
    assert len(found["cases"]) == 1
    left_out = ("gate_residual", "gate_residual_modulate", "gate_residual_modulate rms")
    assert found["left_out"] == [f"{name}, Nano/2 b2 fp32" for name in left_out]


def test_report_prints_tables_and_draws_the_roofline(result, folder, capsys):
    report.report(folder)
    printed = capsys.readouterr().out
    assert "## diversity_loss on " in printed
    assert "| Nano/2 b2 fp32 | forward_backward | dit_fast, all 15 pairs |" in printed
    assert (folder / "cpu" / "roofline.png").read_bytes()[:4] == b"\x89PNG"
    axes = report.roofline([result]).axes[0]
    both = result["cases"][0]["parts"]["forward_backward"]
    drawn = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1}
    assert {(side["flops"] / side["bytes"], side["flops_per_s"]) for side in both["sides"].values()} <= drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adalm"], "unknown benchmark 'adalm'; valid: diversity_loss, long_skip, adaln, qk_norm"),
        (["adaln", "--device", "tpu"], "--device tpu is unknown"),
        (["adaln", "--batch", "4"], "--once are for `step` alone"),
        (["step", "engine.compil=true", "--once", "--small"], "unknown configuration key 'engine.compil'"),
        (["report", "--out", "/nonexistent"], "no results in /nonexistent"),
    ],
)
def test_errors_of_use_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
