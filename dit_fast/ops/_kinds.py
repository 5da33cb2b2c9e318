"""What tensors are like, told in one call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

REMEMBERED = 4096
_KINDS = 32  # of one key, the last ones: they are tried in turn


class Kinds:
    """What was found for tensors, by a key and by what they are like: class, device, dtype, shape, strides, gradient or
    none, and all that torch's dispatcher sees in them. To tell takes a call in C, as guards of torch.compile do."""

    def __init__(self) -> None:
        self._rows: dict[Any, list[tuple[Callable[..., bool], Any]]] = {}

    def find(self, key: Any, tensors: Sequence[Tensor], default: Any = None) -> Any:
        """key: settles also how many tensors there are."""
        for alike, found in self._rows.get(key, ()):
            if alike(*tensors):
                return found
        return default

    def keep(self, key: Any, tensors: Sequence[Tensor], found: Any) -> Any:
        """In the place of what was found before for such tensors; returns it."""
        if len(self._rows) >= REMEMBERED:
            self._rows.clear()
        others = [row for row in self._rows.get(key, ()) if not row[0](*tensors)]
        self._rows[key] = [(_alike(tensors), found), *others[: _KINDS - 1]]
        return found

    def items(self) -> list[tuple[Any, Any]]:
        """Keys, and what was found."""
        return [(key, found) for key, rows in self._rows.items() for _, found in rows]


def _alike(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether as many tensors are like these."""
    sizes, strides = [list(each.shape) for each in tensors], [list(each.stride()) for each in tensors]
    guards: Any = torch._C._dynamo.guards.TensorGuards
    alike: Callable[..., bool] = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return alike
