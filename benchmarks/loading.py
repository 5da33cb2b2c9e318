"""What it costs to have batches, on this machine: python -m dit_fast.benchmarks.loading [--write]

`opening`: a fresh process each opens a data set of this size (1,000 samples a shard): seconds, peak memory, and how
many indexes it read. Behind the shards that are checked at the start lie empty files.

`order`: a fresh process each: seconds and peak memory of the first batch of an epoch, and of one resumed in its
middle, for data sets of these sizes (groups of 64). "whole" orders all of an epoch first, as `shuffle_group=0` does,
and as every group did before orders were made by group.

`readers`: latents of 8x32x32 stored as float16, micro-batches of 32, everything in the page cache, rounds alternating.
ours N: N threads; processes N: our reader in N worker processes of torch's DataLoader; webdataset N: its usual pipeline
(shuffle buffer of 2,000) in N processes; npy N: one .npy file a sample, as the loaders published with REPA read; images
N: ours with N threads and an image of 256x256 beside each latent, a PNG that Pillow decodes. Ratios are medians of
paired rounds. XL/2 at 5.8 steps of 256 a second takes 1,485 samples/s, shared by its GPUs.

--write: keeps the result as benchmarks/results/cpu/loading.json and its tables in docs/benchmarks.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

SIZES = (1_281_167, 14_000_000, 100_000_000)
NEEDED = 1485.0  # samples/s
GOAL = 2.0  # times either, with no worker and with one
SHARD = 1000  # samples
PAUSE = 0.5  # seconds, in which the side before has read ahead and falls idle


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dit_fast.benchmarks.loading", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each side in each round")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2, 4])
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--whole-up-to", type=int, default=14_000_000, help="largest size ordered as a whole too")
    parser.add_argument("--write", action="store_true", help="keep the result and the page's tables")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--open", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.open:
        print(json.dumps(opened(options.open)))
        return 0
    if options.one:
        print(json.dumps(first_batch(int(options.one[0]), int(options.one[1]), options.one[2] == "resumed")))
        return 0
    import torch

    from dit_fast.benchmarks.results import RESULTS, ROOT, environment, occasion, rounded, write, write_table

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = rounded(
            {"schema": 1, "run": "loading", **environment(torch.device("cpu")), **occasion()}
            | {"opening": openings(Path(folder), options.sizes), "order": orders(options.sizes, options.whole_up_to)}
            | {"needed_samples_per_s": NEEDED, "goal": GOAL}
            | {"readers": readers(Path(folder), options.workers, options.rounds, options.seconds)}
        )
    print(tables(result))
    if options.write:
        write(RESULTS / "cpu" / "loading.json", result)
        write_table(ROOT / "docs" / "benchmarks.md", "loading", tables(result))
    return 0


def tables(result: dict[str, Any]) -> str:
    """The result for a page, in Markdown."""
    lines = [
        "| samples | opened | first batch | resumed in the middle | ordered as a whole |",
        "| --- |" + " --- |" * 4,
    ]
    for row in result["opening"]:
        rows = [each for each in result["order"] if each["samples"] == row["samples"]]
        costs = [row, *(each[when] for each in rows for when in ("first", "resumed"))][:4]
        cells = [f"{cost['s']:.2f} s, {cost['mib']:.0f} MiB" for cost in costs] + ["not run"] * (4 - len(costs))
        lines.append(f"| {row['samples']:,} | {' | '.join(cells)} |")
    lines += ["", "| reader | threads or processes | samples/s | of XL/2's | growth | ours over it |"]
    lines += ["| --- |" + " --- |" * 5]
    ours = {row["workers"]: row for row in result["readers"] if row["reader"] == "ours"}
    alone = {row["reader"]: row["samples_per_s"] for row in reversed(result["readers"])}  # with fewest workers
    for row in sorted(result["readers"], key=lambda row: (row["workers"], row["reader"] != "ours")):
        rate, name = row["samples_per_s"], row["reader"]
        over = ours.get(row["workers"], {}).get(f"over_{name}")
        cells = [name, str(row["workers"]), f"{rate:,.0f}", f"{row['of_needed']:.1f}", f"{rate / alone[name]:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {'' if over is None else f'{over:.1f}'} |")
    return "\n".join(lines)


def openings(folder: Path, sizes: list[int]) -> list[dict[str, Any]]:
    rows = []
    for size in sizes:
        stub(folder / str(size), size)
        command = [sys.executable, "-m", "dit_fast.benchmarks.loading", "--open", str(folder / str(size))]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append({"samples": size, **found})
        print(rows[-1], flush=True)
    return rows


def sizes_of(samples: int) -> list[int]:
    """Samples of each shard."""
    return [SHARD] * (samples // SHARD) + ([samples % SHARD] if samples % SHARD else [])


def stub(folder: Path, samples: int) -> None:
    """A data set that opens: a description of all shards, and what is looked at of them."""
    import zlib

    import numpy as np

    from dit_fast.data.dataset import CHECKED_FIRST
    from dit_fast.data.description import FILE_NAME, FORMAT, WITH_STD, description_bytes
    from dit_fast.data.index import ShardIndex, index_path, index_to_bytes, layout

    folder.mkdir()
    members, first, table = ("moments.npy", "cls"), 0, []
    for number, size in enumerate(sizes_of(samples)):
        tar, lengths = folder / f"shard-{number:06d}.tar", np.tile(np.array([128 + 16384, 1], np.uint32), (size, 1))
        tar.touch()
        index_path(tar).touch()
        offsets, length = layout(lengths)
        if number < CHECKED_FIRST:
            crc = np.full(lengths.shape, zlib.crc32(b"0"), np.uint32)
            index = ShardIndex(first, length, members, offsets, lengths, crc, np.zeros(size, np.int32))
            index_path(tar).write_bytes(index_to_bytes(index))
            with open(tar, "r+b") as file:
                file.truncate(length)  # a hole
        table.append({"name": tar.name, "samples": size, "bytes": length, "sha256": "0" * 64})
        first += size
    content = {"format": FORMAT, "version": WITH_STD, "num_samples": samples, "num_classes": 1, "class_names": ["one"]}
    content |= {"latent_shape": [4, 32, 32], "dtype": "float16", "scale": 1.0, "shift": 0.0, "fields": {}}
    content |= {"statistics": None, "autoencoder": {"spec": "", "identity": ""}, "settings": {}, "shards": table}
    (folder / FILE_NAME).write_bytes(description_bytes(content))


def opened(folder: str) -> dict[str, float]:
    from dit_fast.data import dataset

    read, count = dataset._open_index, []

    def counted(*arguments: Any) -> Any:
        count.append(arguments)
        return read(*arguments)

    dataset._open_index = counted  # type: ignore[assignment]
    return {**_cost(lambda: dataset.open_dataset(folder)), "indexes": len(count)}


def _cost(call: Callable[[], object]) -> dict[str, float]:
    before, start = _peak(), time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return {"s": seconds, "mib": _peak() - before}


def _peak() -> float:
    """MiB that this process has held at most; `getrusage` counts those of the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


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

    first = size // 2 // 256 * 256 if resumed else 0
    return _cost(lambda: Plan(sizes_of(size), 0, group).indices(first, first + 256))


