"""The CPU that a process may use: physical cores, the cgroup's quota, what the ranks beside it take, and bf16.

torch takes a thread for every core it sees: it sees no quota, and each of several ranks on one machine takes all of
them. Processes are pinned nowhere: a launcher's or the kernel's placement is kept, and read.
"""

import os
import platform
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from dit_fast.world import World

CHOSEN_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # torch reads them itself
BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16", "svebf16")  # of /proc/cpuinfo: x86, then Arm
_SIZE, _SECONDS = 256, 0.25  # of the products that are timed, and for how long each kind at most
_CPUS = 4096


def usable() -> set[int]:
    """Numbers of the logical CPUs that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def physical(logical: set[int], root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores behind these logical CPUs; two hyperthreads of one core share its arithmetic."""
    cores = set()
    for number in logical:
        try:
            cores.add((root / f"cpu{number}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            cores.add(str(number))
    return len(cores)


def quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs' worth of time that the cgroups of this process, version 1 or 2, grant it; None: no limit."""
    limits = []
    for line in _lines(own):
        number, controllers, path = line.split(":", 2)
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        mount = root if number == "0" else root / "cpu"
        relative = Path(path.strip().lstrip("/"))
        for folder in (relative, *relative.parents):  # a limit of an outer group holds too
            if number == "0":
                given = " ".join(_lines(mount / folder / "cpu.max")).split()
            else:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                given = [word for name in names for word in _lines(mount / folder / name)]
            if len(given) == 2 and given[0] not in ("max", "-1"):
                limits.append(int(given[0]) / int(given[1]))
    return min(limits, default=None)


def threads(logical: set[int], sharing: int = 1) -> int:
    """Threads for one of `sharing` processes on these logical CPUs, each with work of its own: at least 1."""
    cores, limit = physical(logical), quota()
    if limit is not None:
        cores = min(cores, int(limit))
    return max(1, cores // sharing)


def sharing(world: World) -> int:
    """Ranks, this one included, on this machine that may run on some of the same CPUs. Collective."""
    if world.size == 1:
        return 1
    mine = torch.zeros(1 + _CPUS, dtype=torch.int64)
    mine[0] = zlib.crc32(f"{platform.node()} {''.join(_lines(Path('/proc/sys/kernel/random/boot_id')))}".encode())
    mine[[1 + number for number in usable() if number < _CPUS]] = 1
    every = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(every, mine)
    return sum(bool(other[0] == mine[0] and (other[1:] * mine[1:]).any()) for other in every)


def use_threads(world: World) -> str:
    """Gives torch's operators this rank's share of the cores and says what was done, in one line. Collective."""
    shared = sharing(world)
    named = next((name for name in CHOSEN_BY_USER if os.environ.get(name)), None)
    if named is None:
        torch.set_num_threads(threads(usable(), shared))
    count = torch.get_num_threads()
    why = f"{named} says so" if named else f"{_cores()}{f', shared by {shared} ranks' if shared > 1 else ''}"
    return f"{count} CPU thread{'s' if count > 1 else ''} ({why})"


def describe() -> str:
    """For `dit-fast info`: cores, the threads that training takes, bf16."""
    named = next((name for name in CHOSEN_BY_USER if os.environ.get(name)), None)
    count = torch.get_num_threads() if named else threads(usable())
    found = bf16_instructions()
    bf16 = f"bf16 by {found}" if found else "no bf16 instructions: train with engine.precision=fp32"
    return (
        f"{_cores()}; training takes {count} thread{'s' if count > 1 else ''}{f' ({named})' if named else ''}; {bf16}"
    )


def bf16_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The best instruction set for bf16 products that this CPU has; None: none that is known."""
    flags: set[str] = set()
    for line in _lines(cpuinfo):
        if line.partition(":")[0].strip() in ("flags", "Features"):
            flags.update(line.partition(":")[2].split())
    return next((name for name in BF16_FLAGS if name in flags), None)


def bf16_warning(
    instructions: Callable[[], str | None] = bf16_instructions,
    rate: Callable[[torch.dtype], float] | None = None,
) -> str | None:
    """Why engine.precision=bf16 is slow on this CPU, with rates measured in half a second; None where it is not."""
    if instructions() is not None:
        return None
    narrow, single = ((rate or matmul_rate)(dtype) for dtype in (torch.bfloat16, torch.float32))
    if narrow >= single:
        return None
    return (
        f"engine.precision=bf16: this CPU has no bf16 instructions ({' or '.join(BF16_FLAGS[:2])}); its bf16 products "
        f"ran at {narrow / 1e9:.3g} GFLOP/s just now, those of fp32 at {single / 1e9:.3g}, {single / narrow:.1f} times "
        "as fast; engine.precision=fp32 is what to use here"
    )


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some matrix products."""
    a, b = (torch.full((_SIZE, _SIZE), 0.5, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while True:
        start = time.perf_counter()
        torch.mm(a, b)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return 2 * _SIZE**3 / best


def _cores() -> str:
    logical, limit = usable(), quota()
    cores = physical(logical)
    text = f"{cores} core{'s' if cores > 1 else ''}"
    if len(logical) != cores:
        text += f" with {len(logical)} hardware threads"
    if len(logical) != os.cpu_count():
        text += f" of {os.cpu_count()} hardware threads of the machine"
    return text if limit is None else f"{text}, a cgroup quota of {limit:.3g}"


def _lines(path: Path) -> Sequence[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return ()
