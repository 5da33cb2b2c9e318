"""Ranks and machines that die under torchrun and DeepSpeed, and what starts again. Launches take many seconds each."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dit_fast.errors import Status
from dit_fast.train.group import own_store
from dit_fast.train.leash import _parent
from dit_fast.train.peers import PeerLost
from dit_fast.world import World
from tests.helpers.no_gpu import no_gpu  # noqa: F401
from tests.helpers.toy_runs import (
    Ranks,
    arguments,
    environment,
    free_port,
    losses,
    processes,
    rows,
    rows_so_far,
    tensors,
    wait_for,
)

SCRIPTS = Path(sys.executable).parent
OPTIONS = ["methods=none", "engine.zero_stage=1", "run.steps=20"]


def test_a_start_does_not_read_what_the_one_before_has_left(monkeypatch):
    """One store for all starts, as torchrun keeps it; in the second start ranks 1 and 2 come before rank 0."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    agents = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores, limit = {}, timedelta(seconds=60)

    def world(rank):
        return World(rank, 3, torch.device("cpu"))

    def own():
        return dist.TCPStore("127.0.0.1", agents.port, is_master=False, wait_for_workers=False)

    def join(start, rank):
        store = stores[start, rank] = own_store(own(), world(rank), limit)
        store.set(f"address of {rank}", f"{start}")

    for start, order in enumerate([(0, 1, 2), (2, 1, 0)]):
        threads = [threading.Thread(target=join, args=(start, rank)) for rank in order]
        for thread in threads:
            thread.start()
            thread.join(0.2)
        for thread in threads:
            thread.join(60)
        assert [stores[start, 0].get(f"address of {rank}").decode() for rank in range(3)] == [str(start)] * 3
    with pytest.raises(PeerLost, match="ranks 1-2 did not come within 0 s"):
        own_store(own(), world(0), timedelta(seconds=0.2))
    with pytest.raises(dist.DistStoreError):
        own_store(own(), world(1), timedelta(seconds=0.2))


@pytest.fixture(scope="module")
def calm(shards, tmp_path_factory):
    """The run of so many ranks that nothing disturbs."""
    made = {}

    def run(size):
        if size not in made:
            folder = tmp_path_factory.mktemp("calm")
            with Ranks(arguments(shards, folder / "run", *OPTIONS), folder / "log", size=size) as ranks:
                assert ranks.wait() == [0] * size, ranks.text()
            made[size] = folder / "run"
        return made[size]

    return run


def check_equal(run, calm):
    assert rows(run) == rows(calm)
    first, second = tensors(run, 20), tensors(calm, 20)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def below(job, run):
    """{pid: environment} of the processes that a launcher started, and theirs."""
    found = {}
    for pid in processes(run):
        above = _parent(pid)
        while above > 1 and above != job.pid:
            above = _parent(above)
        if above == job.pid:
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return found


def rank_below(job, run, number):
    (pid,) = (pid for pid, words in below(job, run).items() if f"LOCAL_RANK={number}" in words)
    return pid


