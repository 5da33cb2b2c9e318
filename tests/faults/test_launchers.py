"""Ranks end with their launcher, and say in one line when one of them has died. Each start costs seconds."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dit_fast.checkpoint.run import load_run
from dit_fast.errors import Status
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.toy_runs import Ranks, arguments, environment, free_port, processes, rows_so_far, wait_for

pytestmark = pytest.mark.launch

SCRIPTS = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": lambda: [SCRIPTS / "deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module"],
    "torchrun": lambda: [SCRIPTS / "torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m"],
}


@pytest.mark.parametrize(
    ("launcher", "victim", "number"),
    [
        ("deepspeed", "deepspeed", signal.SIGTERM),
        ("torchrun", "torchrun", signal.SIGKILL),
        # this one passes the signal on, to loader workers too
        pytest.param("deepspeed", "deepspeed.launcher.launch", signal.SIGTERM, marks=pytest.mark.long),
        pytest.param("deepspeed", "deepspeed.launcher.launch", signal.SIGKILL, marks=pytest.mark.long),
    ],
)
def test_ranks_end_with_their_launcher_and_save(shards, tmp_path, launcher, victim, number):
    run, log = tmp_path / "run", tmp_path / "log"
    command = arguments(shards, run, "run.steps=100000", "run.checkpoint_every=0", "data.num_workers=1")
    with log.open("wb") as file:
        job = subprocess.Popen(
            [*LAUNCHERS[launcher](), "dit_fast.train", *command], env=environment(), stdout=file, stderr=file, cwd="/"
        )
    try:
        wait_for(lambda: len(rows_so_far(run)) >= 3 or job.poll() is not None)
        (pid,) = (pid for pid, words in processes(run).items() if victim in map(os.path.basename, words))
        os.kill(pid, number)
        wait_for(lambda: job.poll() is not None)
        wait_for(lambda: not processes(run), timeout=60)
    finally:
        for pid in processes(run):
            os.kill(pid, signal.SIGKILL)
        job.wait()
    stopped = load_run(run).step
    assert 3 <= stopped < 100000
    text = log.read_text()
    assert f"stopped at step {stopped} as asked" in text
    assert text.count("the launcher died; this run saves and ends") == (number != signal.SIGTERM or pid == job.pid)


@pytest.mark.parametrize(
    ("shell", "script"),
    [
        ("sh", '(sleep 1; exec "$@") & exit'),  # its parent has left: process 1 takes it in
        ("deepspeed.launcher.launch", '"$@"; true'),  # it has a parent, but there is no `deepspeed` above that
    ],
)
def test_a_rank_whose_launcher_has_died_ends_before_it_begins(shards, tmp_path, shell, script):
    run, log = tmp_path / "run", tmp_path / "log"
    words = [sys.executable, "-m", "dit_fast.train", *arguments(shards, run)]
    with log.open("wb") as file:
        command = [shell, "-c", script, "sh", *words]
        subprocess.run(
            command, executable="/bin/sh", env=environment(CROSS_RANK="0"), stdout=file, stderr=file, check=True
        )
    wait_for(log.read_text)
    wait_for(lambda: not processes(run))
    assert log.read_text() == "dit-fast: rank ?: the launcher died before this process began\n"
    assert not run.exists()


@pytest.mark.parametrize("victim", [0, 1])  # the store dies with rank 0
def test_the_death_of_a_rank_is_one_line(shards, tmp_path, victim):
    run = tmp_path / "run"
    with Ranks(arguments(shards, run, "run.steps=100000", "engine.global_batch=6"), tmp_path / "log", size=3) as ranks:
        wait_for(lambda: len(rows_so_far(run)) >= 3 or ranks.processes[0].poll() is not None)
        left = [process for rank, process in enumerate(ranks.processes) if rank != victim]
        ranks.processes[victim].kill()
        codes = [process.wait(60) for process in left]
        said = [line for line in ranks.text().splitlines() if not re.match(r"step \d|dit-fast: (?!error)", line)]
    assert codes == [Status.RESTART, Status.RESTART], "\n".join(said)
    assert len(said) == 1, "\n".join(said)
    (line,) = said
    assert re.match(rf"dit-fast: error: rank {victim} died or was cut off \(.+\); the same command goes on from", line)


def test_a_rank_that_has_stopped_is_named_and_the_others_end(shards, tmp_path):
    """The thread that says so runs while the main one is stuck in a collective."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = arguments(shards, run, "run.steps=100000", "run.checkpoint_every=0", "engine.timeout=20")
    with Ranks(command, log) as ranks:
        wait_for(lambda: len(rows_so_far(run)) >= 3 or ranks.processes[0].poll() is not None)
        ranks.processes[1].send_signal(signal.SIGSTOP)
        assert ranks.processes[0].wait(90) == Status.RESTART, ranks.text()
        text = ranks.text()
    assert re.search(r"no progress for \d+ s after step \d+: rank 1 ", text), text
    (line,) = (line for line in text.splitlines() if "error" in line)
    assert re.search(r"\(engine.timeout\): rank 1 gives no sign of life .*; rank 0 waits in all_reduce of \d+;", line)
