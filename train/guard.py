"""Notices that a run no longer learns: skipped steps in a row, a logged value or a saved tensor that is not finite, a
loss or gradient far above those before it. What follows is decided by `rollback`.

A step whose gradient is not finite is not applied. A finite gradient may still lead to weights, averages or moments
that are not (a huge rate, eps=0); that is seen at the latest when they are next saved, and such a state is never saved.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import count
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dit_fast.checkpoint.step import extremes
from dit_fast.data.plan import Window, first_position
from dit_fast.errors import Status, UserError
from dit_fast.world import Late, World

PATIENCE = 20  # consecutive steps without a finite gradient
WINDOW = 100  # steps over which the share of skipped ones is taken while training
TOLERATED = 0.05  # share of skipped steps above which there is a warning
SHOWN = 10  # of them named in one message
SPIKE_WINDOW = 200  # applied steps that a loss or a gradient's norm is compared with
SPIKE_LEAST = 20  # of them, before anything counts as a spike


class Diverged(UserError):
    """The run does not learn any more. What is in its checkpoints is finite.

    steps: first and last of those that show it, counted from 1; None where going back would not help.
    """

    status = Status.DIVERGED

    def __init__(self, message: str, steps: tuple[int, int] | None = None):
        super().__init__(message)
        self.steps = steps


class Spikes:
    """Finds a value far above those of the steps before it.

    z = (x - median) / (1.4826 MAD) over the last SPIKE_WINDOW values (MAD: median absolute deviation, which 1.4826
    makes comparable with a standard deviation), so that spikes in the window hardly move it. limit: z that is one.
    """

    def __init__(self, what: str, limit: float, values: Sequence[float] = ()):
        self.what, self.limit, self.values = what, limit, [*values]

    def add(self, step: int, value: float) -> None:
        """Raises Diverged where the value is a spike."""
        if len(self.values) >= SPIKE_LEAST:
            middle = median(self.values)
            spread = 1.4826 * median(abs(each - middle) for each in self.values)
            z = (value - middle) / spread if spread else math.inf if value > middle else 0.0
            if not z < self.limit:
                raise Diverged(
                    f"{self.what} of step {step} is {value:.5g}, {z:.4g} robust standard deviations above the median "
                    f"{middle:.5g} of the {len(self.values)} steps before it",
                    (step, step),
                )
        self.values = [*self.values[1 - SPIKE_WINDOW :], value]


class Guard:
    """Counts skipped steps and looks for spikes; the same on every rank, so all stop at the same step.

    Whether a step was applied is known on the device first. On a CPU it is read at once, else an interval late, so that
    nothing waits: `settle` reads what is left.

    newest: step of the newest checkpoint. skipped: how many steps were, before this start. recent: the skipped ones
    among the newest WINDOW, ascending; a checkpoint keeps them. batch: samples per step. patience: skipped steps in a
    row that end the run. left_out: positions that no step takes. limits: z of a spike by what is looked at ("loss",
    "grad_norm"), 0: off. values: what `state` gave. All steps count from 1.
    """

    def __init__(
        self,
        newest: int | None = None,
        patience: int = PATIENCE,
        skipped: int = 0,
        recent: Sequence[int] = (),
        batch: int = 1,
        left_out: Sequence[Window] = (),
        limits: Mapping[str, float] = MappingProxyType({}),
        values: Mapping[str, Sequence[float]] = MappingProxyType({}),
        world: World | None = None,
    ):
        self.newest, self.patience, self.skipped, self._batch = newest, patience, skipped, batch
        self.left_out, self._world = [*left_out], world
        self._spikes = [Spikes(name, limit, values.get(name, ())) for name, limit in limits.items() if limit]
        self.recent, self._reported = list(recent), max(recent, default=0)
        self._seen = newest or 0
        self._open: list[Tensor] = []
        self._looked_at: list[Tensor] = []
        self._closed: list[tuple[int, Late]] = []  # last step of an interval, its flags and values

    def after_step(self, step: int, applied: Tensor, looked_at: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """step: the one just done; applied: 0-d, 0 where it was skipped; looked_at: this rank's values by name, 0-d.
        Raises Diverged as `settle` does."""
        self._open.append(applied)
        if self._spikes:
            self._looked_at.append(torch.stack([looked_at[each.what].float() for each in self._spikes]))
        if not applied.is_cuda:
            self.settle(step)

    def positions(self, step: int) -> Window:
        """Those of a step's samples."""
        first = first_position(step - 1, self._batch, self.left_out)
        return first, first + self._batch

    def state(self) -> dict[str, Any]:
        """For a checkpoint, with the names that it has there."""
        values = {each.what: each.values for each in self._spikes}
        return {
            "skipped_steps": self.recent,
            **({"recent_values": values} if values else {}),
            **({"left_out": self.left_out} if self.left_out else {}),
        }

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
            flags = torch.stack(self._open)[:, None]
            if self._spikes:  # the loss is that of a rank's own samples
                values = torch.stack(self._looked_at)
                flags = torch.cat([flags, self._world.reduce(values, "mean") if self._world else values], 1)
            self._closed.append((step, Late(flags)))
            self._open, self._looked_at = [], []

    def _read(self, keep: int = 0) -> None:
        while len(self._closed) > keep:
            last, flags = self._closed.pop(0)
            rows = flags.read().tolist()
            for step, (applied, *values) in enumerate(rows, last - len(rows) + 1):
                self._count(step, bool(applied), values)

    def _count(self, step: int, applied: bool, values: Sequence[float]) -> None:
        self.skipped, self._seen = self.skipped + (not applied), step
        self.recent = [*(old for old in self.recent if old > step - WINDOW), *([] if applied else [step])]
        row = self.in_a_row(step)
        if row >= self.patience:
            first = step - row + 1
            raise Diverged(f"no finite gradient in steps {first} to {step} (none was applied)", (first, step))
        if applied:
            for spikes, value in zip(self._spikes, values, strict=True):
                spikes.add(step, value)

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
            raise Diverged(f"the last step, {step}, had no finite gradient and was skipped{'; ' if text else ''}{text}")
        return text or None

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """values: logged means of applied steps up to `step`. Raises Diverged naming one that is not finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise Diverged(f"{name} is {value} in the interval that ends at step {step}", (step, step))

    def advice(self) -> str:
        resume = f"the newest checkpoint is step {self.newest}" if self.newest else "there is no checkpoint yet"
        return f"; {resume}. Look at the data of these steps, or lower optimizer.lr and grad_clip in a new run.dir"

    def _list(self, steps: Sequence[int]) -> str:
        places = [(step, *self.positions(step)) for step in steps[-SHOWN:]]
        shown = [f"step {step} (positions {start} to {stop - 1})" for step, start, stop in places]
        return ("..., " if len(steps) > SHOWN else "") + ", ".join(shown)


class Finiteness:
    """Looks at tensors on their device and waits for it once, when asked for the first that holds NaN or Inf."""

    def __init__(self, world: World):
        self._world = world
        self._names: list[str] = []
        self._extremes: list[Tensor] = []

    def look(self, name: str, tensor: Tensor) -> None:
        """All ranks look at tensors of the same names in the same order; replicas and pieces may differ."""
        self._names.append(name)
        self._extremes.append(extremes(tensor).to(self._world.device))

    def here(self) -> Tensor:
        """Whether each is finite on this rank: bool [tensors], on the device."""
        return torch.stack(self._extremes).isfinite().all(1)

    def first_exception(self) -> str | None:
        """The name of the first tensor that is not finite on some rank; collective."""
        if not self._names:
            return None
        wrong = self._world.reduce(self.here().logical_not().to(torch.int32), "max").cpu()
        return self._names[int(wrong.argmax())] if wrong.any() else None
