"""The runs of a sweep as processes: some at a time, each on its own devices, each failure by itself."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_fast import files
from dit_fast.checkpoint.step import step_folders
from dit_fast.errors import UserError
from dit_fast.sweep.plan import Member
from dit_fast.train.journal import METRICS
from dit_fast.train.leash import GRACE, SWEEP

MANIFEST, LOG = "sweep.json", "sweep.log"  # of the sweep; in the folder of each run
FORMAT = 1
MODULES = {"dit-fast": "dit_fast.cli", "deepspeed": "deepspeed.launcher.runner"}  # commands of this environment
POLL = 0.5  # seconds
TAIL = 1 << 16  # bytes of a file's end that are looked at


@dataclass(frozen=True)
class Slots:
    """What `count` runs at a time have of this machine: `processes` each, and GPUs by the names that CUDA knows."""

    count: int
    processes: int
    devices: tuple[tuple[str, ...], ...]  # of each slot; () on a CPU
    threads: int  # of each process, on a CPU

    def environment(self, slot: int) -> dict[str, str]:
        """Variables of a slot's processes. Idle threads sleep: on cores that others use too, spinning costs much."""
        if self.devices:
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.devices[slot])}
        return {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(self.threads)}

    def command(self, member: Member) -> list[str]:
        """One process by `dit-fast train`, several by DeepSpeed's launcher; started again, both resume."""
        if self.processes == 1:
            return ["dit-fast", "train", *member.arguments]
        number = [] if self.devices else ["--num_gpus", str(self.processes)]  # by the visible devices otherwise
        launcher = ["deepspeed", *number, "--master_port", str(_free_port()), "--module", "dit_fast.train"]
        return [*launcher, *member.arguments]


