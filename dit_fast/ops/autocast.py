"""Autocast as the ops see it. On the meta device, which torch's own functions refuse, there is none."""

import contextlib

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to matrix products with x; None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which products on x's device have the dtype of their factors."""
    return contextlib.nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)
