"""Loader workers that die, hang or cannot start: one line from `next`, nowhere else, and no noise on Ctrl-C."""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch

from dit_fast.data import Plan, build_loader, loader, open_dataset
from dit_fast.data.reader import IndexedReader
from dit_fast.errors import ConfigError, DataError

OPTIONS = {"global_batch": 4, "micro_batch": 4, "rank": 0, "world_size": 1, "start": 0}

KEPT = []


def batches(folder, **options):
    dataset = open_dataset(folder)
    return build_loader(dataset, Plan(dataset.info.shard_sizes, 0, 2), **{**OPTIONS, "num_workers": 2, **options})


def workers():
    return multiprocessing.active_children()


@pytest.mark.launch
def test_a_connection_that_ends_before_its_worker_does():
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    worker.start()

    def reset(_):
        raise ConnectionResetError

    threading.Timer(0.3, worker.kill).start()
    found = type("Batches", (), {"_workers": [worker], "__next__": reset})()
    assert "a loader worker was killed" in str(loader._next(found, 2))


KILLED = "a loader worker was killed, most often because memory ran out; use fewer than 2 data"


@pytest.mark.launch
@pytest.mark.parametrize(
    ("reader", "number", "words"),
    [
        ("indexed", signal.SIGKILL, KILLED),
        ("stream", signal.SIGKILL, KILLED),
        ("indexed", signal.SIGBUS, "/dev/shm is full"),
        ("indexed", signal.SIGSEGV, "a loader worker ended by SIGSEGV"),
    ],
)
def test_a_killed_worker_is_one_line_from_next(built, monkeypatch, reader, number, words):
    monkeypatch.setattr(loader, "POLL_SECONDS", 1)
    before = signal.getsignal(signal.SIGCHLD)
    found = batches(built, reader=reader)
    next(found)
    assert signal.getsignal(signal.SIGCHLD) == before
    os.kill(workers()[0].pid, number)
    time.sleep(0.3)  # a signal handler of torch would raise here, in the middle of a step
    with pytest.raises(DataError, match=words) as caught:
        list(itertools.islice(found, 20))
    assert "\n" not in str(caught.value)


@pytest.mark.launch
def test_signals_to_the_whole_group_are_the_trainers(built, capfd):
    found = batches(built)
    list(itertools.islice(found, 4))  # both workers have begun: a signal before that ends them
    mine = workers()
    for number in (signal.SIGINT, signal.SIGTERM):
        for worker in mine:
            os.kill(worker.pid, number)
    time.sleep(0.2)
    assert len(list(itertools.islice(found, 20))) == 20
    found.close()
    assert not any(worker.is_alive() for worker in mine)
    assert "KeyboardInterrupt" not in capfd.readouterr().err


def leave_one_open(folder):
    KEPT.append(batches(folder))
    next(KEPT[0])
    sys.exit(7)


@pytest.mark.launch
def test_a_program_ends_though_its_loader_was_not_closed(built):
    process = multiprocessing.get_context("fork").Process(target=leave_one_open, args=(built,))
    process.start()
    process.join(30)
    code = process.exitcode
    process.kill()
    assert code == 7


@pytest.mark.launch
def test_a_worker_that_hangs_and_one_that_runs_out_of_memory(built, monkeypatch):
    monkeypatch.setattr(loader, "HANGING_SECONDS", 2)
    monkeypatch.setattr(loader, "POLL_SECONDS", 1)
    monkeypatch.setattr(IndexedReader, "read", lambda *_: time.sleep(3))
    with pytest.raises(DataError, match=r"no batch came in 2 s; the disk or its server hangs"):
        next(batches(built))

    monkeypatch.setattr(IndexedReader, "read", lambda *_: os._exit(0))
    with pytest.raises(DataError, match="a loader worker ended before its work was done; use fewer than"):
        next(batches(built))

    def hungry(*_):
        raise MemoryError

    monkeypatch.setattr(IndexedReader, "read", hungry)
    for num_workers in (0, 1):
        with pytest.raises(DataError, match="no memory for a batch"):
            next(batches(built, num_workers=num_workers))
    monkeypatch.undo()

    def full(*_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(DataError, match=r"No space left on device .*--shm-size"):
        next(batches(built))


def test_absurd_numbers_of_workers(built, monkeypatch):
    with pytest.raises(ConfigError, match=r"data.num_workers is 100000; a rank takes at most 256"):
        batches(built, num_workers=100_000)

    def full(*_):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", full)
    with pytest.raises(DataError, match=r"2 loader workers cannot be started \(Resource temporarily unavailable\)"):
        next(batches(built))
    monkeypatch.undo()
    assert np.array_equal(next(batches(built, num_workers=0))["position"], np.arange(4))
