"""Reads what a run wrote about itself: `metrics.jsonl` and `config.json`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_fast.errors import DataError


@dataclass(frozen=True)
class Metrics:
    """Logged rows, ascending in `step`; a step that was repeated after a resume appears once, as last written."""

    rows: tuple[dict[str, Any], ...]

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps int64 [n], values float64 [n]) of the rows that hold a finite-or-not number under `name`."""
        found = [(row["step"], row[name]) for row in self.rows if isinstance(row.get(name), int | float)]
        steps = np.array([step for step, _ in found], np.int64)
        return steps, np.array([value for _, value in found], np.float64)

    def has(self, name: str) -> bool:
        return any(isinstance(row.get(name), int | float) for row in self.rows)


def read_metrics(run: str | Path) -> Metrics:
    """The metrics of a run folder. A last line cut short by a kill is left out.

    Raises DataError when the file is absent, holds no rows, or a line before the last is not a row.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: missing; give the folder of a run (it holds config.json and metrics.jsonl)")
    lines, rows = path.read_text().splitlines(), {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise DataError(f"{path}: line {number} is not a row with a step; remove that line") from None
    if not rows:
        raise DataError(f"{path}: holds no rows yet; let the run log at least one step")
    return Metrics(tuple(rows[step] for step in sorted(rows)))


def read_config(run: str | Path) -> dict[str, Any]:
    """The resolved configuration of a run as a plain dictionary. Raises DataError when it cannot be read."""
    path = Path(run) / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give the folder of a run") from None


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average of finite values over at most `window` points; shorter at both ends. Same length."""
    half = max(window // 2, 0)
    return np.array([values[max(i - half, 0) : i + half + 1].mean() for i in range(len(values))])
