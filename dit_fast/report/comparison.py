"""Whether runs differ: means and spread over training seeds, and a verdict that says no more than they carry.

Training again with another seed moves FID more than drawing again from one model, and gaps under 1.3 % between single
runs are inconclusive (arXiv 2606.20536). So the unit is a training run; runs that differ in their seeds alone are one
group; and "better" is said only of three seeds or more on each side, a gap of at least `margin`, and a 95 % interval of
the difference (Welch's t) without 0.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_fast import options
from dit_fast.checkpoint.run import refuse_runs_inside
from dit_fast.errors import DataError, UserError
from dit_fast.evaluation.records import Evaluation, Protocol, direction, read_evaluations
from dit_fast.report.reference import SEEDS, student
from dit_fast.runs import TrainConfig, forbidden_changes, read_config

MARGIN = 0.013  # of the mean: less is inconclusive
FEWEST = 3  # seeds
SHOWN = 3  # keys that an error names
TAIL = 0.05  # of the interval, both ends


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone. values: of each run, a mean over its draws. sd: over runs, ddof 1."""

    name: str
    values: tuple[float, ...]
    runs: tuple[str, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def sd(self) -> float | None:
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """Of a group from the baseline, relative to the baseline's mean (None where that is 0); interval: 95 %, None where
    a spread is unknown.
    """

    group: str
    relative: float | None
    interval: tuple[float, float] | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """One metric by one protocol (its seed aside) at one step. groups[0] is the baseline.

    seeds: the keys over which the spread is taken. other: keys in which groups differ too, beside their names.
    """

    metric: str
    step: int
    protocol: str
    seeds: str
    other: tuple[str, ...]
    groups: tuple[Group, ...]
    differences: tuple[Difference, ...]

    def json(self) -> dict[str, Any]:
        rows = [asdict(group) | {"mean": group.mean, "sd": group.sd} for group in self.groups]
        return asdict(self) | {"groups": rows}


def compare(
    folders: Sequence[Path],
    by: Sequence[str] = (),
    metrics: Sequence[str] = (),
    step: int | None = None,
    baseline: str | None = None,
    margin: float = MARGIN,
) -> list[Comparison]:
    """One comparison for each metric and protocol that all runs share.

    folders: of runs, or folders that hold runs. by: keys, or groups of keys, whose values tell groups apart (`method`,
    `model.skip_wiring`, `optimizer`); none: every key in which the runs differ. metrics: none: all. step: of the
    weights; None: the last one that all runs were evaluated at. baseline: a group's name; None: that of the first run.
    Raises UserError for runs of one group that differ in more than seeds, for the same run twice, and where nothing is
    shared.
    """
    if not 0 < margin < 1:
        raise UserError(f"--margin {margin}: is a share of the mean, e.g. {MARGIN}")
    runs = {folder: read_config(folder / "config.json") for folder in _expanded(folders)}
    if len(runs) < 2:
        alone = ", ".join(map(str, runs)) or "none"
        raise UserError(f"compare needs two runs or more, and got {alone}; name another beside it")
    names, other = _grouped(runs, by)
    measured = {folder: _measured(folder) for folder in runs}
    found = []
    for protocol, metric, at in _shared(measured, metrics, step):
        per_group: dict[str, list[tuple[Path, float]]] = {}
        for folder, evaluations in measured.items():
            drawn = [each.values[metric] for each in evaluations.get((protocol, at), ()) if metric in each.values]
            per_group.setdefault(names[folder], []).append((folder, float(np.mean(drawn))))
        groups = [
            Group(name, tuple(value for _, value in rows), tuple(str(folder) for folder, _ in rows))
            for name, rows in per_group.items()
        ]
        groups = _first(groups, baseline)
        differences = [_difference(group, groups[0], metric, margin) for group in groups[1:]]
        line = replace(protocol, seed=None).text()
        found.append(Comparison(metric, at, line, _varied(runs), tuple(other), tuple(groups), tuple(differences)))
    return found


def text(comparison: Comparison) -> str:
    """For a terminal: the protocol's line, a table, and a line for each difference."""
    better = "higher" if direction(comparison.metric) > 0 else "lower"
    width = max(len(group.name) for group in comparison.groups)
    lines = [
        f"{comparison.metric} at step {comparison.step} ({better} is better; spread over {comparison.seeds})",
        f"  {comparison.protocol}",
        *([f"  the groups also differ in {', '.join(comparison.other)}"] if comparison.other else []),
        f"  {'':{width}}  runs      mean        sd  each",
    ]
    for group in comparison.groups:
        sd = "-" if group.sd is None else f"{group.sd:.4g}"
        each = " ".join(f"{value:.4g}" for value in group.values)
        lines.append(f"  {group.name:{width}}  {len(group.values):4}  {group.mean:8.4g}  {sd:>8}  {each}")
    for one in comparison.differences:
        interval = "" if one.interval is None else f" [{one.interval[0]:+.1%}, {one.interval[1]:+.1%}]"
        lines.append(f"  {one.group} against {comparison.groups[0].name}: {share(one)}{interval}: {one.verdict}")
    return "\n".join(lines)


def share(difference: Difference) -> str:
    """The relative difference for people."""
    return "no share of 0" if difference.relative is None else f"{difference.relative:+.1%}"


def _runs_in(folder: Path) -> list[Path]:
    """The folder, if it is a run; else the runs below it, at any depth."""
    if (folder / "config.json").exists():
        refuse_runs_inside(folder)
        return [folder]
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return [run for path in inside if not _foreign(path / "config.json") for run in _runs_in(path)]


def _foreign(path: Path) -> bool:
    """Whether it is the config.json of an exported model or of an encoder, which no one named."""
    try:
        return "optimizer" not in json.loads(path.read_text())
    except (OSError, ValueError):
        return False  # none, or one that `read_config` refuses by name


def _expanded(folders: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for folder in folders:
        inside = _runs_in(folder)
        if not inside:
            raise DataError(f"{folder}: neither a run nor a folder that holds runs (config.json is missing)")
        found += inside
    seen: set[Path] = set()
    for folder in found:
        if folder.resolve() in seen:
            raise UserError(f"{folder} is named twice")
        seen.add(folder.resolve())
    return found


def _grouped(runs: Mapping[Path, TrainConfig], by: Sequence[str]) -> tuple[dict[Path, str], list[str]]:
    """The group of each run, and keys in which groups differ that are not in their names."""
    trees = {folder: options.to_dict(config) for folder, config in runs.items()}
    flat = {folder: dict(options.leaves(tree)) for folder, tree in trees.items()}
    known = dict.fromkeys(key for values in flat.values() for key in values)
    wanted = ["methods" if key == "method" else key for key in by]
    for key in wanted:
        if not any(_within(path, key) for path in known):
            raise UserError(f"--by {key}: no run has this key{options.nearest(key, known)}")
    differing = _differing(list(runs.values()))
    named = [key for key in differing if not by or any(_within(key, wish) for wish in wanted)]
    groups: dict[str, list[Path]] = {}
    for folder in runs:
        parts = (
            ["+".join(trees[folder]["methods"]) or "no method"] if any(_within(key, "methods") for key in named) else []
        )
        parts += [
            f"{key}={_short(flat[folder][key])}" for key in named if key in flat[folder] and tells(key, flat.values())
        ]
        groups.setdefault(" ".join(parts) or "all", []).append(folder)
    for name, members in groups.items():
        keys = _differing([runs[folder] for folder in members])
        if keys:
            told = ", ".join(f"{key} ({_both(flat[folder].get(key) for folder in members)})" for key in keys[:SHOWN])
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            wish = " ".join(f"--by {key}" for key in keys[:SHOWN])
            raise UserError(f"runs of '{name}' also differ in {told}{more}; add {wish}, or leave some out")
        seeds: dict[tuple[Any, ...], Path] = {}
        for folder in members:
            drawn = tuple(flat[folder].get(key) for key in SEEDS)
            if drawn in seeds:
                raise UserError(f"{folder} and {seeds[drawn]} have equal seeds and configurations; leave one out")
            seeds[drawn] = folder
    return {folder: name for name, members in groups.items() for folder in members}, [
        key for key in differing if key not in named
    ]


def _differing(configs: Sequence[TrainConfig]) -> list[str]:
    """Keys that decide what is computed and are not the same in all, the seeds aside."""
    lines = [line for config in configs[1:] for line in forbidden_changes(configs[0], config)]
    return [key for key in dict.fromkeys(line.partition(": ")[0] for line in lines) if key not in SEEDS]


def tells(key: str, flat: Iterable[Mapping[str, Any]]) -> bool:
    """Whether those that have a key differ in it: a setting of a method that others lack adds nothing to its name."""
    return key != "methods" and len({json.dumps(values[key]) for values in flat if key in values}) > 1


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _both(values: Iterable[Any]) -> str:
    return " and ".join(dict.fromkeys(_short(value) for value in values))


def _within(path: str, key: str) -> bool:
    return path == key or path.startswith(f"{key}.")


def _measured(folder: Path) -> dict[tuple[Protocol, int], list[Evaluation]]:
    """By protocol without its seed, and step: what was drawn again from the same weights lies together."""
    found: dict[tuple[Protocol, int], list[Evaluation]] = {}
    for each in read_evaluations(folder):
        if each.step is not None:
            found.setdefault((replace(each.protocol, seed=None), each.step), []).append(each)
    if not found:
        raise UserError(f"{folder}: holds no evaluation; run `dit-fast evaluate {folder}`")
    return found


def _shared(
    measured: Mapping[Path, Mapping[tuple[Protocol, int], Sequence[Evaluation]]],
    metrics: Sequence[str],
    step: int | None,
) -> list[tuple[Protocol, str, int]]:
    """Protocol, metric and step of what every run has."""
    per_run = [
        {(protocol, name, at) for (protocol, at), rows in found.items() for each in rows for name in each.values}
        for found in measured.values()
    ]
    everywhere = set.intersection(*per_run)
    known = sorted({name for _, name, _ in set.union(*per_run)})
    for name in metrics:
        if name not in known:
            raise UserError(f"--metric {name}: no run has it; there are {', '.join(known)}")
    last: dict[tuple[Protocol, str], int] = {}
    for protocol, name, at in everywhere:
        if (not metrics or name in metrics) and (step is None or at == step):
            last[protocol, name] = max(at, last.get((protocol, name), -1))
    if not last:
        place = "" if step is None else f" at step {step}"
        raise UserError(
            f"no metric was measured of all runs{place} by one protocol{_apart(measured)}; "
            "run `dit-fast evaluate` of each alike"
        )
    return sorted(((*key, at) for key, at in last.items()), key=lambda item: (item[0].text(), item[1]))


def _apart(measured: Mapping[Path, Mapping[tuple[Protocol, int], Any]]) -> str:
    """In what the nearest protocols, or the steps, of the first run and one that shares none with it differ."""
    (first, ours), *others = measured.items()
    for folder, theirs in others:
        if not set(ours) & set(theirs):
            pairs = [(asdict(a) | {"step": i}, asdict(b) | {"step": j}) for a, i in ours for b, j in theirs]
            apart = [{key: (a[key], b[key]) for key in a if a[key] != b[key]} for a, b in pairs]
            nearest = list(min(apart, key=len).items())[:SHOWN]
            return f" ({first} and {folder}: {', '.join(f'{key} {_both(values)}' for key, values in nearest)})"
    return ""


def _first(groups: list[Group], baseline: str | None) -> list[Group]:
    if baseline is None:
        return groups
    names = [group.name for group in groups]
    if baseline not in names:
        raise UserError(f"--baseline {baseline}: no such group; there are {', '.join(names)}")
    return sorted(groups, key=lambda group: group.name != baseline)


def _difference(group: Group, baseline: Group, metric: str, margin: float) -> Difference:
    base = baseline.mean
    gap = group.mean - base
    relative = gap / abs(base) if base else 0.0 if not gap else None
    interval = _interval(group, baseline)
    fewest = min(len(group.values), len(baseline.values))
    if fewest < FEWEST:
        verdict = f"undecided: {fewest} {'seed' if fewest == 1 else 'seeds'}, {FEWEST} are needed"
    elif relative is None:
        verdict = "inconclusive: the baseline's mean is 0, of which nothing is a share"
    elif abs(relative) < margin:
        verdict = f"inconclusive: less than {margin:.1%}"
    elif interval is None or interval[0] <= 0 <= interval[1]:
        verdict = "inconclusive: within the spread over seeds"
    else:
        verdict = "better" if relative * direction(metric) > 0 else "worse"
    return Difference(group.name, relative, interval, verdict)


def _interval(group: Group, baseline: Group) -> tuple[float, float] | None:
    """Of the relative difference, by Welch's t: variances may differ, degrees of freedom by Satterthwaite."""
    if group.sd is None or baseline.sd is None or not baseline.mean:
        return None
    parts = [each.sd**2 / len(each.values) for each in (group, baseline) if each.sd is not None]
    total = sum(parts)
    gap = group.mean - baseline.mean
    if total == 0:
        return gap / abs(baseline.mean), gap / abs(baseline.mean)
    counts = (len(group.values), len(baseline.values))
    freedom = total**2 / sum(part**2 / (count - 1) for part, count in zip(parts, counts, strict=True))
    half = student(freedom, TAIL) * total**0.5
    return (gap - half) / abs(baseline.mean), (gap + half) / abs(baseline.mean)


def _varied(runs: Mapping[Path, TrainConfig]) -> str:
    """Which seeds differ among the runs: the spread is over those alone."""
    flat = [dict(options.leaves(options.to_dict(config))) for config in runs.values()]
    varied = [key for key in SEEDS if len({values.get(key) for values in flat}) > 1]
    return ", ".join(varied) or "no seed"
