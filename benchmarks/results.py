"""Result files: benchmarks/results/<device>/<benchmark>.json, and what makes one complete."""

import json
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dit_fast import __version__, files
from dit_fast.benchmarks.ceilings import Ceilings
from dit_fast.benchmarks.gate import ROOT
from dit_fast.benchmarks.timing import cache_bytes
from dit_fast.errors import UserError
from dit_fast.report.machine import processor

RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1
_TOP = {
    "schema", "benchmark", "device", "versions", "commit", "dirty", "command", "written", "seconds", "gate", "ceilings",
    "cases", "targets",
}  # fmt: skip
_CASE = {"name", "dtype", "shape", "baseline", "parts", "costs"}
_PART = {"sides"}
_SIDE = {
    "samples_s", "median_s", "quartiles_s", "bytes", "flops", "bound_s", "bytes_per_s", "flops_per_s", "of_bound",
    "speedup", "paired_speedup",
}  # fmt: skip


def device_of(name: str) -> torch.device:
    """ "auto" (CUDA if there is one), "cpu" or "cuda". Raises UserError for another or an absent one."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name} is unknown; valid: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to torch; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def slug(device: torch.device) -> str:
    """ "cpu", or the CUDA device's name in lower case with dashes ("nvidia-h200")."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Device, versions and commit. commit: whose files these are, where git's history is absent or older than they are;
    unless it is what git says, "dirty" is null."""
    head = _git("rev-parse", "HEAD")
    known = head is not None and (commit is None or head.startswith(commit))
    status = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results") if known else None
    return {
        "device": {
            "slug": slug(device),
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
            "type": device.type,
            "arch": "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else None,
            "threads": torch.get_num_threads(),
            "cache_bytes": cache_bytes(device),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
            "dit_fast": __version__,
        },
        "commit": head if known else commit,
        "dirty": bool(status) if known else None,
    }


def document(
    benchmark: str,
    where: dict[str, Any],
    *,
    seconds: float,
    gate: dict[str, Any],
    ceilings: Ceilings,
    cases: Sequence[dict[str, Any]],
    targets: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """A whole result; `where` is what `environment` said before the measurement."""
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        **where,
        **occasion(),
        "seconds": round(seconds, 1),
        "gate": gate,
        "ceilings": {
            "copy_bytes_per_s": ceilings.copy,
            "read_bytes_per_s": ceilings.read,
            "matmul_flops_per_s": ceilings.matmul,
        },
        "targets": list(targets),
        "cases": list(cases),
    }


def occasion() -> dict[str, str]:
    """The command of this process, and the time."""
    first, *rest = sys.orig_argv[1:] or sys.argv
    begin = ["dit-fast"] if Path(first).name == "dit-fast" else ["python", first]
    return {
        "command": " ".join([*begin, *rest]),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def check(result: Any, where: str = "result") -> None:
    """Raises UserError naming the first thing that a result lacks."""
    _require(result, _TOP, where)
    if result["schema"] != SCHEMA:
        raise UserError(f"{where}: schema {result['schema']}, this version reads {SCHEMA}; measure again")
    for case in result["cases"]:
        _require(case, _CASE, f"{where}: case")
        for part, entry in case["parts"].items():
            _require(entry, _PART, f"{where}: {case['name']}, {part}")
            for name, side in entry["sides"].items():
                _require(side, _SIDE, f"{where}: {case['name']}, {part}, {name}")
                if not side["samples_s"]:
                    raise UserError(f"{where}: {case['name']}, {part}, {name} has no samples; measure again")


def _require(entry: Any, keys: set[str], where: str) -> None:
    missing = sorted(keys - set(entry)) if isinstance(entry, dict) else sorted(keys)
    if missing:
        raise UserError(f"{where} lacks '{missing[0]}'; measure again")


def save(result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes <folder>/<device>/<benchmark>.json, the benchmark's name in letters that files can have."""
    check(result)
    name = re.sub(r"[^a-z0-9_]+", "-", result["benchmark"].lower()).strip("-")
    path = folder / result["device"]["slug"] / f"{name}.json"
    write(path, rounded(result))
    return path


def write(path: Path, content: dict[str, Any]) -> None:
    """JSON, whole or not at all, one line per list of numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([-+\d.eE,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    files.replace(path, f"{text}\n".encode())


def rounded(value: Any) -> Any:
    """Six digits: more of a time or of a loss says nothing."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def load_all(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All results below `folder`, by device and benchmark. Raises UserError naming a file that is not one."""
    results = []
    for path in sorted(folder.glob("*/*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); measure again") from None
        if "benchmark" in content:
            check(content, str(path))
            results.append(content)
    return results


def write_table(page: Path, name: str, text: str) -> None:
    """Puts text between the two lines of a Markdown page that bear the name. Raises UserError where there are none."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"{page}: has no lines '{begin}' and '{end}' for the table; put them back")
    with files.replacing(page) as file:
        file.write(f"{before}{begin}\n{text}\n{end}{after}".encode())


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
