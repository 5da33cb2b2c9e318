"""The death of a rank as the others meet it, a failed collective: one of them says in one line which is missing."""

import contextlib
import re
import signal
import time
from datetime import timedelta

import torch.distributed as dist

from dit_fast.errors import UserError

ANSWER = 10.0  # seconds in which every surviving rank meets the failure, on a busy machine too
GLOO = re.compile(r"gloo|(closed|reset) by peer|broken pipe", re.IGNORECASE)  # it raises plain RuntimeErrors


class PeerLost(UserError):
    """Another rank ended in the middle of the job."""

    status = 4  # `LOST` of __main__, which imports no torch

    def __init__(self, message: str, speaks: bool):
        super().__init__(message)
        self.alone = speaks  # type: ignore[misc]


def explain(error: Exception, rank: int, size: int) -> PeerLost | None:
    """The same failure in plain words; None where it is not a lost connection between ranks.

    Every survivor writes its number into the job's store; those that are missing there after a while are named.
    """
    library = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and GLOO.search(str(error)))
    if size < 2 or not dist.is_initialized() or not library:
        return None
    with contextlib.suppress(ValueError):  # only the main thread may; the launcher, too, has seen the death
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    alive = _survivors(rank, size)
    dead = [other for other in range(size) if other not in alive]
    who = f"rank{'s' * (len(dead) > 1)} {', '.join(map(str, dead))} died or was cut off"
    text = re.sub(r"^\[[^\]]*\]:?\s*", "", str(error).strip())  # without the library's source line
    reason = re.split(r"\. |\n", text)[0][:160] if text else type(error).__name__
    return PeerLost(
        f"{who if dead else 'a connection between ranks broke'} ({reason}); the same command goes on from the newest "
        "checkpoint",
        speaks=rank == min(alive),
    )


def _survivors(rank: int, size: int) -> list[int]:
    """Ranks that met the failure. The store lies in rank 0 or in torchrun's agent: if it is gone, so is rank 0.

    Rank 0 returns last: a store that ends while others read it makes torch print a stack trace in each of them.
    """
    alive, deadline = [rank], time.monotonic() + ANSWER
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=ANSWER))
        store.set(f"dit_fast/alive/{rank}", "1")
        for group in list(dist.distributed_c10d._world.pg_map):
            group.abort()  # a rank that waits for this one, not for the dead one, has met nothing yet
        while len(alive) < size - 1 and time.monotonic() < deadline:
            time.sleep(0.1)
            alive = [other for other in range(size) if store.check([f"dit_fast/alive/{other}"])]
        store.set(f"dit_fast/left/{rank}", "1")
        left = [f"dit_fast/left/{other}" for other in alive]
        while rank == 0 and not store.check(left) and time.monotonic() < deadline:
            time.sleep(0.1)
        return alive
    except RuntimeError:
        return list(range(1, size))
