"""What a sweep runs: recipes times seeds, from the command line or from a TOML file.

    seeds = [0, 1, 2]
    changes = ["run.steps=1000"]                # of every run

    [runs]                                      # a name, and the arguments of `dit-fast train`
    sit = "quickstart-sit"
    all = "quickstart methods.diversedit.pairs=all"

A seed is the value of all three of `runs.SEEDS` (initial weights, order of the samples, what a step draws); one that
is given as key=value holds in every run, so `run.seed=0 data.seed=0` with several seeds varies what steps draw alone.
"""

import re
import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_fast.checkpoint.step import newest_checkpoint
from dit_fast.data import open_dataset
from dit_fast.errors import ConfigError, UserError
from dit_fast.recipes import load
from dit_fast.runs import SEEDS, TrainConfig, forbidden_changes, stored
from dit_fast.train.prepare import check_fields, fit_to_dataset, micro_batch
from dit_fast.train.stages import stages

_NAME = re.compile(r"[\w.+-]+", re.ASCII)


@dataclass(frozen=True)
class SweepFile:
    """A sweep as it is written down: arguments of `dit-fast train` by name, changes of all of them, seeds."""

    runs: dict[str, list[str]]
    changes: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Member:
    """One run of a sweep. arguments: of `dit-fast train`, with seeds and folder. runs: itself, or its stages in order,
    sizes filled in from the data set."""

    name: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    runs: tuple[TrainConfig, ...]
    fingerprint: str

    @property
    def label(self) -> str:
        return f"{self.name}/{self.folder.name}"

    @property
    def steps(self) -> int:
        """Of all stages together."""
        return sum(run.run.steps for run in self.runs)

    def done(self) -> bool:
        """Whether a whole checkpoint of the last step is there, of this configuration and this data set.

        Where it is of another the run is not done, and the trainer, which is then started, says what differs.
        """
        last = self.runs[-1]
        checkpoint, _ = newest_checkpoint(last.run.dir, ())
        if checkpoint is None or checkpoint.step < last.run.steps:
            return False
        same = checkpoint.state["dataset_fingerprint"] == self.fingerprint
        return same and not forbidden_changes(stored(checkpoint.state["config"]), last)


def read_sweep(path: Path) -> SweepFile:
    """Reads a TOML file. Raises ConfigError naming what is wrong in it."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this sweep: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    for key in values:
        if key not in ("runs", "changes", "seeds"):
            raise ConfigError(f"{path}: unknown key '{key}'; valid: runs, changes, seeds")
    runs, changes, seeds = values.get("runs"), values.get("changes", []), values.get("seeds", [0])
    if not isinstance(runs, dict) or not runs or not all(isinstance(each, str) for each in runs.values()):
        raise ConfigError(f'{path}: needs a table [runs] of lines NAME = "RECIPE key=value ..."')
    if not isinstance(changes, list) or not all(isinstance(each, str) for each in changes):
        raise ConfigError(f'{path}: changes must be a list of "key=value"')
    if not isinstance(seeds, list) or not all(type(each) is int for each in seeds):
        raise ConfigError(f"{path}: seeds must be a list of whole numbers")
    try:
        words = {name: shlex.split(each) for name, each in runs.items()}
    except ValueError as error:
        raise ConfigError(f"{path}: {error} in [runs]") from None
    return SweepFile(words, tuple(changes), tuple(seeds))


def from_words(words: Sequence[str]) -> SweepFile:
    """A sweep from RECIPE ... key=value ..., or FILE.toml key=value ...; raises ConfigError for both or neither."""
    changes = tuple(word for word in words if "=" in word)
    sources = [word for word in words if "=" not in word]
    written = [word for word in sources if word.endswith(".toml")]
    if not sources or (written and len(sources) > 1):
        raise ConfigError("name recipes, or one .toml file that lists the runs")
    if written:
        read = read_sweep(Path(written[0]))
        return SweepFile(read.runs, read.changes + changes, read.seeds)
    names = [Path(word).stem if word.endswith(".json") else word for word in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two runs would have the name '{name}'; give each another, in a .toml file")
    return SweepFile({name: [word] for name, word in zip(names, sources, strict=True)}, changes)


def members(sweep: SweepFile, out: Path, processes: int = 1, only: Sequence[str] = ()) -> list[Member]:
    """Every run of a sweep, checked as far as that needs no model, in order: all names with the first seed first.

    only: names of those that are wanted. Raises UserError naming the run.
    """
    for name in only:
        if name not in sweep.runs:
            raise ConfigError(f"--only {name}: no run has this name; valid: {', '.join(sweep.runs)}")
    if len(set(sweep.seeds)) < len(sweep.seeds) or not sweep.seeds:
        raise ConfigError(f"--seeds {','.join(map(str, sweep.seeds))}: give each seed once, at least one")
    infos: dict[str, Any] = {}
    found = []
    for seed in sweep.seeds:
        for name, (recipe, *changes) in ((name, words or [""]) for name, words in sweep.runs.items()):
            if not only or name in only:
                try:
                    found.append(_member(name, seed, recipe, (*changes, *sweep.changes), sweep, out, processes, infos))
                except UserError as error:
                    raise ConfigError(f"run '{name}' of the sweep: {error}") from None
    return found


def _member(
    name: str, seed: int, recipe: str, changes: Sequence[str], sweep: SweepFile, out: Path, processes: int, infos: Any
) -> Member:
    if not _NAME.fullmatch(name):
        raise ConfigError("its name will be a folder: use letters, digits and . _ + -")
    given = {change.partition("=")[0].strip() for change in changes}
    if "run.dir" in given:
        raise ConfigError(f"run.dir is OUT/{name}/seed{seed}; name OUT with --out instead")
    varied = [key for key in SEEDS if key not in given]
    if not varied and len(sweep.seeds) > 1:
        raise ConfigError(f"{', '.join(SEEDS)} are all set, so its seeds would be one; leave out the one that varies")
    folder = out / name / f"seed{seed}"
    arguments = (recipe, *changes, *(f"{key}={seed}" for key in varied), f"run.dir={folder}")
    config = check_fields(load(recipe, arguments[1:]))
    micro_batch(config.engine, processes)
    path = config.data.path
    if path not in infos:
        infos[path] = open_dataset(path).info
    runs = tuple(fit_to_dataset(run, infos[path]) for run in stages(config))
    return Member(name, seed, folder, arguments, runs, infos[path].fingerprint)