def find_slots(count: int, processes: int) -> Slots:
    """Shares this machine out. Raises UserError where it has some GPUs, but too few."""
    import torch

    found = torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not found:
        return Slots(count, processes, (), max(cores // (count * processes), 1))
    if count * processes > found:
        raise UserError(
            f"--jobs {count} with --processes {processes} need {count * processes} GPUs, and {found} are visible; use "
            f"--jobs {max(found // processes, 1)}, or fewer processes"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(found)]
    shares = tuple(tuple(names[slot * processes : (slot + 1) * processes]) for slot in range(count))
    return Slots(count, processes, shares, 0)


def shown(slots: Slots, member: Member, slot: int = 0) -> str:
    """The command as it can be typed."""
    devices = slots.environment(slot) if slots.devices else {}
    return " ".join([*(f"{name}={value}" for name, value in devices.items()), shlex.join(slots.command(member))])


class Record:
    """`sweep.json` in the folder of a sweep: what each run is and how it stands. Runs of earlier calls stay in it.

    {"format": 1, "runs": [{"name", "seed", "folder" (relative), "arguments", "steps", "state", "seconds", "error"}]};
    states: waiting, running, done, stopped (asked to, resumes), failed. The truth is in the runs' checkpoints.
    """

    def __init__(self, out: Path, runs: Sequence[Member]):
        self.path = out / MANIFEST
        self._entries: dict[str, dict[str, Any]] = {each["folder"]: each for each in read_record(out)}
        for member in runs:
            entry = self._entries.setdefault(member.label, {"seconds": 0.0})
            entry |= {"name": member.name, "seed": member.seed, "folder": member.label, "error": None}
            entry |= {"arguments": list(member.arguments), "steps": member.steps, "state": "waiting"}

    def set(self, member: Member, state: str, seconds: float = 0.0, error: str | None = None) -> None:
        entry = self._entries[member.label]
        entry |= {"state": state, "seconds": round(entry["seconds"] + seconds, 1), "error": error}
        self.write()

    def write(self) -> None:
        values = {"format": FORMAT, "runs": list(self._entries.values())}
        files.replace(self.path, json.dumps(values, indent=1).encode())


def read_record(out: Path) -> list[dict[str, Any]]:
    """The runs in the `sweep.json` of a folder, [] where there is none. Raises UserError for a damaged one."""
    path = out / MANIFEST
    if not path.exists():
        return []
    try:
        values = json.loads(path.read_bytes())
        if values["format"] == FORMAT and all(
            {"folder", "name", "seed", "state", "seconds"} <= set(each) for each in values["runs"]
        ):
            return values["runs"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{path}: is not the record of a sweep; remove it, the runs themselves say what is done")


class Job:
    """One process, or launcher, of a run that goes on. A session of its own: Ctrl-C reaches it through the sweep."""

    def __init__(self, member: Member, slots: Slots, slot: int):
        self.member, self.slot, self.since = member, slot, time.monotonic()
        program, *rest = slots.command(member)
        module = MODULES[program]
        member.folder.mkdir(parents=True, exist_ok=True)
        self.log = member.folder / LOG
        own = {"PYTHONUNBUFFERED": "1", SWEEP: str(os.getpid())}
        with self.log.open("ab") as file:
            self.begin = file.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *rest],
                env={
                    **slots.environment(slot),
                    **os.environ,
                    **own,
                    **(slots.environment(slot) if slots.devices else {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def failure(self, status: int) -> str:
        """What ended it, from its log: the first error that it named."""
        with self.log.open("rb") as file:
            file.seek(max(self.begin, self.log.stat().st_size - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
        named = [line for line in lines if "dit-fast: error:" in line]
        text = named[0].partition("dit-fast: error: ")[2] if named else f"exit status {status}"
        return f"{text} (see {self.log})"

    def stop(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)


def steps_done(member: Member) -> int:
    """Steps of a run, and of its earlier stages, that it has logged or saved."""
    total = 0
    for run in member.runs:
        folder = Path(run.run.dir)
        saved = max((step for step, _ in step_folders(folder)), default=0)
        total += min(max(saved, _last_step(folder / METRICS)), run.run.steps)
    return total


def _last_step(path: Path) -> int:
    with (
        contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError, RecursionError),
        path.open("rb") as file,
    ):
        file.seek(max(path.stat().st_size - TAIL, 0))
        return int(json.loads(file.read().rpartition(b"\n")[0].rpartition(b"\n")[2])["step"])
    return 0


def run_all(runs: Sequence[Member], slots: Slots, record: Record, progress: Callable[[str, int], None]) -> None:
    """Runs what is not done, `slots.count` at a time. A failure is recorded, and the others go on.

    progress: told a line ("" for none) and the steps done of all runs, twice a second. After KeyboardInterrupt, or
    SIGTERM, which becomes one, the runs are asked to stop, and save; a second one ends them.
    """
    waiting = [member for member in runs if not member.done()]
    for member in runs:
        record.set(member, "waiting" if member in waiting else "done")
    steps = {member.label: member.steps if member not in waiting else steps_done(member) for member in runs}
    going: dict[int, Job] = {}
    with _interrupts():
        try:
            while waiting or going:
                for slot in range(slots.count):
                    if slot not in going and waiting:
                        going[slot] = Job(member := waiting.pop(0), slots, slot)
                        record.set(member, "running")
                for slot, job in list(going.items()):
                    steps[job.member.label] = steps_done(job.member)
                    line = _settle(job, record)
                    progress(line, sum(steps.values()))
                    if line:
                        del going[slot]
                if going:
                    time.sleep(POLL)
        except BaseException:
            _stop(list(going.values()), record)
            raise


def _settle(job: Job, record: Record) -> str:
    """Records how an ended job stands and returns a line about it; "" while it goes on."""
    status = job.process.poll()
    if status is None:
        return ""
    seconds, member = time.monotonic() - job.since, job.member
    if member.done():
        record.set(member, "done", seconds)
        return f"{member.label}: done in {seconds:.0f} s"
    if status == 0:  # asked to by a file or a signal of its own
        record.set(member, "stopped", seconds)
        return f"{member.label}: stopped as asked; the same command goes on with it"
    error = job.failure(status)
    record.set(member, "failed", seconds, error)
    return f"{member.label}: failed: {error}"


def _stop(jobs: Sequence[Job], record: Record) -> None:
    try:
        for job in jobs:
            job.stop(signal.SIGTERM)
        for job in jobs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.process.wait(2 * GRACE)
    except KeyboardInterrupt:
        pass
    finally:
        for job in jobs:
            job.stop(signal.SIGKILL)
            job.process.wait()
            done = job.member.done()
            record.set(job.member, "done" if done else "stopped", time.monotonic() - job.since)


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """SIGTERM as KeyboardInterrupt."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_port() -> int:
    """A free port, so that two runs on one machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
