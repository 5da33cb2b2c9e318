"""A stage ends in time whatever its parts do, says how each ended, and leaves a whole tar at every moment."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from dit_fast.benchmarks import gpu_suite, machine
from dit_fast.benchmarks.gpu_suite import FAMILIES, ROOT, STAGES, Stage, _parser
from dit_fast.benchmarks.parts import Part, Record, run_parts
from dit_fast.benchmarks.step import BENCHMARK as STEP
from dit_fast.errors import UserError
from dit_fast.kernels import tuning
from tests.ops.install_triton import folder

RED = "def test_red():\n    assert 1 == 2\n"
PLANTED = {  # as code of a part: a hang with a child of its own, a failing test, an illegal access, one that works
    "hang": "import subprocess, sys, time; print('begun', flush=True)\n"
    "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])",
    "red": "import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '{folder}/test_red.py']))",
    "crash": "import ctypes; print('begun', flush=True); ctypes.string_at(0)",
    "works": "open('{folder}/out/stage/works.json', 'w').write('{{}}')",
}


def part(name, code, share=1.0, **options):
    return Part(name, share, lambda seconds: [sys.executable, "-c", code], **options)


def planted(folder, name, **options):
    return part(name, PLANTED[name].format(folder=folder), **options)


@pytest.fixture
def record(tmp_path):
    (tmp_path / "test_red.py").write_text(RED)
    return Record(tmp_path / "out" / "stage", tmp_path / "out" / "stage.tar", {"stage": "test"})


def packed(tar):
    """Name and content of the tar's files."""
    with tarfile.open(tar) as archive:
        return {Path(entry.name).name: archive.extractfile(entry).read() for entry in archive}


def statuses(tar):
    return {entry["name"]: entry["status"] for entry in json.loads(packed(tar)["suite.json"])["parts"]}


def test_a_hang_a_failing_test_and_a_crash_hide_themselves_alone(record, tmp_path):
    parts = [planted(tmp_path, name, share=1.0 if name == "hang" else 100.0) for name in PLANTED]
    outcomes = {each.name: each for each in run_parts(parts, 301.0, record, cwd=tmp_path, say=lambda line: None)}
    ends = {"hang": "stopped", "red": "failed", "crash": "crashed", "works": "ok"}
    assert {name: outcome.status for name, outcome in outcomes.items()} == ends == statuses(record.tar)
    assert any("assert 1 == 2" in line for line in outcomes["red"].tail)
    assert outcomes["crash"].tail[0] == "begun"
    assert packed(record.tar).keys() == {"suite.json", "works.json", *(f"{name}.txt" for name in PLANTED)}


def test_parts_beside_each_other_hide_themselves_alone(record, tmp_path):
    parts = [planted(tmp_path, name, beside=True) for name in ("hang", "crash", "works")]
    outcomes = run_parts(parts, 15.0, record, cwd=tmp_path, say=lambda line: None)
    assert [outcome.status for outcome in outcomes] == ["stopped", "crashed", "ok"]
    assert outcomes[0].tail == ["begun"]


def test_the_tar_follows_a_running_part(record, tmp_path, monkeypatch):
    monkeypatch.setattr("dit_fast.benchmarks.parts.PACK_EVERY", 0.2)
    seen = []

    class Watched(Record):
        def pack(self):
            super().pack()
            seen.append((statuses(self.tar)["slow"], "early.json" in packed(self.tar)))

    code = f"import time; open({str(record.folder / 'early.json')!r}, 'w').write('1'); time.sleep(3)"
    run_parts([part("slow", code)], 20, Watched(record.folder, record.tar, {}), cwd=tmp_path, say=lambda line: None)
    assert ("running", True) in seen
    assert seen[-1] == ("ok", True)


def test_time_that_is_left_goes_to_the_next_part(record, tmp_path):
    told = []

    def command(seconds):
        told.append(seconds)
        return [sys.executable, "-c", ""]

    run_parts([Part("first", 1, command), Part("second", 1, command)], 100, record, cwd=tmp_path, say=lambda _: None)
    assert told[0] == pytest.approx(50, abs=1)
    assert told[1] > 90


