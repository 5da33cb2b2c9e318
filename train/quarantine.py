"""Bad samples that others took the place of: listed in RUN/quarantine.jsonl, counted, and ended by when there are many.

Which sample is bad, and which one is there instead, depends on data and position alone (`build_loader`), so every world
size has the same, and a resumed run, which drops lines after its checkpoint like rows of metrics.jsonl,
writes them again.
"""

import json
import logging
from itertools import count
from pathlib import Path
from typing import Any

import torch

from dit_fast.data.loader import Replacement
from dit_fast.data.shards import key_of
from dit_fast.errors import DataError
from dit_fast.runs import TrainConfig
from dit_fast.train.guard import Guard
from dit_fast.train.lines import AppendedLines, truncate_lines
from dit_fast.world import World

logger = logging.getLogger("dit_fast")

QUARANTINE = "quarantine.jsonl"
TOLD = 3  # of an interval, in the log


class Quarantine:
    """What one rank has met, and on rank 0 the file. start: step resumed from. samples: in the data set."""

    def __init__(self, config: TrainConfig, world: World, guard: Guard, start: int, samples: int):
        self._path, self._most = Path(config.run.dir) / QUARANTINE, config.data.max_bad_share
        self._world, self._guard, self._samples = world, guard, samples
        self._met: list[Replacement] = []  # fetched ahead of the steps that take them
        self._closed: dict[int, list[dict[str, Any]]] = {}  # by the last step of an interval
        self._step = start
        self._file: AppendedLines | None = None
        self._total = world.agree(lambda: self._begin(start))
        self._seen = guard.positions(start + 1)[0]

    def _begin(self, start: int) -> int:
        truncate_lines(self._path, start)
        return len(self._path.read_text().splitlines()) if self._path.exists() else 0

    def add(self, replacement: Replacement) -> None:
        """Of a batch that this rank will train on."""
        self._met.append(replacement)

    def close_interval(self, step: int) -> int:
        """How many of this rank's samples were replaced in the steps up to `step` since the last call."""
        stop = self._guard.positions(step)[1]
        rows = [self._row(each) for each in self._met if each.position < stop]
        self._met = [each for each in self._met if each.position >= stop]
        self._step = step
        if rows:
            self._closed[step] = rows
        return len(rows)

    def _row(self, met: Replacement) -> dict[str, Any]:
        return {
            "step": next(step for step in count(self._step + 1) if met.position < self._guard.positions(step)[1]),
            "position": met.position,
            "shard": met.shard,
            "key": key_of(met.sample),
            "replaced_by": key_of(met.by),
            "error": met.error,
        }

    def publish(self, step: int) -> None:
        """Lists those of the interval that ended at `step`, of all ranks; collective, where some rank has any."""
        mine = self._closed.pop(step, [])
        counts = torch.zeros(self._world.size, dtype=torch.float32, device=self._world.device)
        counts[self._world.rank] = len(mine)
        ranks = self._world.reduce(counts, "sum").nonzero().flatten().tolist()
        rows = [row for rank in ranks for row in self._world.agree(lambda: mine, rank)]
        rows.sort(key=lambda row: row["position"])
        self._total, self._seen = self._total + len(rows), self._guard.positions(step)[1]
        if self._world.rank:
            return
        self._file = self._file or AppendedLines(self._path)
        for row in rows:
            self._file.add(json.dumps(row))
        for row in rows[:TOLD]:
            logger.warning("step %(step)d: %(error)s; position %(position)d takes sample %(replaced_by)s instead", row)
        if len(rows) > TOLD:
            logger.warning("%d more bad samples up to step %d; all are in %s", len(rows) - TOLD, step, self._path)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def failure(self) -> DataError | None:
        """What ends the run, on all ranks, where too many samples were bad."""
        of = max(self._seen, self._samples)
        if self._total <= self._most * of:
            return None
        return DataError(
            f"{self._path}: lists {self._total} bad samples of {of} ({self._total / of:.3g}), data.max_bad_share is "
            f"{self._most:.3g}; mend the data set (`dit-fast shards verify FOLDER`), or raise it"
        )
