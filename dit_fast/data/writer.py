"""Writes a data set shard by shard, in several processes, so that a killed or failed run is continued.

A shard is one unit of work: its bytes depend on the samples alone, never on the number of processes. Finished shards
are recorded under `.build`; `dataset.json` comes last, and `.build` goes.
"""

import errno
import fcntl
import glob
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dit_fast.data.dataset import FILE_NAME, LatentDataset, ShardInfo, description_bytes, make_description, open_dataset
from dit_fast.data.files import bar, reason
from dit_fast.data.index import index_path
from dit_fast.data.shards import MOMENTS_MEMBER, ShardWriter, key_of, npy_bytes, write_atomic
from dit_fast.errors import DataError, UserError
from dit_fast.options import diff

STATE_FOLDER = ".build"
MANY_PROCESSES = 64
Sample = tuple[dict[str, bytes], int, np.ndarray]  # members but the label's and moments'; label; moments [2, C, h, w]


class Producer(Protocol):
    """Makes samples. It is sent to the worker processes, so it holds specs and loads networks when first used."""

    members: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]  # of the moments, [2, C, h, w]

    def name(self, number: int) -> str:
        """What a message calls the sample with this source number."""
        ...

    def samples(self, numbers: np.ndarray, shard: int) -> Iterator[Sample]:
        """The samples with these source numbers, in order."""
        ...


def write_dataset(
    out: Path,
    producer: Producer,
    order: np.ndarray,
    info: Mapping[str, Any],
    settings: Mapping[str, Any],
    samples_per_shard: int,
    processes: int,
    progress: bool,
) -> LatentDataset:
    """Writes the samples `order` (source numbers, int64 [N]) to shards in `out`; continues what is there.

    info: the part of `dataset.json` known beforehand. settings: everything that decides the bytes; a run with other
    settings in the same folder is refused with the difference. Raises DataError, one line, with finished shards kept.
    """
    check_amounts(samples_per_shard, processes)
    for name in ("scale", "shift"):  # as the reader will demand
        with np.errstate(over="ignore"):
            value = np.array(info[name], np.float32)
        if not np.isfinite(value).all() or (name == "scale" and (value <= 0).any()):
            what = "finite number above 0" if name == "scale" else "finite number"
            raise DataError(f"{name} {info[name]} is not a {what} in float32; correct it or the autoencoder")
    with one_line_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if (out / FILE_NAME).is_file():
            found = _read_json(out / FILE_NAME).get("settings")
            _refuse_other(out, found if isinstance(found, dict) else {}, settings)
            return open_dataset(out)
    with one_line_errors(out), _locked(out):
        state = out / STATE_FOLDER
        if (state / "settings.json").is_file():
            _refuse_other(out, _read_json(state / "settings.json"), settings)
        else:
            foreign = sorted(out.glob("shard-*.tar"))
            if foreign:
                raise DataError(f"{foreign[0]}: a shard of another data set; use another folder or delete it")
            write_atomic(state / "settings.json", json.dumps(settings, indent=1).encode())
        for partial in [*out.glob("shard-*.partial"), *state.glob("*.partial")]:
            partial.unlink()
        count = -(-len(order) // samples_per_shard)
        tasks = [
            _Task(producer, order[first : first + samples_per_shard], first, number, out)
            for number, first in enumerate(range(0, len(order), samples_per_shard))
        ]
        todo = [task for task in tasks if not task.finished()]
        with bar(len(order), len(order) - sum(len(task.numbers) for task in todo), "shards", progress) as advance:
            for samples in _run(todo, processes):
                advance(samples)
        results = [json.loads((state / f"{shard_name(number)}.json").read_bytes()) for number in range(count)]
        shards = [ShardInfo(**result["shard"]) for result in results]
        content = {**info, "statistics": _statistics(results), "settings": dict(settings)}
        write_atomic(out / FILE_NAME, description_bytes(make_description(content, shards)))
    shutil.rmtree(out / STATE_FOLDER)
    return open_dataset(out)


def check_amounts(samples_per_shard: int, processes: int) -> None:
    """Raises DataError unless both are at least 1 and the processes not far more than this machine can run."""
    if samples_per_shard < 1 or processes < 1:
        raise DataError(f"samples_per_shard={samples_per_shard}, processes={processes}: both must be at least 1")
    most = max(MANY_PROCESSES, 2 * (os.cpu_count() or 1))
    if processes > most:
        raise DataError(f"processes={processes}: at most {most} on this machine; give fewer")


def shard_name(number: int) -> str:
    """`shard-000012.tar`."""
    return f"shard-{number:06d}.tar"


class _Task:
    """One shard: which samples, and where it goes."""

    def __init__(self, producer: Producer, numbers: np.ndarray, first_key: int, shard: int, out: Path):
        self.producer, self.numbers, self.first_key, self.shard = producer, numbers, first_key, shard
        self.path = out / shard_name(shard)
        self.record = out / STATE_FOLDER / f"{shard_name(shard)}.json"

    def finished(self) -> bool:
        if not (self.record.is_file() and self.path.is_file() and index_path(self.path).is_file()):
            return False
        try:
            return self.path.stat().st_size == json.loads(self.record.read_bytes())["shard"]["bytes"]
        except (ValueError, KeyError, TypeError):  # a damaged record: write the shard again
            return False

    def write(self, stopped: Callable[[], bool]) -> bool:
        """Writes the shard; False when told to stop before the end."""
        try:
            return self._write(stopped)
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise
        except (MemoryError, torch.OutOfMemoryError):
            raise DataError(
                f"{self.path}: out of memory; run the same command again with fewer processes, or give a smaller "
                "--batch-size or --size in another folder"
            ) from None

    def _write(self, stopped: Callable[[], bool]) -> bool:
        sums, count = np.zeros((2, 0)), 0
        with ShardWriter(self.path, self.producer.members, self.first_key) as writer:
            for payload, label, moments in self.producer.samples(self.numbers, self.shard):
                if stopped():
                    writer.abort()
                    return False
                writer.add({**payload, MOMENTS_MEMBER: self._moments(moments, count)}, label)
                mean, std = moments.astype(np.float64).reshape(2, moments.shape[1], -1)
                sample = np.stack([mean.sum(1), (mean**2 + std**2).sum(1)])
                sums, count = (sample if not count else sums + sample), count + 1
            index = writer.close()
        result = {
            "shard": {"name": self.path.name, "samples": count, "bytes": index.tar_bytes, "sha256": writer.sha256},
            "sums": sums.tolist(),
            "values": count * mean.shape[1],
        }
        write_atomic(self.record, json.dumps(result).encode())
        return True

    def _moments(self, moments: np.ndarray, row: int) -> bytes:
        with np.errstate(over="ignore"):
            stored = moments.astype(self.producer.dtype)
        wrong = ""
        if moments.shape != self.producer.shape:
            wrong = f"latents {moments.shape} where {self.producer.shape} were announced; use another autoencoder"
        elif not np.isfinite(moments).all():
            wrong = "latents that are NaN or infinite; correct that input or use another autoencoder"
        elif (moments[1] < 0).any():
            wrong = "latents with a negative standard deviation; use another autoencoder"
        elif not np.isfinite(stored).all():
            wrong = f"latents that are not finite in {self.producer.dtype}; use --dtype float32 or another autoencoder"
        if wrong:
            place = f"{self.path}: sample {key_of(self.first_key + row)}"
            raise DataError(f"{place} ({self.producer.name(int(self.numbers[row]))}) has {wrong}")
        return npy_bytes(stored)


def _run(tasks: Sequence[_Task], processes: int) -> Iterator[int]:
    """Runs the tasks; yields the number of samples of each finished one. Raises the first error."""
    if processes == 1 or len(tasks) < 2:
        with one_thread():
            for task in tasks:
                task.write(lambda: False)
                yield len(task.numbers)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    workers = min(processes, len(tasks))
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(stop,)) as pool:
        waiting = iter(tasks)
        # Ctrl-C goes to the whole group: workers that still import would answer with a traceback each
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # workers inherit it
        try:
            running = {pool.submit(_work, task) for task in islice(waiting, 2 * workers)}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    outcome = future.result()
                    if isinstance(outcome, Exception):
                        raise outcome
                    yield outcome
                running |= {pool.submit(_work, task) for task in islice(waiting, len(done))}
        except BrokenProcessPool:
            raise DataError(
                "a worker process died (out of memory?); run the same command again, with fewer processes"
            ) from None
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


