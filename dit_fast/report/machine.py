"""A description of this machine."""

import os
import platform
from pathlib import Path


def machine_facts() -> list[tuple[str, str]]:
    """(name, value) pairs: processor, cores this process may use, GPUs, versions of Python and torch."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts = [("processor", processor()), ("cores", str(cores))]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        facts += [("GPUs", f"{len(names)} x {names[0]}")]
    return [*facts, ("Python", platform.python_version()), ("torch", torch.__version__)]


def processor() -> str:
    """The name of this machine's kind of processor."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
