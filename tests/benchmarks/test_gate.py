"""No speed without green tests, and none for a side that computes something else."""

import dataclasses

import pytest
import torch

from dit_fast.benchmarks import __main__, cases, run
from dit_fast.benchmarks.cases import BENCHMARKS
from dit_fast.benchmarks.cases.case import Case, Side, Work
from dit_fast.benchmarks.gate import RedGate, check_agreement, largest_error, read_record, run_tests
from tests.helpers.cases import loop_over

GREEN = "def test_right():\n    assert True\n\ndef test_other():\n    import pytest\n    pytest.skip('absent')\n"
RED = "def test_wrong():\n    assert 1 == 2\n"
RECORD = (
    '<testsuites><testsuite><testcase classname="{}" name="test_x" time="0.5">{}</testcase></testsuite></testsuites>'
)


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_op.py").write_text(GREEN)
    return tmp_path


def test_green_tests_open_the_gate(checkout):
    verdict = run_tests("op", ["tests/test_op*.py"], root=checkout)
    assert (verdict.tests, verdict.passed, verdict.skipped) == (("tests/test_op.py",), 1, 1)


def test_red_tests_show_no_speed(checkout, monkeypatch, capsys, tmp_path):
    (checkout / "tests" / "test_op_gradient.py").write_text(RED)
    red = dataclasses.replace(BENCHMARKS["adaln"], tests=("tests/test_op*.py",))
    monkeypatch.setitem(cases.BENCHMARKS, "adaln", red)
    monkeypatch.setattr(run, "run_tests", lambda op, tests: run_tests(op, tests, root=checkout))
    out = tmp_path / "results"
    assert __main__.main(["adaln", "--small", "--device", "cpu", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "adaln: its tests fail, so no speed is shown: FAILED tests/test_op_gradient.py::test_wrong" in printed.err
    assert not out.exists()


def test_tests_that_hang_or_are_not_there_show_no_speed(checkout):
    with pytest.raises(RedGate, match="no test files tests/test_none"):
        run_tests("op", ["tests/test_none*.py"], root=checkout)
    (checkout / "tests" / "test_op.py").write_text("import time\n\ndef test_slow():\n    time.sleep(60)\n")
    with pytest.raises(RedGate, match="did not end within"):
        run_tests("op", ["tests/test_op.py"], root=checkout, seconds=0.3)


@loop_over(
    ("content", "message"),
    [
        (RECORD.format("tests.test_op", "<failure/>"), "tests/test_op.py::test_x fails"),
        (RECORD.format("tests.test_op.TestClass", "<error/>"), "test_x fails"),
        (RECORD.format("tests.test_op", "<skipped/>"), "nothing passed in tests.test_op"),
        (RECORD.format("tests.test_op_other", ""), "nothing passed in tests.test_op"),
    ],
)
def test_records_that_do_not_open_the_gate(checkout, content, message):
    record = checkout / "tests.xml"
    record.write_text(content)
    with pytest.raises(RedGate, match=message):
        read_record("op", ["tests/test_op.py"], record, root=checkout)


def test_a_record_opens_the_gate(checkout):
    record = checkout / "tests.xml"
    record.write_text(RECORD.format("tests.test_op", ""))
    verdict = read_record("op", ["tests/test_op.py"], record, root=checkout)
    assert (verdict.passed, verdict.skipped, verdict.seconds) == (1, 0, 0.5)


def case(other):
    sides = (Side("right", lambda inputs: (inputs[0].square(),)), Side("other", other))
    work = Work(1, 1)
    return Case("case", "fp32", {}, lambda generator: (), sides, work, work, (1e-5, 1e-4))


def inputs():
    x = torch.linspace(-1, 2, 7, requires_grad=True)
    return (x,), (torch.ones(7),)


def test_equal_sides_agree():
    errors = check_agreement(this := case(lambda x: (x[0] * x[0],)), this.sides[1], *inputs())
    assert errors == {"outputs": 0, "gradients": 0}


@loop_over(
    ("other", "kind"),
    [
        (lambda x: (x[0].square() * 1.001,), "outputs"),
        (lambda x: (x[0].square() * x[0].detach().new_tensor(float("nan")),), "outputs"),
        (lambda x: (x[0].detach() * x[0],), "gradients"),
    ],
)
def test_a_side_that_computes_something_else_shows_no_speed(other, kind):
    wrong = case(other)
    with pytest.raises(RedGate, match=f"case: {kind} of 'other' are off"):
        check_agreement(wrong, wrong.sides[1], *inputs())


def test_what_is_nearly_zero_beside_the_others_may_be_rounding():
    large, tiny = torch.full((4,), 1.0), torch.full((4,), 1e-9)
    assert largest_error((large, 2 * tiny), (large, tiny)) == 0
    assert largest_error((large, 1e6 * tiny), (large, tiny)) > 1
    assert largest_error((1.01 * large, tiny), (large, tiny)) == pytest.approx(0.01, rel=1e-3)
