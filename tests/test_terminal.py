"""Both command lines end in one line and a status, whatever they meet and whatever became of their streams."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit_fast import cli, terminal
from dit_fast.errors import UserError
from dit_fast.train.__main__ import main as train


def raises(error):
    def work(arguments):
        raise error

    return work


class Own(UserError):
    status = 7


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("run.dir is not set"), 2, "error: run.dir is not set"),
        (Own("two\n \x1b[31mlines\x1b[0m \x07"), 7, r"error: two lines \x07"),
        (KeyError("x"), 1, f"error: KeyError: 'x' ({terminal.ADVICE})"),
        (MemoryError(), 1, f"error: MemoryError: (no message) ({terminal.ADVICE})"),
        (RuntimeError("first\nsecond"), 1, f"error: RuntimeError: first ({terminal.ADVICE})"),
        (
            PermissionError(13, "Permission denied", "/x"),
            1,
            "error: PermissionError: [Errno 13] Permission denied: '/x'",
        ),
        (
            ModuleNotFoundError("No module named 'PIL.Image'", name="PIL.Image"),
            2,
            "error: No module named 'PIL.Image'; run `pip install 'dit_fast[train]'`",
        ),
        (
            ModuleNotFoundError("No module named 'x'", name="x"),
            1,
            "error: ModuleNotFoundError: No module named 'x' (une",
        ),
        (BrokenPipeError(32, "a socket"), 1, "error: BrokenPipeError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_error_is_one_line_and_a_status(capsys, error, status, line):
    assert terminal.run(raises(error), []) == status
    assert capsys.readouterr().err.startswith(f"dit-fast: {line}")
    assert terminal.run(raises(error), []) == status
    assert capsys.readouterr().err.count("\n") == 1


def test_the_traceback_is_there_for_who_asks(capsys):
    for arguments in (["--traceback", "a"], ["a", "--traceback"]):
        assert terminal.run(lambda given: {}[given[0]], arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("Traceback")
        assert error.splitlines()[-1].startswith("dit-fast: error: KeyError: 'a'")


def test_only_the_rank_that_knows_speaks(capsys):
    class Alone(UserError):
        alone = True

    assert terminal.run(raises(UserError("all know")), [], rank=1) == 2
    assert capsys.readouterr().err == ""
    assert terminal.run(raises(Alone("rank 1 knows")), [], rank=1) == 2
    assert "rank 1 knows" in capsys.readouterr().err
    assert terminal.run(raises(OSError("here")), [], rank=1) == 1
    assert "rank 1: OSError: here" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nosuch"], ["info", "--x"], ["sample"], ["shards", "build"], ["train"]])
def test_wrong_arguments_are_one_line_too(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dit-fast: error: ")
    assert line.endswith("--help`")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "abc"}, "no WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "no RANK"),
        ({"RANK": "abc", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK='abc' is not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, "do not fit together: RANK=0 WORLD_SIZE=0"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK='-1'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT='x'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": ""}, "no MASTER_ADDR"),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "is not a whole number"),
    ],
)
def test_a_launchers_variables_are_checked(monkeypatch, capsys, environment, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", **environment}.items():
        monkeypatch.setenv(name, value)
    assert train(["quickstart"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_options_may_stand_anywhere(capsys):
    assert train(["quickstart", "--print-config", "run.seed=3"]) == 0
    assert '"seed": 3' in capsys.readouterr().out


def shell(command, code, **environment):
    """`command` with "$@" a Python process that runs `code` behind the door of the command lines."""
    lines = f"import sys\nfrom dit_fast import terminal\ndef work(_):\n    {code}\nsys.exit(terminal.run(work, []))"
    words = ["sh", "-c", command, "sh", sys.executable, "-c", lines]
    return subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "", **environment}
    )


def test_closed_and_full_streams_change_no_status():
    talk = "print('err', file=sys.stderr); print('out')"
    done = shell('"$@" 2>&-', talk)
    assert (done.returncode, done.stdout) == (0, "out\n")  # without stderr, messages would go to stdout
    done = shell('"$@" >&-', talk)
    assert (done.returncode, done.stderr) == (0, "err\n")
    assert shell('"$@" 2>&-', "raise OSError").returncode == 1
    assert shell('"$@" 2>&- >&- <&-', "assert open('/dev/null').fileno() > 2").returncode == 0
    if Path("/dev/full").exists():
        assert shell('"$@" 2> /dev/full', talk).returncode == 0
        done = shell('"$@" > /dev/full', talk)
        assert done.returncode == 1
        assert done.stderr.splitlines()[1:] == [
            f"dit-fast: error: OSError: [Errno 28] No space left on device ({terminal.ADVICE})"
        ]
    late = "sys.stdin.read(); print('out')"  # the reader has left by then
    done = shell('{ { sleep 0.2; } | "$@"; echo "status $?" >&2; } | true', late)
    assert done.stderr == "status 1\n"


def test_names_that_the_terminal_cannot_show_are_escaped():
    done = shell('"$@"', "print('caf\\u00e9 \\u732b')", PYTHONIOENCODING="ascii")
    assert (done.stdout, done.stderr) == ("caf\\xe9 \\u732b\n", "")


def test_messages_that_cannot_be_written_are_lost_and_the_work_goes_on():
    """The reader of stderr leaves in the middle of a run: it ends as if nobody had looked."""
    code = "sys.stdin.read(); [print('step', file=sys.stderr, flush=True) for _ in range(9)]; print('done')"
    done = shell('{ { sleep 0.2; } | "$@" 2>&1 >&3 | true; } 3>&1', code)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_a_place_that_export_cannot_write_names_its_own_argument(capsys):
    assert cli.main(["export", "ops", "/proc/absent/ops"]) == 2
    assert "; name another OUT" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "shards verify"])
def test_a_command_refuses_an_unknown_option_by_its_own_help(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "RUN", "--fro"])
    assert capsys.readouterr().err == (
        f"dit-fast: error: unrecognized arguments: --fro; see `dit-fast {command} --help`\n"
    )
