"""The health of a job's ranks: how each spends its time, for whom the others wait, and who has come to a stop.

A thread of each rank samples, from torch's flight recorder, whether a collective is under way; this works for whatever
starts collectives, and while the main thread is stuck inside of one. Another thread tells the job's store where the
rank is, and reads where the others are while there is no progress. Nothing is exchanged within a step.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dit_fast.display import percent
from dit_fast.errors import Status
from dit_fast.world import World

logger = logging.getLogger("dit_fast")

SAMPLE = 0.05  # seconds between looks at the collectives
NAMED = 60.0  # seconds without progress after which the rank that the others wait for is named, at the latest
SILENT = 3  # beats without a sign of life
ENOUGH = 1.0  # seconds of training of which shares are worth telling
MATTERS = 0.1  # share of their time that the others lose to the slowest rank, from which on the log's line tells it
MOST = 0.5  # share of data or collectives of the slowest rank, from which on too: storage or network is slow
DATA, STEP = "waits for data", "computes"


@dataclass(frozen=True)
class Beat:
    """A sign of life. step: steps done. doing: what the main thread does. collective: the one it is in, or "". started:
    how many it has started; beat: how many signs there were before."""

    beat: int
    step: int
    doing: str
    collective: str
    started: int


class Health:
    """A context around the steps. In a job of one process it only counts.

    timeout: seconds without progress (a step, or another thing to do) after which this process ends with
    Status.RESTART; one line of one rank says who is missing.
    """

    def __init__(self, world: World, timeout: float, step: int = 0):
        self._world, self._timeout, self._step = world, timeout, step
        self._doing, self._progress = STEP, time.monotonic()
        self._data = self._away = self._collective = 0.0
        self._since = time.perf_counter()
        self._beats: dict[int, tuple[Beat, float]] = {}  # and when it was first seen, by this process's clock
        self._answered = time.monotonic()
        self._over = threading.Event()

    def __enter__(self) -> "Health":
        if self._world.size > 1:
            for name in ("_watch", "_talk"):
                threading.Thread(target=getattr(self, name), daemon=True, name=f"health {name}").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        left = self._timeout - self._idle()
        if kind is not None and self._world.size > 1 and left < 0.2 * self._timeout:
            time.sleep(max(left, 0) + 10 * SAMPLE)  # others have ended for the same reason, which is told at its time
        self._over.set()

    def step(self) -> None:
        """One more is done."""
        self._step, self._progress = self._step + 1, time.monotonic()

    def data(self, fetch: Callable[[], None]) -> None:
        with self.doing(DATA):
            fetch()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Around all that is not the step itself: DATA, or what does not count as training."""
        before, start = self._doing, time.perf_counter()
        self._doing, self._progress = what, time.monotonic()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            if what == DATA:
                self._data += seconds
            else:
                self._away += seconds
            self._doing, self._progress = before, time.monotonic()

    def spent(self) -> Tensor:
        """[ranks, 3]: this rank's seconds of waiting for data, computing and collectives since the last call, in its
        row, on the device; zeros in the others."""
        now = time.perf_counter()
        total, data, collective = now - self._since - self._away, self._data, self._collective
        self._since, self._data, self._away, self._collective = now, 0.0, 0.0, 0.0
        collective = min(collective, max(total - data, 0.0))
        row = torch.tensor([data, max(total - data - collective, 0.0), collective], dtype=torch.float32)
        times = torch.zeros(self._world.size, 3, dtype=torch.float32)
        times[self._world.rank] = row
        return times.to(self._world.device, non_blocking=True)

    def _idle(self) -> float:
        return time.monotonic() - self._progress

    def _watch(self) -> None:
        before, named = time.perf_counter(), -1.0
        limit = min(NAMED, 0.4 * self._timeout)  # silence is seen after six beats
        while not self._over.wait(SAMPLE):
            now, doing = time.perf_counter(), self._doing
            if doing == STEP and under_way(self._world.device, active=False)[0]:
                self._collective += now - before
            before = now
            idle, progress = self._idle(), self._progress
            if idle > limit and progress != named:
                missing, text = self._look()
                patient = any(self._beats[rank][0].doing not in (STEP, DATA) for rank in missing if rank in self._beats)
                if missing and (not patient or idle > self._timeout / 2):
                    named = progress
                    if self._speaks(missing):
                        logger.warning("no progress for %.0f s after step %d: %s", idle, self._step, text)
            if idle > self._timeout:
                self._end(idle)

    def _end(self, idle: float) -> None:
        missing, text = self._look()
        if self._speaks(missing):
            print(
                f"dit-fast: error: no progress for {idle:.0f} s after step {self._step} (engine.timeout): {text}; "
                "the same command goes on from the newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
        os._exit(Status.RESTART)

    def _look(self) -> tuple[list[int], str]:
        beats, now = dict(self._beats), time.monotonic()
        silence = SILENT * self._beat
        beats[self._world.rank] = (self._sign(0), now)
        if now - self._answered > silence:
            return [0], "rank 0, which holds the job's store, gives no sign of life"
        silent = [rank for rank, (_, seen) in beats.items() if now - seen > silence]
        return diagnose({rank: beat for rank, (beat, _) in sorted(beats.items())}, silent)

    def _speaks(self, missing: list[int]) -> bool:
        """The lowest rank that is not missing itself."""
        return self._world.rank == min(set(range(self._world.size)) - set(missing), default=0)

    @property
    def _beat(self) -> float:
        return min(6.0, self._timeout / 20)

    def _sign(self, number: int) -> Beat:
        collective, started = under_way(self._world.device)
        return Beat(number, self._step, self._doing, collective, started)

    def _talk(self) -> None:
        """The job's store may be gone or stuck with the process that holds it; then nobody answers this thread."""
        number, rank = 0, self._world.rank
        with contextlib.suppress(RuntimeError):
            own = cast(Any, self._world.store).clone()  # a connection of its own
            own.set_timeout(timedelta(seconds=60))
            store = dist.PrefixStore(f"dit_fast/beat/{self._step}", own)
            keys = [str(other) for other in range(self._world.size)]
            while not self._over.is_set():
                store.set(str(rank), json.dumps(asdict(self._sign(number))))
                number += 1
                known = store.check([str(rank)])
                self._answered = time.monotonic() if known else self._answered
                if self._idle() < 2 * self._beat:
                    self._beats = {}  # silence is measured from readings one after the other
                elif store.check(keys):
                    for other, text in zip(range(self._world.size), store.multi_get(keys), strict=True):
                        beat = Beat(**json.loads(text))
                        if other not in self._beats or self._beats[other][0] != beat:
                            self._beats[other] = beat, time.monotonic()
                self._over.wait(self._beat)


def under_way(device: torch.device, active: bool = True) -> tuple[str, int]:
    """(the oldest collective that this process has started and not finished, how many it has started); "": none.

    active: whether to say which; "collective" otherwise, which is quicker.
    """
    dumps: Any = torch._C._distributed_c10d
    dump = getattr(dumps, "_dump_nccl_trace_json" if device.type == "cuda" else "_dump_fr_trace_json")
    found = json.loads(dump(includeCollectives=active, onlyActive=active))
    counts = [{name: int(count) for name, count in each.items()} for each in found["pg_status"].values()]
    started = sum(each["last_enqueued_collective"] for each in counts)
    if all(each["last_enqueued_collective"] <= each["last_completed_collective"] for each in counts):
        return "", started
    for entry in found.get("entries", ()):
        if not entry["retired"]:
            sizes = " + ".join("x".join(map(str, size)) for size in entry["input_sizes"])
            return f"{entry['profiling_name'].partition(':')[2]} of {sizes or 'nothing'}", started
    return "a collective", started


def diagnose(beats: Mapping[int, Beat], silent: list[int]) -> tuple[list[int], str]:
    """(the ranks that the others wait for, one line about them and the others). None where all are alike."""
    inside = [rank for rank, beat in beats.items() if beat.collective and rank not in silent]
    outside = [rank for rank, beat in beats.items() if not beat.collective and rank not in silent]
    if silent:
        missing, what = silent, f"give{'s' * (len(silent) == 1)} no sign of life"
    elif outside and inside:
        missing, what = outside, " or ".join(sorted({beats[rank].doing for rank in outside}))
        inside = [rank for rank in inside if rank not in missing]
    else:
        least = min((beats[rank].started for rank in inside), default=0)
        missing = [rank for rank in inside if beats[rank].started == least]
        if not inside or len(missing) == len(beats):
            return [], "all ranks wait in " + _calls(beats, inside) if inside else "no rank is in a collective"
        what = f"wait{'s' * (len(missing) == 1)} in {_calls(beats, missing)}, an earlier collective than the others"
    others = [rank for rank in inside if rank not in missing]
    text = f"{listed(missing)} {what}"
    if silent and all(rank in beats for rank in silent):
        text += f" (last: step {min(beats[rank].step for rank in silent)}, {beats[silent[0]].doing})"
    if others:
        text += f"; {listed(others)} wait{'s' * (len(others) == 1)} in {_calls(beats, others)}"
    return missing, text


def _calls(beats: Mapping[int, Beat], ranks: list[int]) -> str:
    return " or ".join(sorted({beats[rank].collective for rank in ranks})[:3])


def listed(ranks: list[int]) -> str:
    """rank 3; ranks 0, 4-7."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][-1] == rank - 1:
            parts[-1][1:] = [rank]
        else:
            parts.append([rank])
    return f"rank{'s' * (len(ranks) > 1)} {', '.join('-'.join(map(str, part)) for part in parts)}"


class Shares:
    """Turns the times of all ranks into the columns of metrics.jsonl, over intervals of at least ENOUGH seconds."""

    def __init__(self) -> None:
        self._times: Tensor | None = None

    def columns(self, times: Tensor) -> dict[str, float]:
        """times: [ranks, 3] as `Health.spent` has them, all rows. {} where they are too short yet.

        The slowest rank is the one that waits least in collectives, for whom the others wait there. waiting: the share
        of their time that they lose to it, on average.
        """
        self._times = times = times if self._times is None else self._times + times
        if len(times) < 2 or times.sum(1).mean() < ENOUGH:
            return {}
        self._times = None
        shares = times / times.sum(1, keepdim=True).clamp(min=1e-9)
        slowest = int(shares[:, 2].argmin())
        data, compute, collective = shares[slowest].tolist()
        waiting = (shares[:, 2].sum().item() - collective) / (len(times) - 1) - collective
        names = ("slowest_data", "slowest_compute", "slowest_collective", "waiting")
        values = (round(value, 3) for value in (data, compute, collective, waiting))
        return {"slowest_rank": slowest, **dict(zip(names, values, strict=True))}


def told(row: Mapping[str, Any]) -> str:
    """For the log's line: who is slow, and with what; "" where that does not matter."""
    largest = max(row.get("slowest_data", 0), row.get("slowest_collective", 0))
    if row.get("waiting", 0) < MATTERS and largest < MOST:
        return ""
    parts = (f"{name} {percent(row[f'slowest_{name}'])}" for name in ("data", "compute", "collective"))
    return f"slowest rank {row['slowest_rank']} ({', '.join(parts)}), others wait {percent(row['waiting'])}"
