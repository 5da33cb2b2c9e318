"""Autocast as the ops see it. On the meta device, which torch's own functions refuse, there is none."""

import contextlib

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to matrix products with x; None where it is off."""
    return autocast_dtype_of(x.device.type)


def autocast_dtype_of(kind: str) -> torch.dtype | None:
    """The same on devices of this type."""
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def linear_dtype(x: Tensor, own: torch.dtype) -> torch.dtype:
    """The dtype in which a linear map of x runs: autocast's, which leaves float64 alone, or, where it is off, `own`."""
    return own if own == torch.float64 else autocast_dtype(x) or own


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which products on x's device have the dtype of their factors."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False) if torch.compiler.is_compiling() else _Off(kind)


class _Off:
    """torch's own, which looks at much more, takes ten times as long."""

    def __init__(self, kind: str):
        self._kind = kind

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self._kind, False)

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_enabled(self._kind, True)