def readers(folder: Path, workers: list[int], rounds: int, seconds: float) -> list[dict[str, Any]]:
    from dit_fast.benchmarks import loading_sides as kinds

    (shards, arrays), images = kinds.make(folder), kinds.make_images(folder)
    sides: dict[str, Any] = {}
    for count in workers:
        sides[f"ours {count}"] = kinds.ours(shards, count)
        if count:
            sides[f"processes {count}"] = kinds.processes(shards, count)
        sides[f"webdataset {count}"] = kinds.webdataset(shards, count)
        sides[f"npy {count}"] = kinds.npy(arrays, count)
        sides[f"images {count}"] = kinds.ours(images, count, fields=("image",))
    rates: dict[str, list[float]] = {name: [] for name in sides}
    sides = dict(sorted(sides.items(), key=lambda item: item[0].startswith("images")))  # those last: slowest to be idle
    for side in sides.values():
        for _ in range(8):
            next(side)  # workers start, files come into memory
    for _ in tqdm(range(rounds), unit="round"):
        for name, side in sides.items():
            time.sleep(PAUSE)
            for _ in range(4 * max(int(name.split()[-1]), 1) + 1):
                next(side)  # what was read ahead while others were measured
            start, batches = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                next(side)
                batches += 1
            rates[name].append(kinds.MICRO * batches / (time.perf_counter() - start))
    rows = []
    for name, found in rates.items():
        kind, number = name.split()
        row: dict[str, Any] = {"reader": kind, "workers": int(number), "samples_per_s": statistics.median(found)}
        row["of_needed"] = row["samples_per_s"] / NEEDED
        if kind == "ours":
            for other in ("webdataset", "npy", "processes"):
                if f"{other} {number}" in rates:
                    pairs = zip(found, rates[f"{other} {number}"], strict=True)
                    row[f"over_{other}"] = statistics.median(a / b for a, b in pairs)
        rows.append(row | {"rounds": found})
    return rows


if __name__ == "__main__":
    sys.exit(main())
