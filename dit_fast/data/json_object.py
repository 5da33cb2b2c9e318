"""A JSON object whose entries are taken by name, each checked for its type and range."""

import json
import math
from typing import Any, NoReturn

from dit_fast.errors import DataError

MAX_VALUES = 1 << 26  # of one array of one sample
MAX_DIMENSIONS = 8


class JsonObject:
    """A JSON object whose fields are taken by name, type and range. Raises DataError naming file and field."""

    def __init__(self, raw: Any, where: str, prefix: str = ""):
        self.where, self.prefix = where, prefix
        if not isinstance(raw, dict):
            self.refuse("", raw, "an object")
        self.raw: dict[str, Any] = raw

    def refuse(self, name: str, value: Any, wanted: str) -> NoReturn:
        field = f"{self.prefix}{name}".rstrip(".")
        shown = json.dumps(value)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        raise DataError(f"{self.where}: {field} is {shown}, not {wanted}; restore it or rebuild the data set")

    def get(self, name: str) -> Any:
        if name not in self.raw:
            raise DataError(f"{self.where}: lacks {self.prefix}{name}; restore it or rebuild the data set")
        return self.raw[name]

    def inner(self, name: str) -> "JsonObject":
        return JsonObject(self.get(name), self.where, f"{self.prefix}{name}.")

    def objects(self, name: str) -> list["JsonObject"]:
        prefix = f"{self.prefix}{name}"
        return [JsonObject(item, self.where, f"{prefix}[{i}].") for i, item in enumerate(self._list(name, "objects"))]

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            self.refuse(name, value, "a text")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._list(name, "texts")
        if not all(isinstance(item, str) for item in value):
            self.refuse(name, value, "a list of texts")
        return tuple(value)

    def one_of(self, name: str, valid: tuple[str, ...]) -> str:
        value = self.get(name)
        if not isinstance(value, str) or value not in valid:
            self.refuse(name, value, f"one of {', '.join(valid)}")
        return value

    def whole(self, name: str, high: int) -> int:
        return self._whole(name, self.get(name), high, f"a whole number in 1..{high}")

    def wholes(self, name: str, count: int | None, high: int) -> tuple[int, ...]:
        """`count` of them, or any number that an array has dimensions."""
        wanted = f"a list of {'' if count is None else f'{count} '}whole numbers in 1..{high}"
        value = self._list(name, "whole numbers")
        if len(value) > MAX_DIMENSIONS if count is None else len(value) != count:
            self.refuse(name, value, wanted)
        for item in value:
            self._whole(name, item, high, wanted)
        if math.prod(value) > MAX_VALUES:
            self.refuse(name, value, f"of at most {MAX_VALUES} values a sample")
        return tuple(value)

    def numbers(self, name: str, count: int, low: float = -math.inf) -> tuple[float, ...]:
        """`count` finite numbers above `low`."""
        value, above = self._list(name, f"{count} numbers"), "" if low == -math.inf else f" above {low:g}"
        if len(value) != count or not all(_finite(item) and item > low for item in value):
            self.refuse(name, value, f"a list of {count} finite numbers{above}, one per channel")
        return tuple(float(item) for item in value)

    def affine(self, name: str, count: int, low: float = -math.inf) -> float | tuple[float, ...]:
        """One finite number above `low`, or one per channel."""
        value = self.get(name)
        if isinstance(value, list):
            return self.numbers(name, count, low)
        if not _finite(value) or value <= low:
            self.refuse(name, value, f"a finite number{'' if low == -math.inf else f' above {low:g}'}")
        return float(value)

    def _list(self, name: str, of: str) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list):
            self.refuse(name, value, f"a list of {of}")
        return value

    def _whole(self, name: str, value: Any, high: int, wanted: str) -> int:
        if type(value) is not int or not 1 <= value <= high:
            self.refuse(name, self.raw[name], wanted)
        return value


def _finite(value: Any) -> bool:
    """Whether a JSON value is a number that a float32 holds; true and false are not."""
    return type(value) in (int, float) and abs(value) <= 3.4e38
