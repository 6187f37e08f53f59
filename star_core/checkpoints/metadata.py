"""Reads configurations from the metadata of model files, which may be damaged or made by others."""

import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
# No size or count of layers in any model comes near; larger ones would build for hours.
LARGEST = 2**16


def read_object(text: str, where: str) -> dict[str, Any]:
    """Returns the JSON object in a text. where: the file and the entry, for the ValueError."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, not {_shown(value)}")
    return value


def dataclass_from_json(cls: type[T], values: object, where: str) -> T:
    """Returns a dataclass with the fields of a JSON object, whose types are checked.

    where: the file and the entry; a ValueError names the field behind it. Fields that are missing
    take their defaults, unknown ones are refused.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object, not {_shown(values)}")
    known = {field.name for field in fields(cls)}  # pyright: ignore[reportArgumentType]
    if unknown := next((name for name in values if name not in known), None):
        raise ValueError(f"{where}.{unknown} is unknown: update this package")
    check_fields(cls, values, where)
    try:
        return cls(**values)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def check_fields(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for values of another type than the dataclass's fields of that name."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        if field.name in values and not _fits(values[field.name], hints[field.name]):
            raise ValueError(
                f"{where}.{field.name} cannot be {_shown(values[field.name])}: download the file "
                "again, or write it again"
            )


def build_checked(build: Callable[[], T], where: str) -> T:
    """Returns what `build` returns; ValueError if sizes from a file fit no network."""
    try:
        return build()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} states sizes that fit no network: {error}") from None


def _fits(value: Any, hint: Any) -> bool:
    """Tests a JSON value against a type. Numbers must be finite, and whole ones small enough."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in choices
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in choices)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        repeated = choices[1:] == (...,)
        expected = choices[:1] * len(value) if repeated else choices
        return len(value) == len(expected) and all(map(_fits, value, expected))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST
    if hint is types.NoneType:
        return value is None
    return isinstance(value, hint)


def _finite(value: float) -> bool:
    return math.isfinite(value) and abs(value) <= 1e30


def _shown(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else f"{text[:40]}..."
