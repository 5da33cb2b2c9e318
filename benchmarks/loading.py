"""What it costs to have batches, on this machine: the order's first batch by size, and samples per second by reader.

    python -m dit_fast.benchmarks.loading --out FILE.json

`order`: a fresh process each: seconds and peak memory of the first batch of an epoch, and of one resumed in its
middle, for data sets of these sizes (1,000 samples a shard, groups of 64). "whole" orders all of an epoch first, as
`shuffle_group=0` does, and as every group did before orders were made by group.

`readers`: latents of 8x32x32 as float16, shuffled, micro-batches of 32, everything in the page cache, rounds
alternating. ours N: N threads; processes N: our reader in N worker processes of torch's DataLoader; webdataset N: its
usual pipeline (shuffle buffer of 2,000) in N processes; npy N: one .npy file a sample, as the loaders published with
REPA read. Ratios are medians of paired rounds. XL/2 at 5.8 steps of 256 a second takes 1,485 samples/s, shared by its
GPUs.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SIZES = (1_281_167, 14_000_000, 100_000_000)
NEEDED = 1485.0  # samples/s
MICRO = 32
SAMPLES, PER_SHARD = 4096, 256
SHAPE = (2, 4, 32, 32)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_fast.benchmarks.loading", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each side in each round")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--whole-up-to", type=int, default=14_000_000, help="largest size ordered as a whole too")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(first_batch(int(options.one[0]), int(options.one[1]), options.one[2] == "resumed")))
        return 0
    import torch

    from dit_fast.benchmarks.results import RESULTS, environment, rounded, write

    torch.set_num_threads(1)
    result: dict[str, Any] = {"schema": 1, "run": "loading", **environment(torch.device("cpu"))}
    result["command"] = " ".join(["python", "-m", "dit_fast.benchmarks.loading", *(arguments or sys.argv[1:])])
    result["written"] = datetime.now(UTC).isoformat(timespec="seconds")
    result["order"] = orders(options.sizes, options.whole_up_to)
    with tempfile.TemporaryDirectory() as folder:
        result["needed_samples_per_s"] = NEEDED
        result["readers"] = readers(Path(folder), options.workers, options.rounds, options.seconds)
    write(options.out or RESULTS / "cpu" / "loading.json", rounded(result))
    return 0


def orders(sizes: list[int], whole_up_to: int) -> list[dict[str, Any]]:
    rows = []
    for size in sizes:
        for group in (64, 0) if size <= whole_up_to else (64,):
            row: dict[str, Any] = {"samples": size, "order": "by group" if group else "whole"}
            for when in ("first", "resumed"):
                command = [sys.executable, "-m", "dit_fast.benchmarks.loading", "--one", str(size), str(group), when]
                row[when] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append(row)
            print(row, flush=True)
    return rows


def first_batch(size: int, group: int, resumed: bool) -> dict[str, float]:
    from dit_fast.data.plan import Plan

    shards = [1000] * (size // 1000) + ([size % 1000] if size % 1000 else [])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    first = size // 2 // 256 * 256 if resumed else 0
    Plan(shards, 0, group).indices(first, first + 256)
    seconds = time.perf_counter() - start
    return {"s": seconds, "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def readers(folder: Path, workers: list[int], rounds: int, seconds: float) -> list[dict[str, Any]]:
    shards, arrays = make(folder)
    sides: dict[str, Iterator[Any]] = {}
    for count in workers:
        sides[f"ours {count}"] = ours(shards, count)
        if count:
            sides[f"processes {count}"] = processes(shards, count)
        sides[f"webdataset {count}"] = webdataset(shards, count)
        sides[f"npy {count}"] = npy(arrays, count)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        for _ in range(8):
            next(side)  # workers start, files come into memory
    for _ in range(rounds):
        for name, side in sides.items():
            for _ in range(4 * max(int(name.split()[-1]), 1) + 1):
                next(side)  # what was read ahead while others were measured
            start, batches = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                next(side)
                batches += 1
            rates[name].append(MICRO * batches / (time.perf_counter() - start))
    rows = []
    for name, found in rates.items():
        kind, number = name.split()
        row: dict[str, Any] = {"reader": kind, "workers": int(number), "samples_per_s": statistics.median(found)}
        row["of_needed"] = row["samples_per_s"] / NEEDED
        if kind == "ours":
            for other in ("webdataset", "npy", "processes"):
                if f"{other} {count}" in rates:
                    pairs = zip(found, rates[f"{other} {count}"], strict=True)
                    row[f"over_{other}"] = statistics.median(a / b for a, b in pairs)
        rows.append(row)
        print(row, flush=True)
    return rows


def make(folder: Path) -> tuple[str, Path]:
    """Shards of random latents, and the same as one file a sample."""
    import numpy as np

    from dit_fast.data.shards import ShardWriter, npy_bytes
    from dit_fast.preparation.import_latents import import_latents

    arrays, tars, rng = folder / "arrays", folder / "tars", np.random.default_rng(0)
    arrays.mkdir()
    tars.mkdir()
    with open(tars / "0.tar", "wb") as file:
        writer = ShardWriter(file, ("npy", "cls"), 0)
        for number in range(SAMPLES):
            latent = np.abs(rng.normal(size=SHAPE)).astype(np.float16)
            np.save(arrays / f"{number:08d}.npy", latent)
            writer.add({"npy": npy_bytes(latent.reshape(-1, *SHAPE[2:]))}, 0)
        writer.finish()
    import_latents(tars, folder / "shards", form="mean-std", samples_per_shard=PER_SHARD, progress=False)
    return str(folder / "shards"), arrays


def ours(shards: str, count: int) -> Iterator[Any]:
    from dit_fast.data import Plan, build_loader, open_dataset

    dataset = open_dataset(shards)
    plan = Plan(dataset.info.shard_sizes, 0, 64)
    sizes = {"global_batch": MICRO, "micro_batch": MICRO, "rank": 0, "world_size": 1, "start": 0}
    return build_loader(dataset, plan, **sizes, num_workers=count)


def _as_is(item: Any) -> Any:
    return item


class _Batches:
    """Micro-batches of an order by number, endless for all that matters."""

    def __init__(self, order: Callable[[int], Any], read: Callable[[Any], Any]):
        self._order, self._read = order, read

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, number: int) -> Any:
        return self._read(self._order(number))


def _loader(dataset: Any, count: int, **options: Any) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    return iter(DataLoader(dataset, num_workers=count, prefetch_factor=4 if count else None, **options))


def processes(shards: str, count: int) -> Iterator[Any]:
    import numpy as np

    from dit_fast.data import open_dataset
    from dit_fast.data.reader import IndexedReader

    reader = IndexedReader(open_dataset(shards))
    order = np.random.default_rng(1).permutation(SAMPLES)

    def samples(number: int) -> Any:
        return order[np.arange(number * MICRO, (number + 1) * MICRO) % SAMPLES]

    batches = _Batches(samples, lambda found: reader.read(found, found))
    return _loader(batches, count, batch_size=None, collate_fn=_as_is, sampler=range(1 << 30))


def npy(arrays: Path, count: int) -> Iterator[Any]:
    """A map-style data set: `np.load` of a sample's file, a label, torch's own shuffle and collate, without end."""
    import numpy as np
    import torch

    names, labels = sorted(str(path) for path in arrays.iterdir()), [0] * SAMPLES

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1 << 20

        def __getitem__(self, number: int) -> Any:
            number = int(number) % SAMPLES
            return torch.from_numpy(np.load(names[number], allow_pickle=False)).float(), torch.tensor(labels[number])

    return _loader(Files(), count, batch_size=MICRO, shuffle=True)


def _floats(sample: Any) -> Any:
    import torch

    return torch.from_numpy(sample["moments.npy"]).float(), sample["cls"]


def webdataset(shards: str, count: int) -> Iterator[Any]:
    import webdataset as wds

    urls = sorted(str(path) for path in Path(shards).glob("*.tar"))
    whole = wds.WebDataset(urls, shardshuffle=100, resampled=True).shuffle(2000).decode().map(_floats)
    return _loader(whole.batched(MICRO), count, batch_size=None)


if __name__ == "__main__":
    sys.exit(main())
