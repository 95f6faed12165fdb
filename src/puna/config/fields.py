"""FieldReader: typed reads of the fields of a JSON file, whose errors name the file, the field and what it must be."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError, or ValueError where it is not JSON or not an object."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give the folder of a checkpoint, which holds {file.name}")
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
        raise ValueError(f"{file} is not valid JSON ({error}): fetch the file again") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{file} holds a {type(parsed).__name__}, not an object: fetch the file again")
    return parsed


class FieldReader:
    """Typed reads of one JSON object; remembers what was read, so that the rest can be named.

    A field that is null counts as absent. The reads raise ValueError for an absent field without a default, and for a
    value of another type. `bool` is a subclass of `int` in Python, so types are compared exactly.
    """

    def __init__(self, fields: Mapping[str, Any], source: str) -> None:
        self.fields = fields
        self.source = source
        self._read: set[str] = set()

    def error(self, name: str, value: object, wanted: str) -> ValueError:
        shown = repr(value)
        shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
        return ValueError(f"{self.source}: {name} is {shown}: it must be {wanted}")

    def value(self, name: str, default: object = None) -> object:
        """The field as it is, for the caller to check."""
        self._read.add(name)
        value = self.fields.get(name)
        if value is None:
            if default is ...:
                raise ValueError(
                    f"{self.source}: the field {name} is missing: a model of this kind cannot do without it"
                )
            return default
        return value

    def integer(self, name: str, default: object = ...) -> int:
        value = self.value(name, default)
        if type(value) is not int:
            raise self.error(name, value, "a whole number")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self.value(name) is None else self.integer(name)

    def count(self, name: str, default: object = ...) -> int:
        """A number of something, 1 at least."""
        value = self.integer(name, default)
        if value < 1:
            raise self.error(name, value, "1 or more")
        return value

    def optional_count(self, name: str) -> int | None:
        return None if self.value(name) is None else self.count(name)

    def number(self, name: str, default: object = ...) -> float:
        return self._finite(name, self.value(name, default), "a number")

    def positive(self, name: str, default: object = ...) -> float:
        value = self.number(name, default)
        if value <= 0:
            raise self.error(name, value, "more than 0")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        values = self.value(name, ...)
        if not isinstance(values, list):
            raise self.error(name, values, "a list of numbers")
        return tuple(self._finite(name, value, "a list of numbers") for value in values)

    def _finite(self, name: str, value: object, wanted: str) -> float:
        # Python's JSON reader also takes NaN, Infinity and whole numbers of any size.
        if type(value) not in (int, float) or not abs(cast(float, value)) < math.inf:
            raise self.error(name, value, wanted)
        try:
            return float(cast(float, value))
        except OverflowError as error:
            raise self.error(name, value, wanted) from error

    def boolean(self, name: str, default: object = ...) -> bool:
        value = self.value(name, default)
        if type(value) is not bool:
            raise self.error(name, value, "true or false")
        return value

    def text(self, name: str, default: object = ...) -> str:
        value = self.value(name, default)
        if type(value) is not str:
            raise self.error(name, value, "a string")
        return value

    def choice(self, name: str, choices: tuple[str, ...], default: object = ...) -> str:
        value = self.text(name, default)
        if value not in choices:
            raise self.error(name, value, f"one of {', '.join(choices)} (the ones that puna supports)")
        return value

    def child(self, name: str) -> FieldReader | None:
        """A reader of the object in a field; None where the field is absent or the object empty."""
        value = self.value(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return FieldReader(value, f"{self.source}: {name}")

    def unread(self, known: frozenset[str] = frozenset()) -> list[str]:
        """The fields, null ones aside, that were not read and are not among `known`."""
        return sorted(
            name
            for name, value in self.fields.items()
            if value is not None and name not in self._read and name not in known
        )

    def warn_of_unread(self, known: frozenset[str]) -> None:
        unread = self.unread(known)
        if unread:
            warnings.warn(f"{self.source}: puna does not know and ignores: {', '.join(unread)}", stacklevel=4)
