"""What a run that has diverged does: it goes back to a checkpoint and takes other samples from there.

RUN/history.jsonl has a line for each time: why, from which step to which, and the positions that are left out, from the
checkpoint's to those of the last step that showed it. The line is the decision: it is on the disk before anything
follows from it, and a start reads it, so a run that is killed at any moment goes on as decided. Steps after the
checkpoint count as not done: their rows, rates and checkpoints are those of other weights, and they are done anew.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit_fast import files
from dit_fast.checkpoint.manifest import is_window
from dit_fast.checkpoint.step import Checkpoint, open_checkpoint, step_folders
from dit_fast.data.plan import Window
from dit_fast.errors import CheckpointError
from dit_fast.runs import TrainConfig
from dit_fast.train.guard import Diverged, Guard
from dit_fast.world import World

logger = logging.getLogger("dit_fast")

HISTORY = "history.jsonl"


@dataclass(frozen=True)
class Rollback:
    """step: the last that showed what is wrong. to: that of the checkpoint gone back to. Both count from 1. left_out:
    positions that no step takes any more."""

    cause: str
    step: int
    to: int
    left_out: Window


def past(run: Path, world: World) -> list[Rollback]:
    """What the run has decided before this start; what a kill left half done is done. Collective."""

    def settle() -> list[Any]:
        found = _read(run / HISTORY)
        _set_aside(run, found)
        return [asdict(each) for each in found]

    return [_rollback(values) for values in world.agree(settle)]


def go_back(
    error: Diverged, guard: Guard, config: TrainConfig, world: World, rollbacks: Sequence[Rollback]
) -> list[Rollback]:
    """Decides what follows from a divergence that all ranks met: the rollbacks with a new one. Collective.

    The checkpoint is the newest from before the steps that showed it; one that `run.checkpoint_every` asked for comes
    before one that was saved when the run was asked to stop, so that it does not matter where a run was interrupted.
    Raises Diverged where it may go back no more, or cannot.
    """
    run = Path(config.run.dir)
    if error.steps is None or not config.run.max_rollbacks:
        raise Diverged(f"{error}{guard.advice()}")
    if len(guard.left_out) >= config.run.max_rollbacks:
        raise Diverged(
            f"{error}; the run has gone back {len(guard.left_out)} times (run.max_rollbacks){guard.advice()}"
        )
    first, last = error.steps

    def decide() -> dict[str, Any] | None:
        checkpoint = _good(run, first, config.run.checkpoint_every)
        if checkpoint is None:
            return None
        window = guard.positions(checkpoint.step + 1)[0], guard.positions(last)[1]
        made = Rollback(str(error), last, checkpoint.step, window)
        _append(run / HISTORY, made)
        _set_aside(run, [*rollbacks, made])
        return asdict(made)

    values = world.agree(decide)
    if values is None:
        none = "; no checkpoint is from before that, to go back to" if guard.newest else ""
        raise Diverged(f"{error}{none}{guard.advice()}")
    made = _rollback(values)
    if world.rank == 0:
        start, stop = made.left_out
        logger.warning(
            "%s; going back to step %d and leaving out positions %d to %d (%d of at most %d times)",
            error,
            made.to,
            start,
            stop - 1,
            len(guard.left_out) + 1,
            config.run.max_rollbacks,
        )
    return [*rollbacks, made]


def unique(windows: Iterable[Sequence[int]]) -> list[Window]:
    """Each once, in order."""
    return list(dict.fromkeys((int(start), int(stop)) for start, stop in windows))


def _good(run: Path, first: int, every: int) -> Checkpoint | None:
    before = [(bool(every) and step % every == 0, step, path) for step, path in step_folders(run) if step < first]
    for _, _, path in sorted(before, reverse=True):
        try:
            return open_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s; passed over", error)
    return None


def _set_aside(run: Path, rollbacks: Sequence[Rollback]) -> None:
    """Renames checkpoints that a later rollback has undone, so that no start goes on from one."""
    for step, path in step_folders(run):
        undone = [each for each in rollbacks if each.to < step]
        if not undone:
            continue
        try:
            known = {tuple(window) for window in open_checkpoint(path).state.get("left_out", [])}
        except CheckpointError:
            continue  # a start passes it over
        if any(each.left_out not in known for each in undone):
            aside = path.with_suffix(".undone")
            files.remove_tree(aside)
            files.rename(path, aside)


def _append(path: Path, made: Rollback) -> None:
    text = "".join(f"{json.dumps(asdict(each))}\n" for each in [*_read(path), made])
    files.replace(path, text.encode())


def _read(path: Path) -> list[Rollback]:
    """Raises CheckpointError for a file that no run has written."""
    if not path.exists():
        return []
    try:
        return [_rollback(json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); restore it, or the run would take samples that it left out"
        ) from None


def _rollback(values: Any) -> Rollback:
    """Of an entry of JSON. Raises ValueError, TypeError or KeyError for another."""
    cause, step, to, window = (values[name] for name in ("cause", "step", "to", "left_out"))
    sound = isinstance(cause, str) and type(step) is type(to) is int and 0 < to < step and is_window([*window])
    if not sound or len(values) != 4:
        raise ValueError(f"an entry is {values!s:.80}")
    return Rollback(cause, step, to, (window[0], window[1]))
