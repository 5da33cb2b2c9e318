"""Ranks end with their launcher. Standard library only: armed before torch is imported, which takes seconds.

`deepspeed` starts a second process that starts the ranks, and torchrun's agent starts them itself. A signal that kills
one of these does not reach the ranks, and they would train on. So each rank watches them. When one has died, the rank
gets SIGUSR1, as if a scheduler took the machine: it saves and leaves with Status.RESTART, so that launchers on other
machines start again, or it ends at once where it has not begun to train. What is left after GRACE seconds is killed;
DeepSpeed's launcher grants as many to what it stops. The runs of `dit-fast sweep` end with it in the same way.
"""

import contextlib
import os
import select
import signal
import threading
import time
from pathlib import Path

GRACE = 30.0
SWEEP = "DIT_FAST_SWEEP"  # its process, which has set this
LAUNCHED = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")  # set by DeepSpeed's launcher, by torchrun
DEEPSPEED = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")  # the command, above its launcher
LAUNCHER = "deepspeed.launcher.launch"
AGENTS = ("torchrun", "torch.distributed.run", "torch.distributed.launch", LAUNCHER)


def arm() -> None:
    """Watches the launcher from a thread, if one started this process; ends the process where it has died already.

    Nothing is armed under srun and mpirun, which end their tasks themselves, or where the system has no pidfd.
    """
    launched, sweep = any(name in os.environ for name in LAUNCHED), os.environ.get(SWEEP, "")
    if not (launched or sweep.isdecimal()) or not hasattr(os, "pidfd_open"):
        return
    chain = _chain(os.getppid()) if launched else [os.getppid()]
    if chain and sweep.isdecimal():
        chain.append(int(sweep))
    descriptors = []
    for pid in chain:
        with contextlib.suppress(OSError):
            descriptors.append(os.pidfd_open(pid))
    if not chain or len(descriptors) < len(chain) or os.getppid() != chain[0]:
        _say("the launcher died before this process began")
        os._exit(1)
    threading.Thread(target=_watch, args=(descriptors,), daemon=True, name="leash").start()


def _chain(parent: int) -> list[int]:
    """The processes to watch: the launcher, all between it and this process, `deepspeed` above it; [] if it is gone."""
    if _adopted(parent):
        return []
    chain = [parent]
    while len(chain) < 4 and not _names(chain[-1], AGENTS):
        chain.append(_parent(chain[-1]))
    if not _names(chain[-1], AGENTS):  # started some other way: what is above the parent is not known
        return chain[:1]
    above = _parent(chain[-1])
    if _names(chain[-1], (LAUNCHER,)):
        if _names(above, DEEPSPEED):
            chain.append(above)
        elif not any(argument.startswith("--node_rank") for argument in _arguments(chain[-1])):
            return []  # on one machine the launcher is a child of `deepspeed`
    return chain


def _watch(descriptors: list[int]) -> None:
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)  # readable once the process has ended
    poller.poll()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _say(f"the launcher died; this run saves and ends (what is left after {GRACE:.0f} s is killed)")
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"dit-fast: rank {os.environ.get('RANK', '?')}: {text}\n".encode())


def _adopted(pid: int) -> bool:
    """Whether this parent took in the orphans of others: process 1, unless it is a launcher in a container."""
    return pid < 1 or (pid == 1 and "python" not in os.path.basename((_arguments(1) or [""])[0]))


def _names(pid: int, words: tuple[str, ...]) -> bool:
    return any(os.path.basename(argument) in words for argument in _arguments(pid)[:6])


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0
