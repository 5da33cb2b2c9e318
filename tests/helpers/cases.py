"""Many small cases of one rule as one test, which names every case that fails; and what a refusal must be."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dit_fast.errors import UserError


def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message of the UserError that the call raises, which is one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def loop_over(names: str | Sequence[str], values: Sequence[Any]) -> Callable[[Callable], Callable]:
    """Like pytest.mark.parametrize, but one test: for cases of milliseconds that share no fixture with a state.

    Decorators may be stacked, also with parametrize. Fixtures are those of one test.
    """
    names = [names] if isinstance(names, str) else list(names)
    assert values, "no case"
    assert not any(hasattr(value, "marks") for value in values), "cases with marks need parametrize"

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def every(**fixtures: Any) -> None:
            failures: list[tuple[dict[str, Any], Exception]] = []
            for value in values:
                given = dict(zip(names, value if len(names) > 1 else [value], strict=True))
                try:
                    test(**fixtures, **given)
                except Exception as error:
                    failures.append((given, error))
            if failures:
                lines = [f"{given}: {type(error).__name__}: {error}" for given, error in failures]
                raise AssertionError("\n".join(lines)) from failures[0][1]

        own = inspect.signature(test)
        free = [parameter for name, parameter in own.parameters.items() if name not in names]
        every.__signature__ = own.replace(parameters=free)  # type: ignore[attr-defined]
        return every

    return decorate
