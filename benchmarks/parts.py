"""Parts of a suite, each a process of its own with an end to its time, and a tar of what they left, always whole."""

import contextlib
import ctypes
import io
import json
import os
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from dit_fast import files

POLL, PACK_EVERY, GRACE = 0.1, 2.0, 10.0  # seconds
TAIL = 12  # lines
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Part:
    """command(seconds): what to run, told how long it may take. share: of the limit, relative to the other parts.

    beside: runs at the same time as the neighbours that say so too, which measure nothing; the largest of their shares
    is that of all. absent: why it cannot run on this machine.
    """

    name: str
    share: float
    command: Callable[[float], Sequence[str]]
    beside: bool = False
    absent: str | None = None

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Outcome:
    """status: running, ok, failed (its own exit status), crashed (by a signal: a segmentation fault, an abort), stopped
    (its time was up, or the suite's), absent. tail: its last lines."""

    name: str
    status: str
    seconds: float
    tail: list[str]


class Record:
    """What a suite leaves: the parts' files in `folder`, suite.json with how each ended, and `tar` of all of it.

    The tar is written beside and renamed, so that whoever reads it, even after the suite was killed, finds a whole one.
    """

    def __init__(self, folder: Path, tar: Path, about: Mapping[str, Any]):
        self.folder, self.tar, self.about = folder, tar, about
        self._packed: list[tuple[str, int, int]] | None = None
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def log(self, part: Part) -> Path:
        return self.folder / "logs" / f"{part.slug}.txt"

    def note(self, outcomes: Sequence[Outcome]) -> None:
        """suite.json anew, and the tar."""
        summary = {**self.about, "parts": [asdict(outcome) for outcome in outcomes]}
        files.replace(self.folder / "suite.json", f"{json.dumps(summary, indent=1)}\n".encode())
        self.pack()

    def pack(self) -> None:
        """The tar anew, if a file has changed."""
        found = sorted(path for path in self.folder.rglob("*") if path.suffix != ".partial" and path.is_file())
        state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found]
        if state == self._packed:
            return
        with files.replacing(self.tar) as file, tarfile.open(fileobj=file, mode="w") as archive:
            for path in found:
                content = path.read_bytes()  # at once: a part may replace or lengthen it at any time
                entry = tarfile.TarInfo(f"{self.folder.name}/{path.relative_to(self.folder)}")
                entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
                archive.addfile(entry, io.BytesIO(content))
        self._packed = state


def run_parts(
    parts: Sequence[Part],
    limit: float,
    record: Record,
    *,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Runs the parts in order; each ends at its share of `limit` counted from the beginning, so the whole does too.

    A part that fails, crashes or hangs is recorded, what it had written stays, and the others run. What ends this
    function early (SystemExit, KeyboardInterrupt) ends the running parts, is recorded, and goes on.
    """
    groups = list(_groups(parts))
    start, spent, whole = time.monotonic(), 0.0, sum(max(part.share for part in group) for group in groups)
    outcomes: dict[str, Outcome] = {}
    for group in groups:
        spent += max(part.share for part in group)
        seconds = max(limit * spent / whole - (time.monotonic() - start), 1.0)
        say(f"--- {', '.join(part.name for part in group)} (at most {seconds:.0f} s)")
        _run(group, seconds, record, outcomes, cwd, environment)
        for part in group:
            outcome = outcomes[part.name]
            if outcome.status != "ok":
                say("\n".join(outcome.tail))
            say(f"--- {part.name}: {outcome.status} after {outcome.seconds:.0f} s")
    return list(outcomes.values())


def _groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    for beside, some in groupby(parts, key=lambda part: part.beside):
        if beside:
            yield list(some)
        else:
            yield from ([part] for part in some)


def _run(
    group: Sequence[Part],
    seconds: float,
    record: Record,
    outcomes: dict[str, Outcome],
    cwd: Path,
    environment: Mapping[str, str] | None,
) -> None:
    start = packed = time.monotonic()
    running: dict[str, tuple[Part, subprocess.Popen[bytes]]] = {}

    def ended(name: str, status: str) -> None:
        part, _ = running.pop(name)
        lines = record.log(part).read_text(errors="replace").rstrip().splitlines()
        outcomes[name] = Outcome(name, status, round(time.monotonic() - start, 1), lines[-TAIL:])

    try:
        for part in group:
            outcomes[part.name] = Outcome(part.name, "running", 0.0, [])
            if part.absent:
                outcomes[part.name] = Outcome(part.name, "absent", 0.0, [part.absent])
                continue
            with record.log(part).open("wb") as log:  # a file: a child that outlives its part holds no pipe of ours
                process = subprocess.Popen(
                    part.command(seconds), cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_end_with_parent,
                )  # fmt: skip
            running[part.name] = part, process
        record.note(list(outcomes.values()))
        while running and time.monotonic() - start < seconds:
            time.sleep(POLL)
            for name, (_, process) in list(running.items()):
                if process.poll() is not None:
                    ended(name, "ok" if process.returncode == 0 else "crashed" if process.returncode < 0 else "failed")
            if time.monotonic() - packed > PACK_EVERY:
                record.pack()
                packed = time.monotonic()
    finally:
        for name, (_, process) in list(running.items()):
            _kill(process)
            ended(name, "stopped")
        record.note(list(outcomes.values()))


def _end_with_parent() -> None:
    """In the child: the kernel kills it when the suite dies, however that dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With its children. One that the driver holds in an uninterruptible call is left behind: the suite goes on."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
