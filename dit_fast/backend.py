"""Which implementation of each op runs, and why: the one switch, and the text behind `dit-fast info`.

Every op registers its implementations in order of preference. An implementation says for which device type it is
meant and why it cannot run here, if it cannot. `choose` answers per call; nothing falls back silently: the first time
an implementation is passed over, the reason is logged once.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dit_fast.errors import ConfigError

logger = logging.getLogger("dit_fast")


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. `unavailable()` returns the reason why it cannot run on this machine, or None.

    device_types: the types of device it is made for; empty = any.
    automatic: the types of device on which "auto" takes it; None = wherever it runs. Elsewhere it runs on request.
    """

    name: str
    device_types: tuple[str, ...]
    unavailable: Callable[[], str | None]
    automatic: tuple[str, ...] | None = None


BETTER = "a better one is used"
FORCED = "DIT_FAST_BACKEND"  # environment variable: what "auto" means for every op that has such an implementation
_TORCH = Implementation("torch", (), lambda: None)
_REGISTRY: dict[str, list[Implementation]] = {}
_REMARKS: dict[str, Mapping[str, str]] = {}
_LOGGED: set[tuple[str, str]] = set()


def register(op: str, *faster: Implementation, remarks: Mapping[str, str] | None = None) -> None:
    """Declares an op: the implementations other than the plain torch reference, best first.

    remarks: by device type, what `dit-fast info` adds where the choice depends on more than the device.
    """
    _REGISTRY[op] = [*faster, _TORCH]
    _REMARKS[op] = remarks or {}


def ops() -> tuple[str, ...]:
    return tuple(sorted(_REGISTRY))


def forced() -> str | None:
    """The implementation that "auto" stands for, from the environment or from `force`; None: the best one."""
    return os.environ.get(FORCED) or None


@contextlib.contextmanager
def force(name: str) -> Iterator[None]:
    """Inside, "auto" means this implementation for every op that has it, in all threads; "torch" is what all have.

    It must then be able to run. What is asked for by name is not touched. The variable DIT_FAST_BACKEND does the same
    for a whole process. Backward passes count where they run. Raises ConfigError if no op has such an implementation.
    """
    _check_forced(name)
    before = os.environ.get(FORCED)
    os.environ[FORCED] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCED]
        else:
            os.environ[FORCED] = before


def choose(op: str, backend: str, device_type: str, refuses: Callable[[str], Sequence[str]] = lambda name: ()) -> str:
    """The implementation that runs `op` on tensors of this device type.

    backend: "auto" (the best one that can run) or the name of an implementation, which then must be able to run.
    refuses: for the name of an implementation other than "torch", reasons why it cannot take these very arguments.
    Raises ConfigError for an unknown name or an implementation that cannot run here, with the reason.
    """
    implementations = _REGISTRY[op]
    backend = resolve(op, backend)
    if backend != "auto":
        for implementation in implementations:
            if implementation.name == backend:
                reason = _reason(implementation, device_type, refuses)
                if reason:
                    remedy = f"unset {FORCED}" if backend == forced() else 'use backend="auto"'
                    raise ConfigError(f"{op}: backend '{backend}' cannot run: {reason}; {remedy}")
                return backend
        names = ", ".join(["auto", *(implementation.name for implementation in implementations)])
        raise ConfigError(f"{op}: unknown backend '{backend}'; valid: {names}")
    for implementation in implementations:
        if not _automatic(implementation, device_type):
            continue
        reason = _reason(implementation, device_type, refuses)
        if reason is None:
            return implementation.name
        if device_type in implementation.device_types and (op, implementation.name) not in _LOGGED:
            _LOGGED.add((op, implementation.name))
            logger.info("%s: %s is not used: %s", op, implementation.name, reason)
    raise ConfigError(f"{op}: no implementation for device type '{device_type}'")


def explain(op: str, device_type: str) -> list[tuple[str, str]]:
    """(implementation, "used" | why it is not) for every implementation of an op, for `dit-fast info`."""
    lines, taken, only = [], False, _forced_for(op)
    for implementation in _REGISTRY[op]:
        reason = _reason(implementation, device_type, lambda name: ())
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


def remark(op: str, device_type: str) -> str | None:
    """What decides about an op on this type of device besides the order of its implementations; None: nothing."""
    return _REMARKS[op].get(device_type)


def runnable(op: str, device_type: str) -> list[str]:
    """Names of the implementations that can run on this type of device, by "auto" or on request, best first."""
    return [each.name for each in _REGISTRY[op] if _reason(each, device_type, lambda name: ()) is None]


def resolve(op: str, backend: str) -> str:
    """The backend that a caller asked for, where "auto" may be forced to be one implementation."""
    return (_forced_for(op) or backend) if backend == "auto" else backend


def _forced_for(op: str) -> str | None:
    name = forced()
    if name is None:
        return None
    _check_forced(name)
    return name if any(implementation.name == name for implementation in _REGISTRY[op]) else None


def _check_forced(name: str) -> None:
    known = sorted({implementation.name for each in _REGISTRY.values() for implementation in each} | {_TORCH.name})
    if name not in known:
        raise ConfigError(f"{FORCED}: no op has an implementation '{name}'; valid: {', '.join(known)}")


def _automatic(implementation: Implementation, device_type: str) -> bool:
    return implementation.automatic is None or device_type in implementation.automatic


def _reason(implementation: Implementation, device_type: str, refuses: Callable[[str], Sequence[str]]) -> str | None:
    if implementation.device_types and device_type not in implementation.device_types:
        return f"made for {' and '.join(implementation.device_types)} tensors, not {device_type}"
    reason = implementation.unavailable()
    if reason is None and implementation is not _TORCH:
        reason = "; ".join(refuses(implementation.name)) or None
    return reason
