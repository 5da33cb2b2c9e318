"""Ends a run that no longer learns: skipped steps in a row, a logged value or a saved tensor that is not finite.

A step whose gradient is not finite is not applied. A finite gradient may still lead to weights, averages or moments
that are not (a huge rate, eps=0); that is seen at the latest when they are next saved, and such a state is never saved.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import count

import torch
from torch import Tensor

from dit_fast.errors import Status, UserError
from dit_fast.world import Late, World

PATIENCE = 20  # consecutive steps without a finite gradient
WINDOW = 100  # steps over which the share of skipped ones is taken while training
TOLERATED = 0.05  # share of skipped steps above which there is a warning
SHOWN = 10  # of them named in one message


class Diverged(UserError):
    """The run produces no finite numbers any more. What is in its checkpoints is finite."""

    status = Status.DIVERGED


class Guard:
    """Counts skipped steps; the same on every rank, so all stop at the same step.

    Whether a step was applied is known on the device first. On a CPU it is read at once, else an interval late, so that
    nothing waits: `settle` reads what is left.

    newest: step of the newest checkpoint. skipped: how many steps were, before this start. recent: the skipped ones
    among the newest WINDOW, ascending; a checkpoint keeps them. batch: samples per step. patience: skipped steps in a
    row that end the run. All steps count from 1.
    """

    def __init__(
        self,
        newest: int | None = None,
        patience: int = PATIENCE,
        skipped: int = 0,
        recent: Sequence[int] = (),
        batch: int = 1,
    ):
        self.newest, self.patience, self.skipped, self._batch = newest, patience, skipped, batch
        self.recent, self._reported = list(recent), max(recent, default=0)
        self._seen = newest or 0
        self._open: list[Tensor] = []
        self._closed: list[tuple[int, Late]] = []  # last step of an interval and its flags

    def after_step(self, step: int, applied: Tensor) -> None:
        """step: the one just done; applied: 0-d, 0 where it was skipped. Raises Diverged as `settle` does."""
        self._open.append(applied)
        if not applied.is_cuda:
            self.settle(step)

    def close_interval(self, step: int) -> int:
        """At the end of an interval: the step up to which all are read. Raises Diverged as `settle` does."""
        self._close(step)
        self._read(keep=1)
        return self._seen

    def settle(self, step: int) -> None:
        """Reads all steps up to the one just done. Raises Diverged after `patience` skipped ones in a row."""
        self._close(step)
        self._read()

    def _close(self, step: int) -> None:
        if self._open:
            self._closed.append((step, Late(torch.stack(self._open))))
            self._open = []

    def _read(self, keep: int = 0) -> None:
        while len(self._closed) > keep:
            last, flags = self._closed.pop(0)
            applied = flags.read().bool().tolist()
            for step, each in enumerate(applied, last - len(applied) + 1):
                self._count(step, each)

    def _count(self, step: int, applied: bool) -> None:
        self.skipped, self._seen = self.skipped + (not applied), step
        self.recent = [*(old for old in self.recent if old > step - WINDOW), *([] if applied else [step])]
        row = self.in_a_row(step)
        if row >= self.patience:
            raise Diverged(f"no finite gradient in steps {step - row + 1} to {step} (none was applied){self.advice()}")

    def in_a_row(self, step: int) -> int:
        """How many of the newest steps up to `step` were skipped one after the other."""
        return next(row for row in count() if step - row not in self.recent)

    def warning(self, step: int) -> str | None:
        """At the end of an interval: what to say if more than TOLERATED of the newest WINDOW steps were skipped and
        some of them were not reported yet."""
        new = [number for number in self.recent if number > self._reported]
        steps = min(step, WINDOW)
        if not new or len(self.recent) <= TOLERATED * steps:
            return None
        self._reported = step
        return (
            f"{len(self.recent)} of the last {steps} steps had no finite gradient and were skipped: {self._list(new)}"
        )

    def finish(self, step: int) -> str | None:
        """At the end of the run: what to say if more than TOLERATED of all its steps were skipped. Raises Diverged if
        the last one was: then it is unknown whether the run still learns."""
        if self.skipped > TOLERATED * step:
            text = f"{self.skipped} of {step} steps had no finite gradient and were skipped"
            text += f", lately {self._list(self.recent)}" if self.recent else ""
        else:
            text = ""
        if self.in_a_row(step):
            raise Diverged(
                f"the last step, {step}, had no finite gradient and was skipped"
                f"{'; ' if text else ''}{text}{self.advice()}"
            )
        return text or None

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """values: logged means of applied steps up to `step`. Raises Diverged naming one that is not finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise Diverged(f"{name} is {value} in the interval that ends at step {step}{self.advice()}")

    def advice(self) -> str:
        resume = f"the newest checkpoint is step {self.newest}" if self.newest else "there is no checkpoint yet"
        return f"; {resume}. Look at the data of these steps, or lower optimizer.lr and grad_clip in a new run.dir"

    def _list(self, steps: Sequence[int]) -> str:
        shown = [f"step {n} (positions {(n - 1) * self._batch} to {n * self._batch - 1})" for n in steps[-SHOWN:]]
        return ("..., " if len(steps) > SHOWN else "") + ", ".join(shown)


class Finiteness:
    """Looks at tensors on their device and waits for it once, when asked for the first that holds NaN or Inf."""

    def __init__(self, world: World):
        self._world = world
        self._names: list[str] = []
        self._wrong: list[Tensor] = []

    def look(self, name: str, tensor: Tensor) -> None:
        """All ranks look at tensors of the same names in the same order; replicas may differ."""
        self._names.append(name)
        self._wrong.append(torch.isfinite(tensor).all().logical_not().to(self._world.device, torch.int32))

    def first_exception(self) -> str | None:
        """The name of the first tensor that is not finite on some rank; collective."""
        if not self._names:
            return None
        wrong = self._world.reduce(torch.stack(self._wrong), "max").cpu()
        return self._names[int(wrong.argmax())] if wrong.any() else None
