"""Writes families of shards, in several processes, so that a killed or failed run is continued.

A shard is one unit of work: its bytes depend on the samples alone, never on the number of processes. Finished shards
are recorded in a hidden folder; `dataset.json` comes last, and that folder goes.
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
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dit_fast import files
from dit_fast.data.address import read_bytes
from dit_fast.data.dataset import DESCRIPTION_BYTES, LatentDataset, open_dataset
from dit_fast.data.description import FILE_NAME, FORMAT, VERSION, WITH_STD, description_bytes, field_entry
from dit_fast.data.field import MOMENTS, Family, Field
from dit_fast.data.files import bar, reason
from dit_fast.data.index import index_path, index_to_bytes
from dit_fast.data.shards import ShardWriter, key_of
from dit_fast.errors import ConfigError, DataError, UserError
from dit_fast.options import diff

SHARD = "shard"  # what the names of the tars with the latents begin with
MANY_PROCESSES = 64


class Producer(Protocol):
    """Makes samples. It is sent to the worker processes, so it holds specs and loads networks when first used."""

    @property
    def fields(self) -> Mapping[str, Field]:
        """What it gives; labels go with moments."""
        ...

    def name(self, number: int) -> str:
        """What a message calls the sample with this source number."""
        ...

    def samples(self, numbers: np.ndarray, shard: int) -> Iterator[tuple[Mapping[str, np.ndarray], int | None]]:
        """An array per field, and the label, of the samples with these source numbers, in order."""
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

    info: the part of `dataset.json` that is known beforehand and that the producer's fields do not tell; without scale
    and shift, those are what makes the mean of every channel of these samples 0 and its deviation 1. settings:
    everything that decides the bytes; a run with other settings in the same folder is refused with the difference.
    The caller has seen to `check_amounts` and `check_scaling`. Raises DataError, one line, with finished shards kept.
    """
    with one_line_errors(Unfinished(out, SHARD)):
        out.mkdir(parents=True, exist_ok=True)
        if (out / FILE_NAME).is_file():
            found = read_json(out / FILE_NAME).get("settings")
            refuse_other(out, found if isinstance(found, dict) else {}, settings, Unfinished(out, SHARD).instead)
            return open_dataset(out)
    sizes = [min(samples_per_shard, len(order) - first) for first in range(0, len(order), samples_per_shard)]
    with writing(Unfinished(out, SHARD), settings) as state:
        results = write_shards(state, producer, order, sizes, processes, progress)
        moments, statistics = producer.fields[MOMENTS], _statistics(results)
        description = {
            "format": FORMAT,
            "version": VERSION if moments.shape[0] == 1 else WITH_STD,
            "num_samples": len(order),
            **({} if "scale" in info else _standardising(out, statistics)),
            **info,
            "dtype": moments.dtype,
            "latent_shape": moments.shape[1:],
            "fields": {name: field_entry(field) for name, field in producer.fields.items() if name != MOMENTS},
            "statistics": statistics,
            "settings": dict(settings),
            "shards": [result["shard"] for result in results],
        }
        files.replace(out / FILE_NAME, description_bytes(description))
    return open_dataset(out)


@dataclass(frozen=True)
class Unfinished:
    """A family that is being written. folder: where finished shards are recorded."""

    out: Path
    prefix: str

    @property
    def folder(self) -> Path:
        return self.out / (".build" if self.prefix == SHARD else f".build-{self.prefix}")

    def tar(self, shard: int) -> Path:
        """`shard-000012.tar`."""
        return self.out / f"{self.prefix}-{shard:06d}.tar"

    @property
    def instead(self) -> str:
        """What to do about one that was begun otherwise; a field's has finished shards of others beside it."""
        if self.prefix == SHARD:
            return "use those, another folder, or delete it"
        return f"use those, another name, or delete {self.folder.name} and {self.prefix}-*.tar there"

    def record(self, shard: int) -> Path:
        return self.folder / f"{self.tar(shard).name}.json"


