"""The death of a rank as the others meet it, a failed collective: one of them says in one line which is missing."""

import contextlib
import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from dit_fast.errors import Status, UserError
from dit_fast.train.lock import kernel
from dit_fast.world import World

ANSWER = 10.0  # seconds in which every surviving rank meets the failure, on a busy machine too
GLOO = re.compile(r"gloo|(closed|reset) by peer|broken pipe", re.IGNORECASE)  # it raises plain RuntimeErrors


class PeerLost(UserError):
    """Another rank ended in the middle of the job."""

    status = Status.RESTART

    def __init__(self, message: str, speaks: bool):
        super().__init__(message)
        self.alone = speaks  # type: ignore[misc]


def explain(error: Exception, world: World) -> PeerLost | None:
    """The same failure in plain words; None where it is not a lost connection between ranks.

    Ranks whose process has ended are named at once, where this machine can see them. On other machines, every survivor
    writes its number into the job's store, and those that are missing there after a while are named.
    """
    library = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and GLOO.search(str(error)))
    if world.store is None or not library:
        return None
    with contextlib.suppress(ValueError):  # only the main thread may; the launcher, too, has seen the death
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    alive, first = _survivors(world.store, world.rank, world.size)
    dead = [other for other in range(world.size) if other not in alive]
    who = f"rank{'s' * (len(dead) > 1)} {', '.join(map(str, dead))} died or was cut off"
    text = re.sub(r"^\[[^\]]*\]:?\s*", "", str(error).strip())  # without the library's source line
    reason = re.split(r"\. |\n", text)[0][:160] if text else type(error).__name__
    return PeerLost(
        f"{who if dead else 'a connection between ranks broke'} ({reason}); the same command goes on from the newest "
        "checkpoint",
        speaks=first,
    )


def announce(store: dist.Store, rank: int) -> None:
    """Writes into the job's store which process this rank is, so that the others can see whether it lives."""
    store.set(f"dit_fast/process/{rank}", f"{_machine()} {os.getpid()}")


def _machine() -> str:
    """Where process numbers mean what they mean here; "" where the system does not tell."""
    return "/".join(kernel()) if all(kernel()) else ""


def _has_ended(process: str) -> bool:
    """Whether an announced process is seen to have ended; False for one of another machine."""
    machine, _, pid = process.rpartition(" ")
    if not machine or machine != _machine():
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _survivors(store: dist.Store, rank: int, size: int) -> tuple[list[int], bool]:
    """(ranks that live or that met the failure, whether this one is to say which do not: the lowest, and only one).

    The store lies in rank 0, which leaves last: if it is gone, so is rank 0.
    """
    alive, deadline = [rank], time.monotonic() + ANSWER
    try:
        store.set_timeout(timedelta(seconds=ANSWER))
        store.set(f"dit_fast/alive/{rank}", "1")
        processes = [store.get(f"dit_fast/process/{other}").decode() for other in range(size)]
        while len(alive) < size - 1 and time.monotonic() < deadline:
            time.sleep(0.1)
            ended = [other for other in range(size) if _has_ended(processes[other])]
            alive = [other for other in range(size) if store.check([f"dit_fast/alive/{other}"])]
            if set(ended) - set(alive):  # those that met the failure may have left by now
                alive = sorted(set(range(size)) - set(ended) | set(alive))
                break
        speaks = rank == min(alive) and store.add("dit_fast/named", 1) == 1
        store.set(f"dit_fast/answered/{rank}", "")
        while rank == 0 and time.monotonic() < deadline:
            if store.check([f"dit_fast/answered/{other}" for other in alive]):
                break
            time.sleep(0.02)
        return alive, speaks
    except RuntimeError:
        return list(range(1, size)), rank == 1