def test_what_cannot_run_here_is_named_and_fails_nothing(record, tmp_path):
    (outcome,) = run_parts([part("checked", "", absent="no tool")], 5, record, cwd=tmp_path, say=lambda _: None)
    assert (outcome.status, outcome.tail) == ("absent", ["no tool"])


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("correct", signal.SIGKILL),
        ("tune", signal.SIGTERM),  # the stages differ in their parts alone
        *(pytest.param(stage, signal.SIGTERM, marks=pytest.mark.long) for stage in STAGES if stage != "tune"),
    ],
)
def test_a_stage_that_is_killed_leaves_a_whole_tar_and_no_process(stage, number, tmp_path):
    """Its small form, killed while its second part runs."""
    command = [sys.executable, "-m", "dit_fast.benchmarks.gpu_suite", "--stage", stage, "--device", "cpu", "--small"]
    second = {"correct": "ceilings", "tune": "tune attention", "decide": "compile XL/2 b32 compiled"}[stage]
    suite = subprocess.Popen(
        [*command, "--only", "machine", "--only", second, "--out", str(tmp_path)], cwd=gpu_suite.ROOT
    )
    tar, children, end = tmp_path / f"{stage}.tar", [], time.monotonic() + 300
    while not (tar.exists() and statuses(tar).get(second) == "running") and time.monotonic() < end:
        time.sleep(0.05)
    children = Path(f"/proc/{suite.pid}/task/{suite.pid}/children").read_text().split()
    assert children
    os.kill(suite.pid, number)
    assert suite.wait(30) == (143 if number == signal.SIGTERM else -9)
    assert statuses(tar) == {"machine": "ok", second: "stopped" if number == signal.SIGTERM else "running"}
    described = json.loads(packed(tar)["machine.json"])
    assert described["device"]["slug"] == "cpu"
    for package in ("flash_attn", "apex"):  # there or absent
        assert any(line.split()[:1] == [package] for line in described["info"])
    while any(alive(pid) for pid in children) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in children)


@pytest.mark.parametrize(
    ("stage", "last", "left"),
    [
        pytest.param("correct", "ceilings", "ceilings.json", marks=pytest.mark.long),
        ("tune", "tune attention", "tune_attention.json"),
        pytest.param("decide", "report", "report.txt", marks=pytest.mark.long),
    ],
)
def test_what_is_planted_inside_a_stage_hides_itself_alone(stage, last, left, tmp_path, monkeypatch):
    """A hang, a failing test and a crash before a part of its small form, which runs and leaves its file."""
    (tmp_path / "test_red.py").write_text(RED)
    bad = {"hang": "stopped", "red": "failed", "crash": "crashed"}

    def parts(self, whole=Stage.parts):
        (real,) = (each for each in whole(self) if each.name == last)
        begin = [planted(tmp_path, name, share=1.0 if name == "hang" else 100.0) for name in bad]
        return [*begin, replace(real, share=100.0)]

    monkeypatch.setattr(Stage, "parts", parts)
    small = ["--stage", stage, "--device", "cpu", "--small", "--out", str(tmp_path), "--limit", "301"]
    assert gpu_suite.main(small) == 1
    ended = statuses(tmp_path / f"{stage}.tar")
    assert ended.pop(last) in (("ok", "failed") if last == "report" else ("ok",))  # nothing was measured to report
    assert ended == bad
    assert left in packed(tmp_path / f"{stage}.tar")


# Products in float64, rounded once: a CPU's own sum in an order that depends on the size of a block.
PLANTED_TILES = """
import sys
import numpy
from dit_fast.benchmarks import tune
from dit_fast.kernels import long_skip_tiles
planted = long_skip_tiles.Tiles(64, 128, 32, 4, 3)  # another block_k: sums in another order
long_skip_tiles.CANDIDATES[90, "forward", "16-bit"] = (planted,)
shapes = tune._shapes
tune._shapes = lambda small, more: [next(shapes(small, more))]  # one will do
matmul = numpy.matmul
numpy.matmul = lambda a, b, dtype: matmul(a, b, dtype=numpy.float64).astype(dtype)  # the interpreter's dot
sys.exit(tune.main(sys.argv[1:]))
"""


