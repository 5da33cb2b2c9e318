"""One module's replaced forward: how it goes in and out, what it takes and what the class's own forward gets."""

import inspect
import logging
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from dit_fast.patch.parts import Part, changed, part_of

if TYPE_CHECKING:
    from dit_fast.patch.proof import RandomInputs

logger = logging.getLogger("dit_fast")

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Mark:
    """What is known of an installed forward, so that a second `apply` and `undo` recognise it.

    not_on_cpu: whether calls with CPU tensors are left to the class's own forward.
    """

    op: str
    backend: str
    not_on_cpu: bool


# By the function itself: functools.wraps copies attributes, and the deep copy of a module shares the function.
_INSTALLED: WeakKeyDictionary[Forward, Mark] = WeakKeyDictionary()
_MISSING = object()


@dataclass(frozen=True)
class Candidate:
    """A module that an op could run.

    bypassed: its submodules that will not be called any more. reasons: why it cannot be taken, from its structure.
    forward: the new unbound forward. Its parameters are the leading ones of the module's own; for values that it cannot
    take it returns NotImplemented, before it calls anything. arguments: keyword or positional arguments for the proof,
    given a random source. stand_ins: submodules that the copy for the proof replaces, because they are large and called
    as they are. settings: attributes to set on that copy; the proof runs once with each, so `forward` may read them.
    shorten: makes that copy work on so many tokens, where its inputs do not say how many they are.
    """

    path: str
    module: nn.Module
    op: str
    bypassed: Mapping[str, nn.Module]
    reasons: tuple[str, ...]
    forward: Forward
    arguments: Callable[["RandomInputs"], tuple[tuple[Any, ...], dict[str, Any]]]
    stand_ins: Mapping[int, nn.Module] = field(default_factory=dict)
    settings: tuple[Mapping[str, Any], ...] = ({},)
    shorten: Callable[[nn.Module, int], None] | None = None

    def parts(self) -> tuple[Part, ...]:
        """What must be as it was proven whenever the new forward runs: the module itself and what is bypassed."""
        varying = frozenset(name for setting in self.settings for name in setting)
        return (part_of("", self.module, varying), *(part_of(*entry) for entry in self.bypassed.items()))


def rest(module: nn.Module, *called: str) -> dict[str, nn.Module]:
    """The submodules, by path, that do not run when only these are called."""
    inside = tuple(f"{path}." for path in called)
    return {path: part for path, part in module.named_modules() if path and not f"{path}.".startswith(inside)}


def installed(module: nn.Module) -> Mark | None:
    own = vars(module).get("forward")
    if not isinstance(own, types.MethodType) or own.__self__ is not module:
        return None
    return _INSTALLED.get(own.__func__) if isinstance(own.__func__, types.FunctionType) else None


def install(candidate: Candidate, backend: str, said: set[str], not_on_cpu: bool) -> Forward:
    """Puts the new forward on the instance and returns its function. said: what was logged once already."""

    def log(why: str) -> None:
        text = f"{type(candidate.module).__name__} runs its own forward, not {candidate.op}: {why}"
        if text not in said:
            said.add(text)
            logger.warning("patch: %s (%s; said once for all like it)", text, candidate.path or "the model")

    function = dispatch(candidate, log, not_on_cpu)
    _INSTALLED[function] = Mark(candidate.op, backend, not_on_cpu)
    # A bound method: copy.deepcopy binds the copy's to the copy.
    vars(candidate.module)["forward"] = types.MethodType(function, candidate.module)
    return function


def uninstall(module: nn.Module, function: Forward | None = None) -> bool:
    """Takes an installed forward off, only this one if given. False where a foreign one stands in its place."""
    if installed(module) is None:
        return foreign_forward(module) is None
    if function in (None, vars(module)["forward"].__func__):
        del vars(module)["forward"]
    return True


def foreign_forward(module: nn.Module) -> str | None:
    """Whose forward stands on the instance, if it is neither ours nor what a pickle brings back, the class's own."""
    own = vars(module).get("forward")
    if own is None or installed(module) is not None or getattr(own, "__func__", None) is type(module).forward:
        return None
    layers = list(_layers(own))
    around = any(isinstance(layer, types.FunctionType) and layer in _INSTALLED for layer in layers)
    return _described(layers[0]) + (" around that of patch.apply" if around else "")


def _layers(forward: Any) -> Iterator[Any]:
    """The function of a forward, and what it says that it wraps."""
    seen = []
    while forward is not None and forward not in seen:
        seen.append(forward)
        if isinstance(forward, types.MethodType):
            forward = forward.__func__
        yield forward
        forward = getattr(forward, "__wrapped__", None)


def _described(function: Any) -> str:
    """Where it was written: functools.wraps gives a wrapper the name of what it wraps."""
    if isinstance(function, types.FunctionType):
        return f"{function.__globals__.get('__name__', '?')}.{function.__code__.co_qualname}"
    return f"{type(function).__module__}.{type(function).__qualname__}"


def dispatch(candidate: Candidate, otherwise: Callable[[str], None], not_on_cpu: bool = False) -> Forward:
    """The new forward where it takes the call and its parts are as proven; else otherwise(why) and the class's own.

    not_on_cpu: the class's own, and nothing said, where the first tensor of a call lies on the CPU.
    """
    new, own, parts = candidate.forward, type(candidate.module).forward, candidate.parts()
    signature = inspect.signature(own)
    entries = signature.parameters.values()
    names = [entry.name for entry in entries if entry.kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD][1:]
    defaults = {entry.name: entry.default for entry in entries if entry.default is not inspect.Parameter.empty}
    count = len(inspect.signature(new).parameters) - 1
    taken = names[:count]
    # What it does is no part of a compiled graph: torch.compiler.assume_constant_result without its import of dynamo,
    # which takes longer than the proofs.
    otherwise._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        if not_on_cpu and _on_cpu(*arguments, *named.values()):
            return type(self).forward(self, *arguments, **named)
        why = changed(self, parts) if type(self).forward is own else "its class has another forward now"
        if why is None:
            values = leading(arguments, named) if named or len(arguments) != count else arguments
            result = NotImplemented if values is None else new(self, *values)
            if result is not NotImplemented:
                return result
            why = f"called with {_shown(arguments, named)}"
        otherwise(why)
        return type(self).forward(self, *arguments, **named)

    def leading(arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What the new forward's parameters get; None if the call gives another one something besides its default."""
        given = dict(zip(names, arguments, strict=False))
        if len(arguments) > len(names) or any(name in given for name in named):
            return None
        given.update(named)
        for name, value in given.items():
            if name not in taken and value is not defaults.get(name, _MISSING):
                return None
        values = [given.get(name, defaults.get(name, _MISSING)) for name in taken]
        return None if len(values) < count or any(value is _MISSING for value in values) else values

    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = own.__doc__
    return forward


def _on_cpu(*values: Any) -> bool:
    return next((value.device.type == "cpu" for value in values if isinstance(value, Tensor)), False)


def _shown(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> str:
    shown = [_kind(value) for value in arguments] + [f"{name}={_kind(value)}" for name, value in named.items()]
    return f"({', '.join(shown)})"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {'nested' if value.is_nested else list(value.shape)}"
    return "None" if value is None else type(value).__name__
