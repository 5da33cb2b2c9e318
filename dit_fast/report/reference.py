"""Reference curves of the recipes of quick-start size, and whether a run lies on the one of its configuration.

`dit-fast bench curves` records them: three runs of 200 steps in which every seed changes, each logged
quantity's mean over every ten steps, raw. docs/benchmarks.md has the rule with its statistics.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dit_fast
from dit_fast.data import DatasetInfo
from dit_fast.errors import DataError
from dit_fast.report.metrics import Metrics
from dit_fast.runs import SEEDS, TrainConfig, forbidden_changes, stored

FOLDER = Path(dit_fast.__file__).parent / "benchmarks" / "results" / "cpu" / "curves"
STEPS, EVERY = 200, 10  # of a recorded run; those that a recorded point is the mean of
WINDOW = 20  # steps, at least, that a compared point is the mean of
FEWEST = 4  # points
ALARM = 0.001  # nominal chance that a run like the recorded ones is off, over all points of all quantities
FLOOR = 0.01  # of the mean: the least half width, for what hardly varies from run to run
NEIGHBOURS = 2  # points on either side whose variances are pooled
NO_VALUES = {  # of metrics.jsonl
    "step", "samples", "epoch", "lr", "skipped", "rollbacks", "samples_per_s", "mfu", "seconds", "waiting",
    "slowest_rank", "slowest_data", "slowest_compute", "slowest_collective",
}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """runs: quantity -> float64 [runs, STEPS / EVERY]; point k is the mean over the EVERY steps up to EVERY (k + 1).

    data: what `data_identity` says of the data set.
    """

    recipe: str
    config: TrainConfig
    data: Mapping[str, Any]
    runs: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Band:
    """One quantity, [points] each: the last step, the run's mean, the recorded runs' mean, half the width around it."""

    steps: np.ndarray
    values: np.ndarray
    middle: np.ndarray
    half: np.ndarray

    @property
    def outside(self) -> np.ndarray:
        """bool [points]; a value that is not finite is outside."""
        return ~(np.abs(self.values - self.middle) <= self.half)


@dataclass(frozen=True)
class Verdict:
    """on: None where there is none. bands: by quantity, empty then. text: one line, for people."""

    on: bool | None
    text: str
    bands: Mapping[str, Band]


def quantities(metrics: Metrics) -> list[str]:
    """What a run logs of its training (losses, terms, norms), without counters and clock."""
    return list(dict.fromkeys(name for row in metrics.rows for name in row if name not in NO_VALUES))


def data_identity(info: DatasetInfo, fields: Sequence[str]) -> dict[str, Any]:
    """What tells a data set from another. Latents that two machines make from one source differ in their last bits, so
    the fingerprint is kept for the record and not compared. fields: those that a run reads.
    """
    return {
        "fingerprint": info.fingerprint,
        "source": info.source,
        "latents": [info.channels, info.size, info.size],
        "scale": np.broadcast_to(info.scale, info.channels).tolist(),
        "shift": np.broadcast_to(info.shift, info.channels).tolist(),
        "fields": {name: info.field(name).source for name in fields},
    }


def read_reference(path: Path) -> Reference:
    """The curves in a file. Raises DataError where they cannot be read."""
    try:
        content = json.loads(path.read_text())
        runs = [run["values"] for run in content["runs"]]
        values = {name: np.array([run[name] for run in runs], np.float64) for name in runs[0]}
        found = Reference(content["recipe"], stored(content["config"]), content["data"], values)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: not a reference curve ({error}); record it again") from None
    if len(runs) < 2 or any(value.shape != (len(runs), STEPS // EVERY) for value in values.values()):
        raise DataError(f"{path}: needs two runs or more, of {STEPS // EVERY} points each; record it again")
    return found


def differences(reference: Reference, config: TrainConfig, info: DatasetInfo) -> list[str]:
    """In what a run differs from the recorded ones, beside seeds, length and where and how it is done."""
    changes = forbidden_changes(reference.config, config)
    lines = [line for line in changes if line.partition(": ")[0] not in SEEDS]
    known = {name: field.source for name, field in info.fields.items()}
    own = data_identity(info, ()) | {"fields": {name: known.get(name) for name in reference.data["fields"]}}
    for name, wanted in reference.data.items():
        numbers = isinstance(wanted, list) and len(wanted) == len(own[name])
        same = np.allclose(wanted, own[name], rtol=1e-4) if numbers else wanted == own[name]
        if name != "fingerprint" and not same:
            lines.append(f"the {name} of the data")
    return lines


def find_verdict(metrics: Metrics, config: TrainConfig, info: DatasetInfo, folder: Path = FOLDER) -> Verdict:
    """The verdict by the recorded curve whose configuration and data the run has; else why there is none."""
    known = [read_reference(path) for path in sorted(folder.glob("*.json"))]
    if not known:
        return Verdict(None, f"There are no reference curves in {folder}.", {})
    gaps = {reference.recipe: differences(reference, config, info) for reference in known}
    nearest = min(known, key=lambda reference: len(gaps[reference.recipe]))
    if found := gaps[nearest.recipe]:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        text = (
            f"No reference curve for this configuration and data; the nearest, {nearest.recipe}, differs in {found[0]}"
        )
        return Verdict(None, f"{text}{more}.", {})
    return judge(nearest, metrics)


def judge(reference: Reference, metrics: Metrics) -> Verdict:
    """Whether the first 200 steps of a run lie on a curve: every point of every quantity inside its band."""
    name = reference.recipe
    last = metrics.rows[-1]["step"]
    if last < STEPS:
        return Verdict(None, f"The reference curve of {name} has {STEPS} steps, and this run has {last} so far.", {})
    absent = [quantity for quantity in reference.runs if not metrics.has(quantity)]
    further = [quantity for quantity in quantities(metrics) if quantity not in reference.runs]
    if absent or further:
        what = f"it does not log {absent[0]}" if absent else f"it also logs {further[0]}"
        return Verdict(False, f"Off the reference curve of {name}: {what}.", {})
    tail = ALARM / (len(reference.runs) * STEPS // WINDOW)
    bands = {quantity: _band(*metrics.column(quantity), runs, tail) for quantity, runs in reference.runs.items()}
    fewest = min(len(band.steps) for band in bands.values())
    if fewest < FEWEST:
        need = f"at {FEWEST} or more multiples of {EVERY}, {WINDOW} steps apart, up to step {STEPS}"
        return Verdict(None, f"The reference curve of {name} needs rows {need}; this run logs at others.", {})
    left = {quantity: int(np.flatnonzero(band.outside)[0]) for quantity, band in bands.items() if band.outside.any()}
    if not left:
        text = f"all {len(bands)} quantities stay in the bands of the recorded runs up to step {STEPS}"
        return Verdict(True, f"On the reference curve of {name}: {text}.", bands)
    first = min(left, key=lambda quantity: bands[quantity].steps[left[quantity]])
    band, at = bands[first], left[first]
    low, high = band.middle[at] - band.half[at], band.middle[at] + band.half[at]
    others = f"; {len(left)} of {len(bands)} quantities leave theirs" if len(left) > 1 else ""
    text = f"{first} is {band.values[at]:.4g} at step {band.steps[at]}, outside {low:.4g} to {high:.4g}{others}"
    return Verdict(False, f"Off the reference curve of {name}: {text}.", bands)


def _band(steps: np.ndarray, values: np.ndarray, runs: np.ndarray, tail: float) -> Band:
    """steps [n], values [n]: a column of the log, each the mean since the row before. runs [R, STEPS / EVERY].

    At each point the runs have a mean m and a variance. A further run differs from m by a normal number of variance
    (1 + 1 / R) v, so the half width is t sqrt((1 + 1 / R) v), with t the two-sided quantile of `tail`. Three runs say
    little of one point's variance: v is the mean over the points within NEIGHBOURS of it, whose degrees of freedom t
    has, or, where that is more, what the variance is of m^2 over all points.
    """
    ends = _ends(steps)
    recorded = np.array([_means(np.arange(EVERY, STEPS + 1, EVERY), run, ends) for run in runs])
    middle, variance = recorded.mean(0), recorded.var(0, ddof=1)
    share = variance.sum() / max(np.square(middle).sum(), 1e-30)
    half = []
    for point in range(len(variance)):
        near = variance[max(point - NEIGHBOURS, 0) : point + NEIGHBOURS + 1]
        v = max(near.mean(), share * middle[point] ** 2)
        half.append(student((len(runs) - 1) * len(near), tail) * ((1 + 1 / len(runs)) * v) ** 0.5)
    least = FLOOR * np.abs(middle) + 1e-6
    return Band(ends[1:], _means(steps, values, ends), middle, np.maximum(half, least))


def _ends(steps: np.ndarray) -> np.ndarray:
    """0 and the ends of the points: steps up to STEPS at which both a row and a recorded point end, WINDOW apart."""
    ends = [0]
    for step in steps[(steps % EVERY == 0) & (steps <= STEPS)]:
        if step - ends[-1] >= WINDOW:
            ends.append(int(step))
    return np.array(ends)


def _means(steps: np.ndarray, values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Means between `ends` of what is given as means between `steps`, which hold all ends but 0."""
    sums = np.concatenate([[0], np.cumsum(values * np.diff(steps, prepend=0))])
    at = np.searchsorted(np.concatenate([[0], steps]), ends)
    return np.diff(sums[at]) / np.diff(ends)


@functools.cache
def student(freedom: int, tail: float) -> float:
    """The t that a number of Student's distribution exceeds in magnitude with probability `tail`.

    With t = sqrt(freedom) tan(a) the density in a is proportional to cos(a)^(freedom - 1).
    """
    angles = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    beyond = np.cumsum(density[::-1])[::-1]
    return float(freedom**0.5 * np.tan(np.interp(-tail * beyond[0], -beyond, angles)))
