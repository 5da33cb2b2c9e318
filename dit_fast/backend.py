"""Which implementation of each op runs, and why: the one switch, and the text behind `dit-fast info`.

Every op registers its implementations in order of preference. An implementation says for which device type it is
meant and why it cannot run here, if it cannot. `choose` answers once per call, and once per graph under torch.compile;
nothing falls back silently: the first time an implementation is passed over, the reason is logged once.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dit_fast.errors import ConfigError

logger = logging.getLogger("dit_fast")


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. `unavailable()` returns the reason why it cannot run on this machine, or None.

    device_types: the types of device it is made for; empty = any.
    automatic: the types of device on which "auto" takes it; None = wherever it runs. Elsewhere it runs on request.
    refuses: reasons why it cannot take a call's arguments, of which each op says which it hands over.
    """

    name: str
    device_types: tuple[str, ...]
    unavailable: Callable[[], str | None]
    automatic: tuple[str, ...] | None = None
    refuses: Callable[..., Sequence[str]] = lambda *arguments: ()


BETTER = "a better one is used"
FORCED = "DIT_FAST_BACKEND"  # environment variable: what "auto" means for every op that has such an implementation
_TORCH = Implementation("torch", (), lambda: None)
_REGISTRY: dict[str, dict[str, Implementation]] = {}
_LOGGED: set[tuple[str, str]] = set()
_FORCED: str | None = None  # by `force`
# Every call of an op asks for the variable; where it is not set, `get` raises and catches, in 20 times this time.
_KEY, _ENVIRONMENT = os.environ.encodekey(FORCED), os.environ._data  # type: ignore[attr-defined]


def register(op: str, *faster: Implementation) -> None:
    """Declares an op: the implementations other than the plain torch reference, best first."""
    _REGISTRY[op] = {each.name: each for each in (*faster, _TORCH)}
    _candidates.cache_clear()


def ops() -> tuple[str, ...]:
    return tuple(sorted(_REGISTRY))


def forced() -> str | None:
    """The implementation that "auto" stands for, by `force` or from the environment; None: the best one."""
    return _FORCED or (os.environ.get(FORCED) or None if _KEY in _ENVIRONMENT else None)


@contextlib.contextmanager
def force(name: str) -> Iterator[None]:
    """Inside, "auto" means this implementation for every op that has it, in all threads; "torch" is what all have.

    It must then be able to run. What is asked for by name is not touched. The variable DIT_FAST_BACKEND does the same
    for a whole process. Forward passes count where they run; a backward takes what its forward took. Raises ConfigError
    if no op has such an implementation.
    """
    global _FORCED
    _check_forced(name)
    before, _FORCED = _FORCED, name
    try:
        yield
    finally:
        _FORCED = before


ON_CUDA = "cuda"  # what `on_cuda` forces: no implementation, but all that CUDA tensors would have


@contextlib.contextmanager
def on_cuda() -> Iterator[None]:
    """Inside, "auto" chooses as for CUDA tensors, whatever this machine has: for tensors without values, wherever they
    lie, whose registered ops give shapes alone.
    """
    global _FORCED
    before, _FORCED = _FORCED, ON_CUDA
    try:
        yield
    finally:
        _FORCED = before


def _chosen_on_cuda(op: str, *arguments: Any) -> str:
    for implementation in _REGISTRY[op].values():
        types = implementation.device_types if implementation.automatic is None else implementation.automatic
        if "cuda" in types or implementation is _TORCH:
            try:
                refused = implementation.refuses(*arguments) if arguments else ()
            except ImportError:  # Triton is not here, and its kernels say what they take
                refused = ()
            if not refused:
                return implementation.name
    raise AssertionError(f"{op}: the reference refuses nothing")


