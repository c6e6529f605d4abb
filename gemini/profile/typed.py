"""Checks whether values read from JSON have their declared types."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

__all__ = ["fits", "unfit_fields"]


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value has a type.

    Args:
        value: a value from JSON, or a dataclass of such values.
        hint: a class, a union, or a tuple or dict of one kind; an int is also a float, but a bool is not an int.

    Returns:
        Whether the value and everything in it has the type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, each) for each in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(key, arguments[0]) and fits(each, arguments[1]) for key, each in value.items()
        )
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(each, arguments[0]) for each in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, typing.cast(type, hint)) and not unfit_fields(value)
    return isinstance(value, hint)


def unfit_fields(record: Any) -> list[str]:
    """Return the names of a record's fields whose values do not have the declared type.

    Args:
        record: a dataclass or NamedTuple.

    Returns:
        The names, in their order.
    """
    hints = typing.get_type_hints(type(record))
    return [name for name, hint in hints.items() if not fits(getattr(record, name), hint)]
