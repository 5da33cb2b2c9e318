"""The lock of a run folder: held by the kernel for the whole run, so nothing a process leaves behind can hold it."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from dit_fast.errors import UserError
from dit_fast.train import lock
from dit_fast.train.lock import FILE, RunLock

HOLD = """
import sys, os
from pathlib import Path
from dit_fast.train.lock import RunLock
held = RunLock(Path(sys.argv[1]))
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(lock, "LEAVING", 0.3)
    monkeypatch.setattr(lock, "PATIENCE", 1.0)
    monkeypatch.setattr(lock, "SETTLE", 0.1)


def holder(run, *prefix):
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip()
    return process


def record(**changes):
    return json.dumps({"host": "elsewhere", "pid": 1, "boot": "another", **changes})


def test_a_second_writer_is_refused_until_the_first_has_left(tmp_path):
    first = RunLock(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} on .* is writing .*waited 0 s.*another run.dir"):
        RunLock(tmp_path)
    first.release()
    assert (tmp_path / FILE).read_text() == ""
    first.release()
    second = RunLock(tmp_path)
    first.release()  # of a lock it no longer owns: nothing happens
    assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    with pytest.raises(UserError):
        RunLock(tmp_path)
    second.release()


def test_a_killed_holder_holds_nothing_even_as_a_zombie(tmp_path):
    with holder(tmp_path) as process:
        with pytest.raises(UserError, match=f"process {process.pid} on {socket.gethostname()} is"):
            RunLock(tmp_path)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but nobody has asked for its status
        RunLock(tmp_path).release()


def test_another_container_of_the_same_name_is_another_writer(tmp_path):
    inside = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no permission to make a pid namespace")
    with holder(tmp_path, *inside) as process:
        with pytest.raises(UserError, match="in another container"):
            RunLock(tmp_path)
        process.kill()


def test_a_child_that_outlives_the_holder_does_not_keep_the_lock(tmp_path):
    held = RunLock(tmp_path)
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        held.release()
        RunLock(tmp_path).release()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_holder_on_another_kernel_lives_as_long_as_it_renews(tmp_path):
    path = tmp_path / FILE
    path.write_text(record())
    os.utime(path, (time.time() + 86400,) * 2)  # written under a clock that is ahead: its age says nothing
    begun = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - begun > lock.PATIENCE
    path.write_text(record())
    renewing = subprocess.Popen(["sh", "-c", f"sleep 0.3; touch -m {path}"])
    with pytest.raises(UserError, match="process 1 on elsewhere is writing to this run folder and renews its lock"):
        RunLock(tmp_path)
    renewing.wait()
    path.write_text(record())
    os.utime(path, (time.time() - 3600,) * 2)  # silent for an hour: no reason to wait
    begun = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - begun < lock.PATIENCE


@pytest.mark.parametrize("content", ["7", "null", "[]", "{", '{"pid": 1}', "[" * 4000, "\xff", "x" * 10_000])
def test_a_damaged_record_without_its_lock_holds_nothing(tmp_path, content):
    (tmp_path / FILE).write_text(content, encoding="latin-1")
    RunLock(tmp_path).release()


def test_a_strange_record_is_shown_in_one_line(tmp_path):
    path = tmp_path / FILE
    path.write_text(record(pid=10**30, host="\x1b[31mred\n" * 99, boot=None))
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError) as caught:
            RunLock(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_what_is_no_lock_file_is_named(tmp_path):
    (tmp_path / "a" / FILE).mkdir(parents=True)
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / FILE)
    (tmp_path / "c").write_text("a file")
    for name, reason in (("a", "Is a directory"), ("b", "not a regular file"), ("c", "run.dir=.*File exists")):
        with pytest.raises(UserError, match=rf"{tmp_path / name}.*{reason}" if name != "c" else reason):
            RunLock(tmp_path / name)


def test_without_flock_the_record_decides(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    first = RunLock(tmp_path)
    renewing = subprocess.Popen(["sh", "-c", f"sleep 0.3; touch -m {tmp_path / FILE}"])
    with pytest.raises(UserError, match="renews its lock"):
        RunLock(tmp_path)
    renewing.wait()
    (tmp_path / FILE).write_text(record())  # somebody believed this process dead and took over
    first._look()
    with pytest.raises(UserError, match=r"process 1 on elsewhere .*lost its lock"):
        first.renew()
    first.release()
    assert (tmp_path / FILE).read_text() == record()


def test_a_removed_file_is_put_back(tmp_path):
    held = RunLock(tmp_path)
    (tmp_path / FILE).unlink()
    held._look()
    held.renew()
    with pytest.raises(UserError, match="is writing"):
        RunLock(tmp_path)
    held.release()
