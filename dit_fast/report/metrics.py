"""Reads what a run logged: `metrics.jsonl`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_fast.errors import DataError

TAIL = 0.1  # share of the run over which final values are averaged


@dataclass(frozen=True)
class Metrics:
    """Logged rows, ascending in `step`; a step that was repeated after a resume appears once, as last written."""

    rows: tuple[dict[str, Any], ...]

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps int64 [n], values float64 [n]) of the rows that hold a finite-or-not number under `name`."""
        found = [(row["step"], row[name]) for row in self.rows if is_number(row.get(name))]
        steps = np.array([step for step, _ in found], np.int64)
        return steps, np.array([value for _, value in found], np.float64)

    def names(self) -> list[str]:
        """Columns that hold a number somewhere."""
        return list(dict.fromkeys(name for row in self.rows for name, value in row.items() if is_number(value)))

    def has(self, name: str) -> bool:
        return any(is_number(row.get(name)) for row in self.rows)

    def final(self, name: str) -> float:
        """Mean of a logged value over the last tenth of the run; nan where it was not logged."""
        steps, values = self.column(name)
        late = values[steps > self.rows[-1]["step"] * (1 - TAIL)]
        return float(late.mean()) if len(late) else float("nan")

    def median(self, name: str) -> float:
        """Median of a logged value over the run; nan where it was not logged."""
        values = self.column(name)[1]
        return float(np.median(values)) if len(values) else float("nan")


def read_metrics(run: str | Path) -> Metrics:
    """The metrics of a run folder. A last line cut short by a kill is left out.

    Raises DataError when the file is absent, holds no rows, or a line before the last is not a row.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: missing; give the folder of a run, which holds that file")
    rows: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = _row(line)
            rows[row["step"]] = row
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            if number == len(lines):
                break
            raise DataError(f"{path}: line {number} is not a row with a step; remove that line") from None
    if not rows:
        raise DataError(f"{path}: holds no rows yet; let the run log at least one step")
    return Metrics(tuple(rows[step] for step in sorted(rows)))


def _row(line: bytes) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row["step"], int) or not 0 <= row["step"] < 1 << 63:
        raise ValueError("no step")
    for value in row.values():
        if is_number(value):
            float(value)  # a whole number of 400 digits has no place in a figure
    return row


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average of the finite values among at most `window` points; fewer at both ends. Same length."""
    half, places = max(window // 2, 0), np.arange(len(values))
    first, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    finite = np.isfinite(values)
    sums, counts = (np.concatenate([[0], np.cumsum(part)]) for part in (np.where(finite, values, 0.0), finite))
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[first]) / (counts[end] - counts[first])