class Nodes:
    """Launchers as on machines of their own, one log for all; whatever still lives at the end is killed."""

    def __init__(self, run, log):
        self.run, self.log, self._file = run, log, log.open("ab")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for pid in processes(self.run):
            os.kill(pid, signal.SIGKILL)
        self._file.close()

    def start(self, *command, **variables):
        return subprocess.Popen(command, env=environment(**variables), stdout=self._file, stderr=self._file, cwd="/")

    def until(self, count, job):
        """Waits for so many rows."""
        wait_for(lambda: len(rows_so_far(self.run)) >= count or job.poll() is not None, 600)

    def kill(self, job):
        """The machine: the launcher first, so that it starts nothing, and all that it started."""
        for pid in (job.pid, *below(job, self.run)):
            os.kill(pid, signal.SIGKILL)
        job.wait()

    def text(self):
        return self.log.read_text()


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.parametrize(("size", "deaths"), [(2, (6, 14)), (4, (6,))])
def test_torchrun_starts_killed_ranks_again(shards, tmp_path, calm, size, deaths):
    """One of 2 dies twice, and one of 4: each time a rank that is left says which, and no bit is lost."""
    run = tmp_path / "run"
    with Nodes(run, tmp_path / "log") as nodes:
        job = nodes.start(
            SCRIPTS / "torchrun", "--nproc_per_node", str(size), "--master_port", str(free_port()), "--max-restarts",
            "2", "-m", "dit_fast.train", *arguments(shards, run, *OPTIONS),
        )  # fmt: skip
        for rows_before in deaths:
            nodes.until(rows_before, job)
            os.kill(rank_below(job, run, 1), signal.SIGKILL)
            wait_for(lambda: "rank 1 died" in nodes.text() or job.poll() is not None)
        assert job.wait(600) == Status.DONE, nodes.text()
    assert len(re.findall(r"error: rank 1 died or was cut off", nodes.text())) == len(deaths), nodes.text()
    check_equal(run, calm(size))


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_elastic_job_goes_on_with_the_machines_that_are_left(shards, tmp_path, calm, ranks):
    """Two machines of 1 rank (one loses its launcher) and of 2 (one loses all): half the ranks take the same steps."""
    run, port = tmp_path / "run", str(free_port())
    commands = [
        [
            SCRIPTS / "torchrun", "--nnodes", "1:2", "--nproc_per_node", str(ranks), "--max-restarts", "3",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf",
            f"is_host={node == 0},last_call_timeout=15", "-m", "dit_fast.train", *arguments(shards, run, *OPTIONS),
        ]
        for node in range(2)
    ]  # fmt: skip
    with Nodes(run, tmp_path / "log") as nodes:
        first, second = (nodes.start(*command) for command in commands)
        nodes.until(6, first)
        if ranks == 1:
            os.kill(second.pid, signal.SIGKILL)
            second.wait()
        else:
            nodes.kill(second)
        assert first.wait(600) == Status.DONE, nodes.text()
    assert nodes.text().count("error: rank") == ranks - 1, nodes.text()  # a launcher's death is no error
    sizes = re.findall(r"batch 8 = (\d) ranks x (\d) x (\d)", nodes.text())
    assert sizes == [(str(2 * ranks), str(2 // ranks), "2"), (str(ranks), str(4 // ranks), "2")], nodes.text()
    assert [row["samples"] for row in rows(run)] == [row["samples"] for row in rows(calm(2 * ranks))]
    assert losses(run) == pytest.approx(losses(calm(2 * ranks)), rel=1e-5)


def two_machines(launcher, tmp_path, port):
    """The words before dit_fast.train on each."""
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=1\nnode1 slots=1\n")
    place = ["--master_addr", "127.0.0.1", "--master_port", port]
    if launcher == "deepspeed":
        shared = [SCRIPTS / "deepspeed", "--hostfile", hosts, "--no_ssh", *place]
        return [[*shared, "--node_rank", str(node), "--module"] for node in range(2)]
    shared = [SCRIPTS / "torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", "3", *place]
    return [[*shared, "--node_rank", str(node), "-m"] for node in range(2)]


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_machine_that_is_killed_and_started_again_changes_no_bit(shards, tmp_path, calm, launcher):
    """On the other one DeepSpeed ends with the status that says to start again, and torchrun waits for the machine."""
    run = tmp_path / "run"
    commands = [
        [*words, "dit_fast.train", *arguments(shards, run, *OPTIONS)]
        for words in two_machines(launcher, tmp_path, str(free_port()))
    ]
    with Nodes(run, tmp_path / "log") as nodes:
        jobs = [nodes.start(*command) for command in commands]
        nodes.until(6, jobs[0])
        nodes.kill(jobs[1])
        if launcher == "deepspeed":
            assert jobs[0].wait(120) == Status.RESTART, nodes.text()
            jobs = [nodes.start(*command) for command in commands]
        else:
            jobs[1] = nodes.start(*commands[1])
        assert [job.wait(600) for job in jobs] == [0, 0], nodes.text()
    check_equal(run, calm(2))
