"""Stops a run that no longer learns: too many skipped steps in a row, or a logged value that is not finite."""

import math
from collections.abc import Mapping

from dit_fast.errors import UserError

PATIENCE = 20  # consecutive steps without a finite gradient


class Diverged(UserError):
    """The run produces no finite numbers any more. Weights and checkpoints are finite: such steps are not applied."""


class Guard:
    """Watches what the engine and the journal report; the same on every rank, so all stop at the same step."""

    def __init__(self, newest: int | None = None, patience: int = PATIENCE):
        self.newest, self.patience = newest, patience
        self.skipped, self._row = 0, 0

    def after_step(self, step: int, applied: bool) -> None:
        """step: the one just done, counted from 1. Raises Diverged after `patience` skipped steps in a row."""
        self._row = 0 if applied else self._row + 1
        self.skipped += not applied
        if self._row >= self.patience:
            first = step - self._row + 1
            raise Diverged(f"no finite gradient in steps {first} to {step} (none was applied){self._advice()}")

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """values: logged means of applied steps up to `step`. Raises Diverged naming one that is not finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise Diverged(f"{name} is {value} in the interval that ends at step {step}{self._advice()}")

    def _advice(self) -> str:
        resume = f"the newest checkpoint is step {self.newest}" if self.newest else "there is no checkpoint yet"
        return f"; {resume}. Lower optimizer.lr or set optimizer.grad_clip, or look at the data of these steps"
