"""An encoder's condition that is kept for several steps of a sampling (DDT, arXiv 2504.05741, Sec. 3.4)."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dit_fast.errors import UserError


@runtime_checkable
class Decoupled(Protocol):
    """A model whose output is `decode(x, encode(x, t, y))`."""

    def encode(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor: ...

    def decode(self, x: Tensor, condition: Tensor) -> Tensor: ...


class KeptCondition(nn.Module):
    """The model as a function (x, t, y) that encodes anew only in the steps whose number is a multiple of `refresh`.

    Every evaluation of such a step does; those of other steps decode with what the last one of them gave. y holds
    `count` labels, or with guidance those and as many null labels: either half's condition is of one age, also where
    the other was not wanted at that time, since it is then encoded when it first is, from the x and t of that time.
    step: number of the step, which the sampler raises. Facts of the model are its own.
    Raises UserError for a model without an encoder.
    """

    def __init__(self, model: object, refresh: int, count: int):
        super().__init__()
        if not isinstance(model, Decoupled):
            raise UserError(
                f"state_refresh={refresh} keeps the condition of an encoder (DDT), and this {type(model).__name__} has "
                "none; drop it"
            )
        self.model: Any = model
        self.refresh, self.count, self.step = refresh, count, 0
        self.seen: tuple[Tensor, Tensor] | None = None
        self.halves: list[Tensor | None] = []

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "model" else getattr(self.model, name)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        wanted = y.split(self.count)
        if self.step % self.refresh == 0 or self.seen is None:
            self.seen = (x[: self.count], t[: self.count])
            conditions = list(self.model.encode(x, t, y).split(self.count))
            self.halves = [*conditions, *[None] * (2 - len(conditions))]
        for half, labels in enumerate(wanted):
            if self.halves[half] is None:
                self.halves[half] = self.model.encode(*self.seen, labels)
        kept = [condition for condition in self.halves[: len(wanted)] if condition is not None]
        return self.model.decode(x, torch.cat(kept))