@contextmanager
def writing(state: Unfinished, settings: Mapping[str, Any]) -> Iterator[Unfinished]:
    """The only writer of a family, with what a run before it left; its records go when all is done.

    Raises DataError, one line, for another writer, other settings than it was begun with, and foreign tars.
    """
    out = state.out
    with one_line_errors(state):
        state.folder.mkdir(exist_ok=True)
        with _locked(state):
            if (state.folder / "settings.json").is_file():
                refuse_other(out, read_json(state.folder / "settings.json"), settings, state.instead)
            else:
                foreign = sorted(out.glob(f"{state.prefix}-*.tar"))
                if foreign:
                    raise DataError(f"{foreign[0]}: a shard of another data set; use another folder or delete it")
                files.replace(state.folder / "settings.json", json.dumps(settings, indent=1).encode())
            for partial in [*out.glob(f"{state.prefix}-*.partial"), *state.folder.glob("*.partial")]:
                partial.unlink()
            yield state
    shutil.rmtree(state.folder)


def write_shards(
    state: Unfinished, producer: Producer, order: np.ndarray, sizes: Sequence[int], processes: int, progress: bool
) -> list[dict[str, Any]]:
    """Writes the samples `order` to shards of these sizes, but those that are there; what is known of each."""
    firsts = np.cumsum([0, *sizes]).tolist()
    tasks = [
        _Task(state, producer, order[first : first + size], first, shard)
        for shard, (first, size) in enumerate(zip(firsts, sizes, strict=False))
    ]
    todo = [task for task in tasks if not task.finished()]
    done = len(order) - sum(len(task.numbers) for task in todo)
    with bar(len(order), done, "shards", progress) as advance:
        for samples in _run(todo, processes):
            advance(samples)
    return [json.loads(state.record(task.shard).read_bytes()) for task in tasks]


def check_amounts(samples_per_shard: int, processes: int) -> None:
    """Raises DataError unless both are at least 1 and the processes not far more than this machine can run."""
    if samples_per_shard < 1 or processes < 1:
        raise DataError(f"samples_per_shard={samples_per_shard}, processes={processes}: both must be at least 1")
    most = max(MANY_PROCESSES, 2 * (os.cpu_count() or 1))
    if processes > most:
        raise DataError(f"processes={processes}: at most {most} on this machine; give fewer")


def check_scaling(scale: float | Sequence[float], shift: float | Sequence[float]) -> None:
    """Raises ConfigError unless the reader, to whom they are float32, will take them; one number or one per channel."""
    with np.errstate(over="ignore"):
        scales, shifts = np.array(scale, np.float32), np.array(shift, np.float32)
    if not (np.isfinite(scales).all() and np.isfinite(shifts).all() and (scales > 0).all()):
        raise ConfigError(
            f"scale={scale}, shift={shift}: both must be finite and scale above 0 in float32; correct them or the "
            "autoencoder"
        )


