"""Checks that every op makes of its arguments first, and their messages."""

import math
from typing import Any

import torch
from torch import Tensor

from dit_fast.errors import UserError


def require_tensors(op: str, **arguments: Any) -> None:
    """Raises UserError naming the first argument that is no tensor, and what to give where a layer lacks a part."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            given = "None" if value is None else type(value).__name__
            instead = ""
            if value is None and name.endswith("bias"):
                instead = "; for a layer without one give zeros"
            elif value is None and name.endswith(("norm_weight", "q_weight", "k_weight")):
                instead = "; for a norm without one give ones"
            raise UserError(f"{op}: {name} must be a tensor, not {given}{instead}")
        if value.layout != torch.strided:
            raise UserError(f"{op}: {name} must be a dense tensor, not {value.layout}; give {name}.to_dense()")
        if value.dtype.itemsize == 1 and value.is_floating_point():
            raise UserError(f"{op}: {name} must be of 16, 32 or 64 bits, not {value.dtype}; give {name}.bfloat16()")


def require_settings(op: str, backend: Any = "auto", eps: Any = 0.0) -> None:
    """Raises UserError unless backend is a name and eps a finite number, not negative."""
    if not isinstance(backend, str):
        raise UserError(f'{op}: backend must be a name such as "auto", not {type(backend).__name__}')
    if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not 0 <= eps < math.inf:
        given = eps if isinstance(eps, (int, float, str)) else type(eps).__name__
        raise UserError(f"{op}: eps must be a finite number >= 0, not {given!r}")


def require_statistics(op: str, name: str, stats: Any) -> None:
    """Raises UserError unless stats, where given, are the two tensors of `row_statistics`."""
    if stats is None:
        return
    if not isinstance(stats, tuple) or len(stats) != 2:
        raise UserError(f"{op}: {name} must be what row_statistics returns, not {type(stats).__name__}")
    require_tensors(op, **{f"{name}.mean": stats[0], f"{name}.variance": stats[1]})
