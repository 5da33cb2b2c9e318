"""Records of a run: progress bar, metrics.jsonl, TensorBoard, and the resolved configuration.

Means over ranks and over the steps of an interval are reduced on the device and, with CUDA, read one interval late,
so that logging never waits. An interval also ends at every checkpoint: a run that was killed and resumed logs the same
rows as one that was not.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_fast import files
from dit_fast.display import percent, rate
from dit_fast.options import to_dict
from dit_fast.runs import TrainConfig
from dit_fast.train.engine import StepResult
from dit_fast.train.guard import Guard
from dit_fast.train.health import Health, Shares, told
from dit_fast.train.lines import AppendedLines, truncate_lines
from dit_fast.train.quarantine import Quarantine
from dit_fast.train.throughput import Clock, matmul_ceiling
from dit_fast.world import Late, World

logger = logging.getLogger("dit_fast")

METRICS, CONFIG = "metrics.jsonl", "config.json"


class Journal:
    """Collects step results on all ranks; writes on rank 0. start: step resumed from (0: a new run)."""

    def __init__(self, config: TrainConfig, world: World, guard: Guard, start: int, epoch: int, flops: int):
        self.run, self.config, self.world, self.guard = Path(config.run.dir), config, world, guard
        self.health, self._shares = Health(world, config.engine.timeout, start), Shares()
        self.quarantine = Quarantine(config, world, guard, start, epoch)
        self._epoch, self._flops = epoch, 3 * flops  # samples per epoch; forward + backward FLOPs of a sample
        # By the names of a step's values (a method may stop within an interval): their sums over the applied steps, and
        # how many those are.
        self._sums: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self._last = start
        self._pending: list[tuple[dict[str, Any], list[str], Late, Late]] = []
        self._writer: Any = None
        self._progress: _Progress | None = None
        self._file: AppendedLines | None = None
        self._ceiling = 0.0
        self.started = time.time()
        world.agree(lambda: self._open(start))
        self.clock = Clock()

    def _open(self, start: int) -> None:
        config = self.config
        self._ceiling = matmul_ceiling(self.world.device, config.engine.precision) * self.world.size
        files.replace(self.run / CONFIG, json.dumps(to_dict(config), indent=1).encode())
        truncate_lines(self.run / METRICS, start)
        self._file = AppendedLines(self.run / METRICS)
        self._progress = _Progress(config.run.steps, start)
        self._writer = _tensorboard(self.run, start) if config.run.tensorboard else None

    def step(self, result: StepResult) -> None:
        """Adds one step; skipped ones (no finite gradient) are counted, their values are not averaged."""
        self._show(_Progress.step)
        self.health.step()
        named = {**result.logs, "grad_norm": result.grad_norm}
        given = [torch.as_tensor(value, dtype=torch.float32, device=self.world.device) for value in named.values()]
        values = torch.where(result.applied.bool(), torch.stack(given), 0.0)
        if tuple(named) in self._sums:
            sums, count = self._sums[tuple(named)]
            self._sums[tuple(named)] = sums + values, count + result.applied
        else:
            self._sums[tuple(named)] = values, result.applied

    def close_interval(self, step: int, lr: float) -> None:
        """Ends the interval at `step` (steps done); collective. Raises Diverged for a value that is not finite."""
        batch = self.config.engine.global_batch
        speed = self.clock.rate((step - self._last) * batch)
        seen = self.guard.positions(step)[1]
        row: dict[str, Any] = {"step": step, "samples": step * batch, "epoch": round(seen / self._epoch, 4)}
        names = list(dict.fromkeys(name for each in self._sums for name in each))
        row |= {"lr": lr, "skipped": step - self._last, "samples_per_s": float(f"{speed:.5g}")}
        if self.guard.left_out:
            row["rollbacks"] = len(self.guard.left_out)
        if self._ceiling:
            row["mfu"] = float(f"{self._flops * speed / self._ceiling:.4g}")
        row["seconds"] = round(time.time() - self.started, 2)
        bad = self.quarantine.close_interval(step)
        times = self.world.reduce(self.health.spent(), "sum")
        self._pending.append((row, names, Late(self.world.reduce(self._means(names, bad), "mean")), Late(times)))
        self._sums, self._last = {}, step
        self.drain(keep=1 if self.world.device.type == "cuda" else 0)

    def _means(self, names: list[str], bad: int) -> Tensor:
        """The means of the interval, then how many applied steps each is of, then how many there were, then `bad`."""
        means: list[Tensor] = []
        counts: list[Tensor] = []
        for name in names:
            parts = [(sums[each.index(name)], count) for each, (sums, count) in self._sums.items() if name in each]
            total, count = (_sum(x) for x in zip(*parts, strict=True))
            means.append(total / count)
            counts.append(count)
        applied = _sum(count for _, count in self._sums.values())
        return torch.stack([*means, *counts, applied, torch.full_like(applied, bad)])

    def drain(self, keep: int = 0, closing: bool = False) -> None:
        """Writes the closed intervals but the newest `keep`, whose values may still be on their way from the device.

        Collective where samples were replaced, unless closing: then the other ranks may have failed.
        """
        while len(self._pending) > keep:
            row, names, values, times = self._pending.pop(0)
            *read, applied, bad = values.read().tolist()
            counted = zip(names, read[: len(names)], read[len(names) :], strict=True)
            logged = {name: mean for name, mean, count in counted if count}
            row["skipped"] -= round(applied)
            if bad:
                row["bad_samples"] = round(bad * self.world.size)
                if not closing:
                    self.quarantine.publish(row["step"])
            self._write({**row, **self._shares.columns(times.read()), **logged})
            self.guard.values(row["step"], logged)

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        safe = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._file.add(json.dumps(safe))
        self._show(lambda progress: progress.show(row))
        scalars = {name: value for name, value in row.items() if name not in ("step", "samples", "epoch", "seconds")}
        self.plot(scalars, row["step"])

    def plot(self, scalars: Mapping[str, float], step: int) -> None:
        """Gives them to TensorBoard alone."""
        self._plot(lambda writer: [writer.add_scalar(name, value, step) for name, value in scalars.items()])

    def _show(self, act: "Callable[[_Progress], None]") -> None:
        """Progress goes to a terminal that may be gone; the run goes on without it."""
        try:
            if self._progress is not None:
                act(self._progress)
        except OSError:
            self._progress = None

    def _plot(self, act: Callable[[Any], Any]) -> None:
        """TensorBoard writes from a thread of its own; what failed there is raised by a later call, of any kind."""
        try:
            if self._writer is not None:
                act(self._writer)
        except Exception as error:
            logger.warning("TensorBoard is switched off: %s; %s goes on", error, METRICS)
            self._writer = None

    def close(self) -> None:
        """Writes what is pending and closes all files."""
        try:
            self.drain(closing=True)
        finally:
            self.quarantine.close()
            if self._file is not None:
                self._file.close()
            self._show(_Progress.close)
            self._plot(lambda writer: writer.close())


def _sum(numbers: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, numbers)


class _Progress:
    """A bar in terminals, a line for each interval in log files."""

    def __init__(self, total: int, start: int):
        self._total, self._first, self._since = total, start, time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm

                shown: dict[str, Any] = {"dynamic_ncols": True, "mininterval": 0.5, "smoothing": 0.1}
                self._bar = tqdm(total=total, initial=start, unit="step", **shown)
            except ImportError:
                logger.info("tqdm is not installed, so progress is printed line by line; pip install tqdm for a bar")

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def show(self, row: Mapping[str, Any]) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(_summary(row), refresh=False)
            return
        per_step = (time.perf_counter() - self._since) / max(row["step"] - self._first, 1)
        left = int(per_step * (self._total - row["step"]))
        eta = f"{left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"
        print(f"step {row['step']}/{self._total}  {_summary(row)}  eta {eta}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _summary(row: Mapping[str, Any]) -> str:
    parts = [f"{name} {row[key]:.4f}" for name, key in (("loss", "loss"), ("grad", "grad_norm")) if key in row]
    parts.append(f"{rate(row['samples_per_s'])} samples/s")
    parts += [f"mfu {percent(row['mfu'])}"] if "mfu" in row else []
    parts += [f"skipped {row['skipped']}"] if row["skipped"] else []
    parts += [f"bad samples {row['bad_samples']}"] if "bad_samples" in row else []
    parts += [slow] if (slow := told(row)) else []
    return "  ".join(parts)


def _tensorboard(run: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("TensorBoard is not installed (pip install tensorboard); metrics go to %s only", run / METRICS)
        return None
    try:
        return SummaryWriter(run / "tensorboard", purge_step=start + 1 if start else None)
    except OSError as error:
        logger.warning("TensorBoard is switched off: %s; metrics go to %s only", error, run / METRICS)
        return None


def clear_leftovers(run: Path) -> None:
    """Removes what a kill in the middle of a write left; `Checkpoints.newest` does so for unfinished checkpoints."""
    for name in (METRICS, CONFIG):
        (run / f"{name}.partial").unlink(missing_ok=True)
    for path in (run / "samples").glob("step_*.png.partial"):
        path.unlink(missing_ok=True)
