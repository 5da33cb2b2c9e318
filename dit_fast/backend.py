"""Which implementation of each op runs, and why: the one switch, and the text behind `dit-fast info`.

Every op registers its implementations in order of preference. An implementation says for which device type it is
meant and why it cannot run here, if it cannot. `choose` answers per call; nothing falls back silently: the first time
an implementation is passed over, the reason is logged once.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dit_fast.errors import ConfigError

logger = logging.getLogger("dit_fast")


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. `unavailable()` returns the reason why it cannot run on this machine, or None.

    device_types: the types of device it is made for; empty = any.
    """

    name: str
    device_types: tuple[str, ...]
    unavailable: Callable[[], str | None]


BETTER = "a better one is used"
_TORCH = Implementation("torch", (), lambda: None)
_REGISTRY: dict[str, list[Implementation]] = {}
_LOGGED: set[tuple[str, str]] = set()


def register(op: str, *faster: Implementation, on_request: Sequence[Implementation] = ()) -> None:
    """Declares an op: the implementations better than the plain torch reference, best first.

    on_request: those that "auto" never takes, for example because they trade speed for memory.
    """
    _REGISTRY[op] = [*faster, _TORCH, *on_request]


def ops() -> tuple[str, ...]:
    return tuple(sorted(_REGISTRY))


def choose(op: str, backend: str, device_type: str, refuses: Callable[[str], Sequence[str]] = lambda name: ()) -> str:
    """The implementation that runs `op` on tensors of this device type.

    backend: "auto" (the best one that can run) or the name of an implementation, which then must be able to run.
    refuses: for the name of an implementation other than "torch", reasons why it cannot take these very arguments.
    Raises ConfigError for an unknown name or an implementation that cannot run here, with the reason.
    """
    implementations = _REGISTRY[op]
    if backend != "auto":
        for implementation in implementations:
            if implementation.name == backend:
                reason = _reason(implementation, device_type, refuses)
                if reason:
                    raise ConfigError(f"{op}: backend '{backend}' cannot run: {reason}; use backend=\"auto\"")
                return backend
        names = ", ".join(["auto", *(implementation.name for implementation in implementations)])
        raise ConfigError(f"{op}: unknown backend '{backend}'; valid: {names}")
    for implementation in implementations:
        reason = _reason(implementation, device_type, refuses)
        if reason is None:
            return implementation.name
        if device_type in implementation.device_types and (op, implementation.name) not in _LOGGED:
            _LOGGED.add((op, implementation.name))
            logger.info("%s: %s is not used: %s", op, implementation.name, reason)
    raise ConfigError(f"{op}: no implementation for device type '{device_type}'")


def explain(op: str, device_type: str) -> list[tuple[str, str]]:
    """(implementation, "used" | why it is not) for every implementation of an op, for `dit-fast info`."""
    lines, taken = [], False
    for implementation in _REGISTRY[op]:
        reason = _reason(implementation, device_type, lambda name: ())
        if reason is None and not taken:
            lines.append((implementation.name, "used"))
            taken = True
        else:
            lines.append((implementation.name, reason or BETTER))
    return lines


def _reason(implementation: Implementation, device_type: str, refuses: Callable[[str], Sequence[str]]) -> str | None:
    if implementation.device_types and device_type not in implementation.device_types:
        return f"made for {' and '.join(implementation.device_types)} tensors, not {device_type}"
    reason = implementation.unavailable()
    if reason is None and implementation is not _TORCH:
        reason = "; ".join(refuses(implementation.name)) or None
    return reason