class _Task:
    """One shard: which samples, and where it goes."""

    def __init__(self, state: Unfinished, producer: Producer, numbers: np.ndarray, first_key: int, shard: int):
        self.producer, self.numbers, self.first_key, self.shard = producer, numbers, first_key, shard
        self.path, self.record = state.tar(shard), state.record(shard)

    def finished(self) -> bool:
        if not (self.record.is_file() and self.path.is_file() and index_path(self.path).is_file()):
            return False
        try:
            return self.path.stat().st_size == json.loads(self.record.read_bytes())["shard"]["bytes"]
        except (ValueError, KeyError, TypeError):  # a damaged record: write the shard again
            return False

    def write(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Writes the shard, its index and what is known of it. Raises DataError when told to stop before the end."""
        try:
            self._write(stopped)
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise
        except (MemoryError, torch.OutOfMemoryError):
            raise DataError(
                f"{self.path}: out of memory; run the same command again with fewer processes, or give a smaller "
                "--batch-size or --size in another folder"
            ) from None

    def _write(self, stopped: Callable[[], bool]) -> None:
        sums, count, values = np.zeros((2, 0)), 0, 0
        fields = self.producer.fields
        with files.replacing(self.path) as file:
            writer = ShardWriter(file, Family((), fields).members, self.first_key)
            for arrays, label in self.producer.samples(self.numbers, self.shard):
                if stopped():
                    raise DataError(f"{self.path}: not finished, because another shard failed")
                writer.add(
                    {field.member: self._encoded(name, arrays[name], count) for name, field in fields.items()}, label
                )
                if MOMENTS in arrays:
                    moments = arrays[MOMENTS]
                    mean, *std = moments.astype(np.float64).reshape(*moments.shape[:2], -1)
                    sample = np.stack([mean.sum(1), sum((each**2 for each in std), mean**2).sum(1)])
                    sums, values = (sample if not count else sums + sample), values + mean.shape[1]
                count += 1
            index = writer.finish()
            files.replace(index_path(self.path), index_to_bytes(index))
        result = {
            "shard": {"name": self.path.name, "samples": count, "bytes": index.tar_bytes, "sha256": writer.sha256},
            "sums": sums.tolist(),
            "values": values,
        }
        files.replace(self.record, json.dumps(result).encode())

    def _encoded(self, name: str, array: np.ndarray, row: int) -> bytes:
        try:
            return self.producer.fields[name].encode(array, name)
        except DataError as error:
            place = f"{self.path}: sample {key_of(self.first_key + row)}"
            raise DataError(f"{place} ({self.producer.name(int(self.numbers[row]))}) has {error}") from None


def _run(tasks: Sequence[_Task], processes: int) -> Iterator[int]:
    """Runs the tasks; yields the number of samples of each finished one. Raises the first error."""
    if processes == 1 or len(tasks) < 2:
        with one_thread():
            for task in tasks:
                task.write()
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
        task.write(_stop.is_set)
        return len(task.numbers)
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


def _standardising(out: Path, statistics: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Scale and shift by channel, in float32 as they will be read. Raises DataError for a channel that is constant."""
    mean, std = (np.array(statistics[name]) for name in ("mean", "std"))
    flat = np.flatnonzero(std <= 1e-6 * np.maximum(np.abs(mean), 1e-30))
    if len(flat):
        raise DataError(
            f"{out}: channel {flat[0]} of the latents is the same in all samples ({len(flat)} such channels), so it "
            "cannot be scaled to deviation 1; use another encoder or more images"
        )
    return {"scale": (1 / std).tolist(), "shift": (-mean / std).tolist()}


def refuse_other(out: Path, old: Mapping[str, Any], new: Mapping[str, Any], instead: str) -> None:
    changes = diff(old, json.loads(json.dumps(new)))
    if changes:
        raise DataError(f"{out}: was begun with other settings ({'; '.join(changes)}); {instead}")


def read_json(path: Path) -> dict[str, Any]:
    data = read_bytes(str(path), DESCRIPTION_BYTES)
    try:
        content = json.loads(data)
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
def _locked(state: Unfinished) -> Iterator[None]:
    with open(state.folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{state.out}: another process is building here; wait for it or choose another folder"
            ) from None
        yield


@contextmanager
def one_line_errors(state: Unfinished) -> Iterator[None]:
    """Turns an OSError while writing a family into a DataError that says what is kept."""
    out = state.out
    try:
        yield
    except OSError as error:
        kept, place = len(glob.glob("*.tar.json", root_dir=state.folder)), error.filename or out
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            there = next(folder for folder in (out, *out.resolve().parents) if os.path.isdir(folder))
            full = f"no space left ({shutil.disk_usage(there).free / 2**20:.0f} MiB free)"
            raise DataError(
                f"{place}: {full}; free some and run the same command again, {kept} finished shards are kept"
            ) from None
        raise DataError(f"{place}: cannot be written ({reason(error)}); {kept} finished shards are kept") from None