_stop: Any = None


def _start_worker(stop: Any) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: Any) -> None:
    """Ends this worker when its parent is gone, even when that was killed."""
    parent.join()
    os._exit(1)


def _work(task: _Task) -> int | Exception:
    try:
        return len(task.numbers) if task.write(_stop.is_set) else 0
    except (UserError, OSError) as error:
        return error


def _statistics(results: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Mean and std per channel of the sampled latents: E[mean], sqrt(E[mean^2 + std^2] - E[mean]^2)."""
    total = np.zeros_like(np.array(results[0]["sums"]))
    values = sum(result["values"] for result in results)
    for result in results:
        total = total + np.array(result["sums"])
    mean, square = total / values
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(square - mean**2, 0)).tolist()}


def _refuse_other(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    changes = diff(old, json.loads(json.dumps(new)))
    if changes:
        raise DataError(
            f"{out}: was begun with other settings ({'; '.join(changes)}); use those, another folder, or delete it"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise DataError(f"{path}: damaged, or not written by dit_fast; use another folder or delete this one")
    return content


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, as in the workers, so that sums are taken in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    (out / STATE_FOLDER).mkdir(exist_ok=True)
    with open(out / STATE_FOLDER / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: another process is building here; wait for it or choose another folder") from None
        yield


@contextmanager
def one_line_errors(out: Path) -> Iterator[None]:
    """Turns an OSError while writing in `out` into a DataError that says what is kept."""
    try:
        yield
    except OSError as error:
        kept, place = len(glob.glob("shard-*.json", root_dir=out / STATE_FOLDER)), error.filename or out
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            there = next(folder for folder in (out, *out.resolve().parents) if os.path.isdir(folder))
            full = f"no space left ({shutil.disk_usage(there).free / 2**20:.0f} MiB free)"
            raise DataError(
                f"{place}: {full}; free some and run the same command again, {kept} finished shards are kept"
            ) from None
        raise DataError(f"{place}: cannot be written ({reason(error)}); {kept} finished shards are kept") from None
