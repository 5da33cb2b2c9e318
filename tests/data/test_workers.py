"""Threads that read ahead: errors come from `next`, in their place; nothing keeps a program from ending."""

import itertools
import multiprocessing
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from dit_fast.data import Plan, build_loader, loader, open_dataset
from dit_fast.data.reader import IndexedReader
from dit_fast.errors import ConfigError, DataError

OPTIONS = {"global_batch": 4, "micro_batch": 4, "rank": 0, "world_size": 1, "start": 0}


def batches(folder, **options):
    dataset = open_dataset(folder)
    return build_loader(dataset, Plan(dataset.info.shard_sizes, 0, 2), **{**OPTIONS, "num_workers": 2, **options})


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-")]


def test_batches_are_read_ahead_by_threads_that_end_with_the_iterator(built):
    found = batches(built)
    assert [batch["position"][0].item() for batch in itertools.islice(found, 6)] == [0, 4, 8, 12, 16, 20]
    assert len(threads()) == 2
    assert not multiprocessing.active_children()
    found.close()
    for thread in threads():
        thread.join(10)
    assert not threads()


def test_an_error_comes_in_its_place(built, monkeypatch):
    real = IndexedReader.read

    def read(self, positions, samples):
        if positions[0] == 12:
            raise DataError("here")
        return real(self, positions, samples)

    monkeypatch.setattr(IndexedReader, "read", read)
    found, seen = batches(built), []
    with pytest.raises(DataError, match=r"^here$"):
        seen.extend(found)
    with pytest.raises(StopIteration):
        next(found)
    monkeypatch.setattr(IndexedReader, "read", lambda *_: 1 / 0)  # a fault of the program keeps its traceback
    with pytest.raises(ZeroDivisionError):
        next(batches(built))


def test_a_read_that_hangs_and_one_that_runs_out_of_memory(built, monkeypatch):
    monkeypatch.setattr(loader, "HANGING_SECONDS", 0.2)
    monkeypatch.setattr(IndexedReader, "read", lambda *_: time.sleep(3))
    with pytest.raises(DataError, match=r"no batch came in 0.2 s; the disk or its server hangs"):
        next(batches(built))

    def hungry(*_):
        raise MemoryError

    monkeypatch.setattr(IndexedReader, "read", hungry)
    for num_workers in (0, 1):
        with pytest.raises(DataError, match="no memory for a batch"):
            next(batches(built, num_workers=num_workers))


LEFT_OPEN = """
import sys, threading, time
from dit_fast.data import Plan, build_loader, open_dataset
from dit_fast.data.reader import IndexedReader
dataset, read, hanging = open_dataset(sys.argv[1]), IndexedReader.read, threading.Event()
def hang(reader, positions, samples):  # a disk that does so from the third batch on
    if positions[0] < 8:
        return read(reader, positions, samples)
    hanging.set()
    time.sleep(600)
IndexedReader.read = hang
found = build_loader(dataset, Plan(dataset.info.shard_sizes, 0, 2), global_batch=4, micro_batch=4, rank=0, world_size=1,
                     start=0, num_workers=2)
next(found), next(found), hanging.wait()
sys.exit(7)
"""


def test_a_program_ends_though_its_loader_was_not_closed_and_a_thread_hangs(built):
    done = subprocess.run([sys.executable, "-c", LEFT_OPEN, built], timeout=120, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (7, b"")


IN_THE_MIDDLE = """
import sys
from dit_fast.data import Plan, build_loader, open_dataset
from dit_fast.data.reader import IndexedReader
dataset, read = open_dataset(sys.argv[1]), IndexedReader.read
found = build_loader(dataset, Plan(dataset.info.shard_sizes, 0, 2), global_batch=4, micro_batch=4, rank=0, world_size=1,
                     start=0, num_workers=2)
next(found)
IndexedReader.read = lambda *arguments: [read(*arguments) for _ in range(500)][0]
next(found)
sys.exit(7)
"""


def test_a_program_ends_well_while_threads_read(built):
    """One that comes back from compiled code while Python is taken down would end it with SIGABRT."""
    done = subprocess.run([sys.executable, "-c", IN_THE_MIDDLE, built], timeout=120, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (7, b"")


def test_absurd_numbers_of_workers(built, monkeypatch):
    with pytest.raises(ConfigError, match=r"data.num_workers is 100000; a rank takes at most 256"):
        batches(built, num_workers=100_000)

    def full(*_):
        raise RuntimeError("can't start new thread")

    found = batches(built)
    monkeypatch.setattr(threading.Thread, "start", full)
    with pytest.raises(DataError, match=r"2 reading threads cannot be started \(can't start new thread\)"):
        next(found)
    monkeypatch.undo()
    assert np.array_equal(next(batches(built, num_workers=0))["position"], np.arange(4))
