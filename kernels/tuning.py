"""Configurations that were measured to be the fastest on an architecture: tuned/ARCHITECTURE.json.

`make gpu-suite STAGE=tune` writes such a file. It maps a kernel's name to entries

    {"rows": 8192, "width": 1152, "stream": "fp32", "compute": "bf16", "configuration": [128, 128, 64, 8, 4]}

An entry counts where all of its other keys are equal, and its rows are the nearest, within a factor of REACH. Where
none does, the kernel file decides. A configuration must be one that the kernel file declares: those are compiled ahead
of time, have no spills and agree bit for bit. DIT_FAST_TUNED names another folder with such files.
"""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import torch

from dit_fast.errors import ConfigError

FOLDER = Path(os.environ.get("DIT_FAST_TUNED") or Path(__file__).with_name("tuned"))
REACH = 2  # times more or fewer rows, of which a measurement still says something
Table = dict[str, list[dict[str, Any]]]
Configuration = TypeVar("Configuration")


def read(folder: Path) -> dict[str, Table]:
    """Tables by architecture. Raises ConfigError for a file that holds none."""
    tables = {}
    for path in sorted(folder.glob("*.json")):
        try:
            table = json.loads(path.read_text())
            complete = all(entry["rows"] > 0 and "configuration" in entry for each in table.values() for entry in each)
        except (ValueError, TypeError, KeyError, AttributeError):
            complete = False
        if not complete:
            raise ConfigError(f"{path} is no table of tuned configurations; remove it or write it anew (STAGE=tune)")
        tables[path.stem] = table
    return tables


TABLES = read(FOLDER)  # once: what is launched must not change while a process runs


def architecture(device: torch.device) -> str:
    """The name of its table: "sm_90" or the like, "cpu"."""
    if device.type != "cuda":
        return device.type
    gpu = torch.cuda.get_device_properties(device)  # which torch.compile takes for a constant
    return f"sm_{gpu.major}{gpu.minor}"


def tuned(
    kernel: str, device: torch.device, rows: int, declared: Collection[Configuration], **key: str | int
) -> Configuration | None:
    """The configuration for a launch on `device` over `rows`, one of `declared`; None where the kernel file decides.

    Raises ConfigError for an entry whose configuration is not declared.
    """
    if not TABLES:
        return None
    best, least = None, float(REACH)
    for entry in TABLES.get(architecture(device), {}).get(kernel, ()):
        distance = max(entry["rows"], rows) / max(min(entry["rows"], rows), 1)
        if (distance < least or (best is None and distance == least)) and key.items() <= entry.items():
            best, least = entry["configuration"], distance
    if best is None:
        return None
    for configuration in declared:
        if configuration == (tuple(best) if isinstance(best, list) else best):
            return configuration
    known = ", ".join(str(list(each) if isinstance(each, tuple) else each) for each in declared)
    raise ConfigError(
        f"{FOLDER / architecture(device)}.json: {best} for {kernel} is none of the configurations that were compiled "
        f"without spills and agree bit for bit: {known}; remove its entry"
    )
