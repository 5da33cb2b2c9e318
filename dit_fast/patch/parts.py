"""What the parts of a module must be like for an op to take their place: before the proof, and again at every call."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dit_fast.ops.autocast import autocast_dtype, linear_dtype

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_EVERY_MODULE_HAS = frozenset(vars(nn.Module())) | {"forward"}


class Part(NamedTuple):
    """A module as it was proven: its way from the replaced one, class, plain attributes, which parameters it has."""

    path: str
    steps: tuple[str, ...]
    kind: type
    attributes: tuple[tuple[str, Any], ...]
    parameters: tuple[tuple[str, bool], ...]


def part_of(path: str, module: nn.Module, varying: frozenset[str] = frozenset()) -> Part:
    """varying: attributes that may change."""
    attributes = tuple((name, value) for name, value in plain_attributes(module) if name not in varying)
    parameters = tuple((name, value is not None) for name, value in module._parameters.items())
    return Part(path, tuple(path.split(".")) if path else (), type(module), attributes, parameters)


def plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The numbers, names and the like that a module has beyond what nn.Module gives every one."""
    for name, value in vars(module).items():
        plain = all(isinstance(entry, _PLAIN) for entry in (value if isinstance(value, tuple) else (value,)))
        if plain and name not in _EVERY_MODULE_HAS:
            yield name, value


def changed(module: Any, parts: tuple[Part, ...]) -> str | None:
    """What is not as it was proven, or None. Runs at every call, so it only looks things up."""
    if _has_any_global_hook():
        return "hooks on all modules are set, and would not run on those that the op bypasses"
    if torch.jit.is_tracing():
        return "torch.jit is tracing it, which cannot record the op"
    for path, steps, kind, attributes, parameters in parts:
        part = module
        for step in steps:
            part = part._modules.get(step)
            if part is None:
                return f"{path} is gone"
        state = part.__dict__
        if steps:
            if part.__class__ is not kind:
                return f"{path} became {part.__class__.__module__}.{part.__class__.__qualname__}"
            if (
                state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or state["_backward_hooks"]
                or state["_backward_pre_hooks"]
            ):
                return f"{path} has hooks"
            if "forward" in state:
                return f"{path} has a forward of its own on the instance"
        for name, value in attributes:
            now = state.get(name)
            if now is not value and now != value:
                return f"{path or 'its'} {name} changed"
        held = state["_parameters"]
        for name, there in parameters:
            parameter = held.get(name)
            if (parameter is not None) is not there:
                return f"{path or 'it'} {'lost' if there else 'got'} a {name}"
            if there and type(parameter) is not nn.Parameter and _is_odd(parameter):
                return f"{path or 'its'} {name} is a {parameter.__class__.__name__}"
    return None


def _is_odd(parameter: Any) -> bool:
    """Whether it is a tensor made of others, which torch tells by this method. By type(), as above: to the compiler of
    torch 2.11 the `__class__` of a parameter is another class, which it cannot look into.
    """
    return hasattr(type(parameter), "__tensor_flatten__")


def odd_parameter(module: nn.Module) -> str | None:
    """The first parameter that is no plain tensor: sharded (DTensor) or quantised."""
    for name, parameter in module.named_parameters():
        if _is_odd(parameter):
            return f"{name} is a {type(parameter).__name__}, not a plain tensor"
    return None


def linear_reasons(**linears: nn.Module | None) -> list[str]:
    """Why these maps cannot lend their weights to an op: adapters, quantised, pruned or bias-free ones."""
    reasons = []
    for name, linear in linears.items():
        if type(linear) is not nn.Linear:
            reasons.append(f"{name} is {type(linear).__module__}.{type(linear).__name__}, not exactly nn.Linear")
        elif linear._parameters.get("weight") is None:
            reasons.append(f"{name} holds no weight of its own")
        elif linear.bias is None:
            reasons.append(f"{name} has no bias")
    return reasons


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
    """For norms whose modulation comes from the conditioning: LayerNorm without affine parameters, or all RMSNorm."""
    reasons: list[str] = []
    if all(norm_kind(norm) == "rms" for norm in norms.values()):
        return reasons
    for name, norm in norms.items():
        if type(norm) is not nn.LayerNorm:
            reasons.append(f"{name} is {other_norm(norm)}")
        elif norm.weight is not None or norm.bias is not None:
            reasons.append(f"{name} has affine parameters")
    return reasons


def norm_kind(norm: Any) -> str:
    """By what a norm holds: "layer", weight and bias or neither; "rms", a weight alone and an eps; "" for another."""
    if type(norm) is nn.LayerNorm:
        return "layer" if (norm.weight is None) == (norm.bias is None) else ""
    lone = [name for name, value in norm._parameters.items() if value is not None] == ["weight"]
    simple = lone and norm.weight.dim() == 1 and not norm._modules and isinstance(getattr(norm, "eps", None), float)
    return "rms" if simple and not isinstance(norm, nn.LayerNorm) else ""


def other_norm(norm: nn.Module) -> str:
    """What is said of a norm that is of neither kind."""
    return f"{type(norm).__name__}, neither nn.LayerNorm nor an RMSNorm of one weight and a number for eps"


def is_dense(x: Any) -> bool:
    """Whether x is a tensor as the ops read it: no nested one, no sparse one."""
    return isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested


def is_tokens(x: Any, *vectors: Any) -> bool:
    """Whether x is [N, T, D] and each of vectors [N, any]."""
    if not is_dense(x) or x.dim() != 3:
        return False
    return all(isinstance(c, Tensor) and c.dim() == 2 and c.shape[0] == x.shape[0] for c in vectors)


def one_dtype(x: Tensor, *weights: Tensor) -> bool:
    """Whether products of x with these weights are of one dtype by themselves; autocast sees to parameters of one."""
    dtypes = {weight.dtype for weight in weights}
    return len(dtypes) == 1 and (x.dtype in dtypes or autocast_dtype(x) is not None)


def modulated_dtype(x: Tensor, shift: Tensor) -> torch.dtype:
    """The dtype in which the linear map after a norm of x that shift modulates runs."""
    wide = torch.promote_types(x.dtype, shift.dtype)
    return linear_dtype(x, wide)


def widened(x: Tensor, *added: Tensor) -> Tensor:
    """The stream in the dtype that the sum with the product of these has."""
    for other in added:
        x = x.to(torch.promote_types(x.dtype, other.dtype))
    return x