def test_the_small_tune_stage_writes_a_table_that_is_looked_up_and_refuses_what_changes_a_bit(tmp_path):
    """By the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(folder("3.9.0")), "OMP_NUM_THREADS": "1"}

    def run(*command):
        whole = [sys.executable, *command, "--device", "cpu", "--small", "--out", str(tmp_path)]
        done = subprocess.run(whole, env=environment, cwd=gpu_suite.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    suite = ["-m", "dit_fast.benchmarks.gpu_suite", "--stage", "tune"]
    run(*suite, "--only", "tune adaln", "--only", "check")
    files = packed(tmp_path / "tune.tar")
    entry = json.loads(files["cpu.json"])["adaln"][0]
    assert entry.keys() == {"rows", "width", "stream", "compute", "configuration"}
    assert files["check.txt"].count(b"equal") == 4  # two streams, at the rows measured and near them
    with mock.patch.object(tuning, "TABLES", tuning.read(tmp_path / "tune/tuned")):
        key = {name: entry[name] for name in ("width", "stream", "compute")}
        found = tuning.tuned("adaln", torch.device("cpu"), entry["rows"] + 9, (8, 16, 32), **key)
    assert found == entry["configuration"]

    run("-c", PLANTED_TILES, "long_skip")
    forward = json.loads((tmp_path / "tune_long_skip.json").read_text())["table"][0]
    assert forward["refused"] == {"[64, 128, 32, 4, 3]": "other bits"}
    assert json.loads((tmp_path / "tuned/cpu.json").read_text()).keys() == {"long_skip forward", "long_skip backward"}


def stage_parts(stage, *arguments):
    options = _parser().parse_args(["--stage", stage, "--device", "cpu", "--small", *arguments])
    return Stage(options, Path("out"), Path("tested")).parts()


@pytest.mark.parametrize("stage", STAGES)
def test_every_part_of_a_stage_has_a_name_and_a_log_of_its_own(stage):
    parts = stage_parts(stage)
    assert len({each.slug for each in parts}) == len(parts)
    assert gpu_suite.LIMIT < 9 * 60
    for each in parts:
        assert not {"pip", "curl", "wget"} & set(each.command(10.0))


def test_every_family_of_kernels_is_checked():
    from tests.ops.proofs import FAMILIES as proved

    parts = {"shared", "diversity_taps", "diversity_terms"}  # tested with all, and with diversity
    assert {family.removesuffix("_mlp") for family in FAMILIES} == set(proved) - parts


def test_the_gate_of_steps_runs_all_tests_that_steps_ask_for(tmp_path):
    options = _parser().parse_args(["--stage", "decide"])
    commands = [part.command(1.0) for part in Stage(options, tmp_path, tmp_path)._gate()]
    run = {file for command in commands for file in command if file.startswith("tests/")}
    wanted = {str(path.relative_to(ROOT)) for pattern in STEP.tests for path in ROOT.glob(pattern)}
    assert wanted
    assert wanted <= run


def test_the_record_of_a_part_of_the_gates_tests_does_not_stand_for_them(tmp_path):
    """As that of a stage of small shapes, which runs the files for every device alone."""
    stage = Stage(_parser().parse_args(["--stage", "decide"]), tmp_path, tmp_path)
    files = [file for file in stage._gate()[0].command(1.0) if file.startswith("tests/")]
    for covered in (files[:1], files):
        cases = "".join(f'<testcase classname="{file[:-3].replace("/", ".")}" name="test"/>' for file in covered)
        (tmp_path / f"{stage._gate()[0].slug}.xml").write_text(f"<testsuite>{cases}</testsuite>")
        assert (stage._gate()[0].absent is not None) == (covered == files)


def test_gcc_and_the_header_come_first(monkeypatch, tmp_path, capsys):
    machine.check_toolchain()
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(UserError, match=r"Python\.h is absent"):
        machine.check_toolchain()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert gpu_suite.main(["--stage", "correct", "--out", str(tmp_path)]) == 2
    assert "gpu-suite: error: no C compiler" in capsys.readouterr().err
    assert not (tmp_path / "correct.tar").exists()


def test_an_unknown_part_is_named(tmp_path, capsys):
    arguments = ["--stage", "correct", "--device", "cpu", "--small", "--out", str(tmp_path), "--only", "nothing"]
    assert gpu_suite.main(arguments) == 2
    assert "no part 'nothing'; valid: machine, tests adaln" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_whole_stage_on_a_cpu(stage, tmp_path):
    arguments = ["--stage", stage, "--device", "cpu", "--small", "--out", str(tmp_path), "--limit", "590"]
    assert gpu_suite.main(arguments) == 0
    assert set(statuses(tmp_path / f"{stage}.tar").values()) <= {"ok", "absent"}