def choose(op: str, backend: str, device_type: str, *arguments: Any) -> str:
    """The implementation that runs `op` on tensors of this device type.

    backend: "auto" (the best one that can run) or the name of an implementation, which then must be able to run.
    arguments: those that the implementations may refuse; none: whether it can run at all.
    Raises ConfigError for an unknown name or an implementation that cannot run here, with the reason.
    """
    only = forced()
    if only == ON_CUDA and backend == "auto":
        return _chosen_on_cuda(op, *arguments)
    names, error = candidates(op, backend, device_type, only)
    for name in () if error else names:
        reasons = _REGISTRY[op][name].refuses(*arguments) if arguments else ()
        if not reasons:
            return name
        error = _passed_over(op, name, "; ".join(reasons), backend, only)
        if error:
            break
    raise ConfigError(error or f"{op}: no implementation for device type '{device_type}'")


def candidates(op: str, backend: str, device_type: str, only: str | None) -> tuple[tuple[str, ...], str | None]:
    """What can run here, best first; one where a name decides: that of the call, or the forced one, `only`. Else why it
    cannot."""
    return _candidates(op, backend, device_type, only)


@functools.cache
def _candidates(op: str, backend: str, device_type: str, only: str | None) -> tuple[tuple[str, ...], str | None]:
    implementations = _REGISTRY[op]
    named = (_forced_for(op, only) if backend == "auto" else backend) or "auto"
    if named != "auto" and named not in implementations:
        return (), f"{op}: unknown backend '{named}'; valid: {', '.join(['auto', *implementations])}"
    found = []
    for implementation in implementations.values():
        if not (_automatic(implementation, device_type) if named == "auto" else implementation.name == named):
            continue
        reason = _reason(implementation, device_type)
        if reason is None:
            found.append(implementation.name)
        elif named != "auto" or device_type in implementation.device_types:
            error = _passed_over(op, implementation.name, reason, backend, only)
            if error:
                return (), error
    return tuple(found), None


def _passed_over(op: str, name: str, reason: str, backend: str, only: str | None) -> str | None:
    """The error where this very implementation was meant; else it is said once why it is not used."""
    if name == (only if backend == "auto" else backend):
        remedy = f"unset {FORCED}" if backend == "auto" else 'use backend="auto"'
        return f"{op}: backend '{name}' cannot run: {reason}; {remedy}"
    if (op, name) not in _LOGGED:
        _LOGGED.add((op, name))
        logger.info("%s: %s is not used: %s", op, name, reason)
    return None


# Constants to torch.compile, which can neither look at the file system nor log: a graph is made for one machine.
candidates._dynamo_marked_constant = True  # type: ignore[attr-defined]
_passed_over._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explain(op: str, device_type: str) -> list[tuple[str, str]]:
    """(implementation, "used" | why it is not) for every implementation of an op, for `dit-fast info`."""
    lines, taken, only = [], False, _forced_for(op, forced())
    for implementation in _REGISTRY[op].values():
        reason = _reason(implementation, device_type)
        if reason is None and only not in (None, implementation.name):
            reason = f"{FORCED}={only}"
        if reason is None and only is None and not _automatic(implementation, device_type):
            reason = f'on request: backend="{implementation.name}"'
        if reason is None and not taken:
            lines.append((implementation.name, "used"))
            taken = True
        else:
            lines.append((implementation.name, reason or BETTER))
    return lines


def runnable(op: str, device_type: str) -> list[str]:
    """Names of the implementations that can run on this type of device, by "auto" or on request, best first."""
    return [each.name for each in _REGISTRY[op].values() if _reason(each, device_type) is None]


def _forced_for(op: str, name: str | None) -> str | None:
    if name is None:
        return None
    _check_forced(name)
    return name if name in _REGISTRY[op] else None


def _check_forced(name: str) -> None:
    known = sorted({implementation for each in _REGISTRY.values() for implementation in each} | {_TORCH.name})
    if name not in known:
        raise ConfigError(f"{FORCED}: no op has an implementation '{name}'; valid: {', '.join(known)}")


def _automatic(implementation: Implementation, device_type: str) -> bool:
    return implementation.automatic is None or device_type in implementation.automatic


def _reason(implementation: Implementation, device_type: str) -> str | None:
    if implementation.device_types and device_type not in implementation.device_types:
        return f"made for {' and '.join(implementation.device_types)} tensors, not {device_type}"
    return implementation.unavailable()
