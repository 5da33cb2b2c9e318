"""Modules that turn queries and keys by tables `freqs_cos`, `freqs_sin`: which do just that, found out by running them.

LightningDiT passes one to every block. The attention then gives its tables to the op `qk_norm` instead of calling it;
one that is not known to do the same is called as it is.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dit_fast.ops import qk_norm
from dit_fast.ops.autocast import autocast_dtype
from dit_fast.patch.parts import HOOKS, plain_attributes

NAMES = ("freqs_cos", "freqs_sin")
_TOLERANCE = 1e-5  # of the norm of the turned heads, fp32


class Rotations:
    """The classes of a model's modules that turn heads as the op does."""

    def __init__(self, model: nn.Module):
        self._proven: set[tuple[type, Any]] = {(_Tables, _Tables.forward)}
        for module in model.modules():
            kind, tables = (type(module), type(module).forward), _tables(module)
            if tables is not None and kind not in self._proven and _turns_as_the_op(module, *tables):
                self._proven.add(kind)

    def tables(self, module: Any, qkv: Tensor) -> tuple[Tensor, Tensor] | None:
        """What the op turns by in place of a call of the module; None where that may be another thing."""
        if (type(module), type(module).forward) not in self._proven:
            return None
        found = _tables(module)
        if found is None or found[0].shape[0] != qkv.shape[1]:
            return None
        return found if found[0].dtype == qkv.dtype or autocast_dtype(qkv) is not None else None


class _Tables(nn.Module):
    """Stands in for such a module in a proof, with random tables for its number of tokens."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, source: Any, width: int):
        super().__init__()
        for name in NAMES:
            self.register_buffer(name, source.normal(source.trial.tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * self.freqs_cos + torch.stack((-second, first), dim=-1).flatten(-2) * self.freqs_sin


def stand_in(source: Any, width: int) -> nn.Module:
    """For heads of this width."""
    return _Tables(source, width)


def _tables(module: Any) -> tuple[Tensor, Tensor] | None:
    """[T, d] each, of a module that holds nothing else and has no hooks and no forward of its own."""
    state = module.__dict__
    if state["_modules"] or state["_parameters"] or "forward" in state or any(len(state[name]) for name in HOOKS):
        return None
    cos, sin = (state["_buffers"].get(name, state.get(name)) for name in NAMES)
    if not isinstance(cos, Tensor) or not isinstance(sin, Tensor) or cos.dim() != 2 or cos.shape != sin.shape:
        return None
    return None if any(True for _ in plain_attributes(module)) else (cos, sin)


@torch.no_grad()
def _turns_as_the_op(module: nn.Module, cos: Tensor, sin: Tensor) -> bool:
    if cos.is_meta or cos.shape[1] % 2:
        return False
    generator = torch.Generator().manual_seed(0)
    shape = (2, cos.shape[0], 3, cos.shape[1])
    heads = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(cos)
    try:
        theirs = module(heads.transpose(1, 2))
    except Exception:  # whatever a foreign module raises here says that it is something else
        return False
    packed = torch.cat([heads.flatten(2)] * 3, dim=2)
    ours = qk_norm(packed, 3, None, None, None, None, backend="torch", norm="none", rotary=(cos, sin))[0]
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    bound = max(_TOLERANCE, 4 * torch.finfo(cos.dtype).eps)
    return bool((theirs.double() - ours.double()).norm() <= bound * ours.double().norm())
