"""`dit-fast watch RUN`: how a run stands, from the files of its folder alone. What these hold is shown or left out."""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from dit_fast.checkpoint.step import step_folders
from dit_fast.display import percent, rate
from dit_fast.errors import DataError
from dit_fast.report.metrics import is_number
from dit_fast.train.journal import CONFIG, METRICS
from dit_fast.train.lock import FILE, PATIENCE, kernel
from dit_fast.train.quarantine import QUARANTINE
from dit_fast.train.rollback import HISTORY

TAIL = 1 << 16  # bytes of a log that are read


def watch(run: Path, every: float, once: bool) -> int:
    """Prints the table; until the run has ended, again and again in its place. Raises DataError for no run folder."""
    if not (run / METRICS).is_file() and not (run / CONFIG).is_file():
        inside = sorted(path.parent.name for path in run.glob(f"*/{CONFIG}")) if run.is_dir() else []
        hint = f"; it holds the runs {', '.join(inside)}" if inside else ""
        raise DataError(f"{run}: is no run folder, it has neither {METRICS} nor {CONFIG}{hint}")
    shown = 0
    while True:
        standing, rows = look(run)
        lines = [f"{name:<16}{value}" for name, value in rows]
        if shown and sys.stdout.isatty():
            print(f"\x1b[{shown}F\x1b[J", end="")
        print("\n".join(lines), flush=True)
        shown = len(lines)
        if once or standing != "running":
            return 0
        time.sleep(every)


def look(run: Path) -> tuple[str, list[tuple[str, str]]]:
    """(running, finished, stopped, dead; the table's rows)."""
    logged = _rows(run / METRICS)
    row = logged[-1] if logged else {}
    config = _json(run / CONFIG)
    total = _number(_group(config, "run").get("steps"))
    step = _number(row.get("step"))
    saved = [number for number, _ in step_folders(run)]
    standing, holder = _standing(run, max(step or 0, *saved, 0) >= (total or float("inf")))
    table = [("run", f"{run}: {standing}{holder}")]
    table.append(("step", f"{_whole(step)} of {_whole(total)}"))
    for name, key in (("loss", "loss"), ("gradient norm", "grad_norm")):
        value = _number(row.get(key))
        table.append((name, "-" if value is None else f"{value:.4f}"))
    table.append(("samples/s", _shown(row.get("samples_per_s"), rate)))
    table.append(("MFU", _shown(row.get("mfu"), percent)))
    slow: dict[str, Any] = next(
        (each for each in reversed(logged) if _number(each.get("slowest_rank")) is not None), {}
    )
    table.append(("slowest rank", _slowest(slow)))
    table.append(("time left", _left(logged, total) if standing == "running" else "-"))
    table.append(("checkpoint", f"step {max(saved)}" if saved else "none"))
    table.append(("skipped steps", _skipped(logged)))
    table.append(("rollbacks", _events(run / HISTORY, "cause")))
    table.append(("bad samples", _events(run / QUARANTINE, "error")))
    return standing, table


def _standing(run: Path, done: bool) -> tuple[str, str]:
    """By the lock: its holder lives, has let it go, or has not renewed it for PATIENCE seconds."""
    path = run / FILE
    holder = _json(path)
    if "pid" not in holder:
        return ("finished" if done else "stopped"), ""
    who = f" (process {holder['pid']} on {holder.get('host')})"
    boot, namespace = kernel()
    if boot and (holder.get("boot"), holder.get("namespace")) == (boot, namespace):
        alive = os.path.exists(f"/proc/{holder['pid']}/stat") if isinstance(holder["pid"], int) else False
    else:
        try:
            alive = time.time() - path.stat().st_mtime < PATIENCE
        except OSError:
            alive = False
    if alive:
        return "running", _printable(who)
    return (
        ("finished", "") if done else ("dead", _printable(f"{who} ended without letting go; the same command resumes"))
    )


def _skipped(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "-"
    return f"{_whole(sum(_number(each.get('skipped')) or 0 for each in rows))} in the newest {len(rows)} rows"


def _slowest(row: dict[str, Any]) -> str:
    if not row:
        return "-"
    parts = [f"{name} {_shown(row.get(f'slowest_{name}'), percent)}" for name in ("data", "compute", "collective")]
    return f"{_whole(row['slowest_rank'])} ({', '.join(parts)}), others wait {_shown(row.get('waiting'), percent)}"


def _left(rows: list[dict[str, Any]], total: float | None) -> str:
    """From the steps and seconds of the newest rows of one start."""
    points = [(_number(row.get("step")), _number(row.get("seconds"))) for row in rows]
    known = [(step, seconds) for step, seconds in points if step is not None and seconds is not None]
    first = len(known) - 1
    while first > 0 and known[first - 1][1] < known[first][1] and known[first - 1][0] < known[first][0]:
        first -= 1
    if total is None or first < 0 or len(known) - first < 2:
        return "-"
    (start, since), (step, now) = known[first], known[-1]
    seconds = max(total - step, 0) * (now - since) / (step - start)
    return str(timedelta(seconds=int(seconds))) if seconds < 1e9 else "-"


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows at the end of a log; what is no row is passed over."""
    found = []
    for line in _tail(path).splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and _number(row.get("step")) is not None:
            found.append(row)
    return found


def _tail(path: Path) -> bytes:
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL, 0))
            return file.read(TAIL)
    except OSError:
        return b""


def _events(path: Path, reason: str) -> str:
    """How many lines a journal has, and what the last one says."""
    count = _lines(path)
    last: dict[str, Any] = next(iter(_rows(path)[-1:]), {})
    if not count or not last:
        return str(count)
    back = _number(last.get("to"))
    where = f"step {_whole(last['step'])}" + ("" if back is None else f" back to {_whole(back)}")
    return _printable(f"{count}, the last: {where}, {last.get(reason)}")


def _lines(path: Path) -> int:
    try:
        if not path.is_file():
            return 0
        with path.open("rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(TAIL), b""))
    except OSError:
        return 0


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_tail(path))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _group(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> float | None:
    """A finite number of a sane size, or None."""
    return float(value) if is_number(value) and abs(value) < 1e15 else None


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _shown(value: Any, show: Any) -> str:
    number = _number(value)
    return "-" if number is None else show(number)


def _printable(text: str) -> str:
    return "".join(letter for letter in text[:200] if letter.isprintable())
