"""Which implementation of the long skip measured best, by (arch, D, bucket of M, dtype); shipped as JSON beside this.

    {"format": 1, "op": "long_skip", "source": "<result file or reason>", "entries": [
        {"arch": "sm_90", "width": 1152, "rows": 65536, "dtype": "bfloat16", "backend": "triton"}]}

arch: "sm_" and the compute capability. width: D. rows: the upper end of a bucket of M, a power of two; an entry holds
for rows / 2 < M <= rows. dtype: that of the linear map (autocast's where it is on): bfloat16, float16 or float32.
backend: "gemm" or "triton". A case that is not listed takes "gemm". A tuning run writes the file; nothing is measured
while a model runs, so that all ranks decide alike.
"""

import functools
import json
from pathlib import Path

import torch

from dit_fast.errors import ConfigError

PATH = Path(__file__).with_suffix(".json")
FALLBACK = "gemm"
_FIELDS = {"arch": str, "width": int, "rows": int, "dtype": str, "backend": str}
_CHOICES = {"dtype": ("bfloat16", "float16", "float32"), "backend": ("gemm", "triton")}

Key = tuple[str, int, int, str]


def bucket(rows: int) -> int:
    """Smallest power of two that is not below `rows`; 1 for 0."""
    return 1 << max(rows - 1, 0).bit_length()


def preferred(arch: str, width: int, rows: int, dtype: torch.dtype) -> str:
    """ "gemm" or "triton" for M = rows on this architecture, from the shipped table."""
    return shipped().get((arch, width, bucket(rows), str(dtype).removeprefix("torch.")), FALLBACK)


@functools.cache
def arch_of(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def shipped() -> dict[Key, str]:
    return load(PATH)


def load(path: Path) -> dict[Key, str]:
    """The table in a file. Raises ConfigError, naming file and entry, for anything but the format above."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable JSON file ({error}); write it again with the tuner") from error
    if not isinstance(content, dict) or content.get("format") != 1 or content.get("op") != "long_skip":
        raise ConfigError(f'{path}: must be an object with "format": 1 and "op": "long_skip"; write it again')
    if set(content) != {"format", "op", "source", "entries"} or not isinstance(content["entries"], list):
        raise ConfigError(f"{path}: must hold format, op, source and a list of entries, not {sorted(content)}")
    table: dict[Key, str] = {}
    for index, entry in enumerate(content["entries"]):
        key = _key(f"{path}: entry {index}", entry)
        if key in table:
            raise ConfigError(f"{path}: entry {index} repeats {key}; keep one")
        table[key] = entry["backend"]
    return table


def _key(place: str, entry: object) -> Key:
    if not isinstance(entry, dict) or set(entry) != set(_FIELDS):
        raise ConfigError(f"{place} must have exactly the fields {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if type(entry[name]) is not kind:
            raise ConfigError(f"{place}: {name} must be of type {kind.__name__}, not {entry[name]!r}")
    for name, valid in _CHOICES.items():
        if entry[name] not in valid:
            raise ConfigError(f"{place}: {name} '{entry[name]}' is none of {', '.join(valid)}")
    digits = entry["arch"].removeprefix("sm_")
    if digits == entry["arch"] or not digits.isdecimal():
        raise ConfigError(f"{place}: arch '{entry['arch']}' must be like sm_90")
    if entry["width"] < 1 or entry["rows"] < 1 or entry["rows"] != bucket(entry["rows"]):
        raise ConfigError(f"{place}: width must be at least 1 and rows a power of two, not {entry}")
    return entry["arch"], entry["width"], entry["rows"], entry["dtype"]
