"""One writer per run folder: a lock file with host, process and start time, renewed while the run lives."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from dit_fast.errors import UserError

FILE = "lock.json"
RENEW = 30.0  # seconds between signs of life
FOREIGN = 900.0  # a holder on another host that gave none for so long counts as dead


class RunLock:
    """Held from construction to `release`. Raises UserError naming the holder where another process holds the folder.

    A holder on this host is alive if its process is; one on another host, if it renewed the file lately.
    """

    def __init__(self, run: Path):
        run.mkdir(parents=True, exist_ok=True)
        self.path, self._renewed = run / FILE, time.monotonic()
        # the file is never unlinked, so the kernel's lock on it serialises those who look at its content
        with self.path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            holder = _parse(file.read())
            if holder and _alive(holder, self.path):
                age = time.time() - self.path.stat().st_mtime
                raise UserError(
                    f"{run}: process {holder['pid']} on {holder['host']} is writing to this run folder (last sign of "
                    f"life {age:.0f} s ago); stop it, set another run.dir, or remove {self.path} if it is gone"
                )
            file.truncate(0)
            pid = os.getpid()
            file.write(json.dumps({"host": socket.gethostname(), "pid": pid, "born": _birth(pid)}))

    def renew(self) -> None:
        if time.monotonic() - self._renewed > RENEW:
            self._renewed = time.monotonic()
            self.path.touch()

    def release(self) -> None:
        if self.path.exists():
            self.path.write_text("")


def _parse(text: str) -> dict[str, Any] | None:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _alive(holder: dict[str, Any], path: Path) -> bool:
    if holder.get("host") != socket.gethostname():
        return time.time() - path.stat().st_mtime < FOREIGN
    pid = int(holder.get("pid", -1))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _birth(pid) == holder.get("born")  # else the number was given to another process


def _birth(pid: int) -> str:
    """Start time of a process in kernel ticks (Linux), "" elsewhere."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
