"""One module's replaced forward: what it bypasses, how it goes in and out, and what its parts must be like."""

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_fast.errors import UserError

if TYPE_CHECKING:
    from dit_fast.patch.proof import Source

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Mark:
    """What an installed forward carries, so that a second `apply` knows it."""

    op: str
    backend: str


@dataclass(frozen=True)
class Candidate:
    """A module that an op could run.

    bypassed: its submodules that will not be called any more. reasons: why it cannot be taken, from its structure.
    forward: the new unbound forward. arguments: keyword or positional arguments for the proof, given a random source.
    stand_ins: submodules that the copy for the proof replaces, because they are large and called as they are.
    settings: attributes to set on that copy; the proof runs once with each.
    """

    path: str
    module: nn.Module
    op: str
    bypassed: Mapping[str, nn.Module]
    reasons: tuple[str, ...]
    forward: Forward
    arguments: Callable[["Source"], tuple[tuple[Any, ...], dict[str, Any]]]
    stand_ins: Mapping[int, nn.Module] = field(default_factory=dict)
    settings: tuple[Mapping[str, Any], ...] = ({},)


def installed(module: nn.Module) -> Mark | None:
    own = vars(module).get("forward")
    return getattr(own, "dit_fast_mark", None)


def install(candidate: Candidate, backend: str) -> None:
    candidate.forward.dit_fast_mark = Mark(candidate.op, backend)  # type: ignore[attr-defined]
    # A bound method: copy.deepcopy binds the copy's to the copy.
    vars(candidate.module)["forward"] = types.MethodType(candidate.forward, candidate.module)


def uninstall(module: nn.Module) -> None:
    if installed(module) is not None:
        del vars(module)["forward"]


def foreign_forward(module: nn.Module) -> bool:
    """Whether somebody else put a forward on the instance. What a pickle brings back is the class's own."""
    own = vars(module).get("forward")
    return own is not None and installed(module) is None and getattr(own, "__func__", None) is not type(module).forward


def linear_reasons(**linears: nn.Module | None) -> list[str]:
    """Why these maps cannot lend their weights to an op: adapters, quantised or bias-free ones."""
    reasons = []
    for name, linear in linears.items():
        if type(linear) is not nn.Linear:
            reasons.append(f"{name} is {type(linear).__module__}.{type(linear).__name__}, not exactly nn.Linear")
        elif linear.bias is None:
            reasons.append(f"{name} has no bias")
    return reasons


def require_plain(linear: nn.Module) -> None:
    """Adapters put in after `apply` would be left out without a word."""
    if type(linear) is not nn.Linear:
        raise UserError(
            f"a linear layer became {type(linear).__name__} after patch.apply; undo the patch, then apply it again"
        )


def dropout_reasons(**dropouts: nn.Module | None) -> list[str]:
    reasons = []
    for name, dropout in dropouts.items():
        if isinstance(dropout, nn.Dropout):
            if dropout.p > 0:
                reasons.append(f"{name} has p = {dropout.p}, which the op does not apply")
        elif dropout is not None and not isinstance(dropout, nn.Identity):
            reasons.append(f"{name} is {type(dropout).__name__}, not nn.Dropout")
    return reasons


def plain_norm_reasons(**norms: nn.Module) -> list[str]:
    """For norms whose modulation comes from the conditioning: LayerNorm without affine parameters."""
    reasons = []
    for name, norm in norms.items():
        if type(norm) is not nn.LayerNorm:
            reasons.append(f"{name} is {type(norm).__name__}, not nn.LayerNorm")
        elif norm.weight is not None or norm.bias is not None:
            reasons.append(f"{name} has affine parameters")
    return reasons


def modulated_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the linear map after a modulated norm runs."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype
