"""Training methods by name. A new method is one file here and one line in `METHODS`; the trainer stays as it is."""

import difflib
from collections.abc import Iterable
from typing import Any

from dit_fast.errors import ConfigError
from dit_fast.methods.base import Method, Methods, ModelFacts, StepContext, StepInputs, Term
from dit_fast.methods.diversedit import DiverseDiT
from dit_fast.methods.repa import REPA

METHODS: dict[str, type[Method]] = {method.name: method for method in (DiverseDiT, REPA)}


def build_methods(configs: Iterable[Any]) -> Methods:
    """The methods of these Config objects, in order. Raises ConfigError for unknown names and for repeated ones."""
    return Methods([_class(config.name)(config) for config in configs])


def _class(name: str) -> type[Method]:
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(METHODS)}"
        raise ConfigError(f"unknown method '{name}'; {hint}")
    return METHODS[name]


__all__ = ["METHODS", "Method", "Methods", "ModelFacts", "StepContext", "StepInputs", "Term", "build_methods"]
