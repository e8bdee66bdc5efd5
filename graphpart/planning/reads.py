"""Typed reads of plain data: what is there has the type it should have, or the error says which entry has not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from graphpart.errors import GraphError

REQUIRED: Any = object()
"""Default of a key that has to be there."""


def get(data: Mapping[str, Any], key: str, kind: Any, default: Any = REQUIRED) -> Any:
    """An entry of plain data, of the type it should have.

    Args:
        data: a JSON object.
        key: the entry.
        kind: a type; an integer passes for a float, a boolean only for a boolean.
        default: what a missing entry means; without it, the entry has to be there.

    Raises:
        GraphError: naming the key, if the entry is missing or of another type.
    """
    found = data.get(key, default)
    if found is REQUIRED:
        raise GraphError(f"key {key!r} is missing")
    if found is default:
        return found
    try:
        return item(found, kind)
    except GraphError as error:
        raise GraphError(f"key {key!r} holds {error}") from error


def item(found: Any, kind: Any) -> Any:
    """One item of plain data, of the type it should have, as for :func:`get`.

    Raises:
        GraphError: if it is of another type.
    """
    if (isinstance(found, bool) and kind is not bool) or not isinstance(found, (kind, int) if kind is float else kind):
        wanted = {"Mapping": "an object", "str": "text", "int": "a whole number", "float": "a number"}
        raise GraphError(f"{json.dumps(found)[:60]}, not {wanted.get(kind.__name__, f'a {kind.__name__}')}")
    return found


def items(data: Mapping[str, Any], key: str, kind: Any) -> tuple[Any, ...]:
    """A list of items of one type."""
    return each(data, key, lambda found: found, kind)


def each(data: Mapping[str, Any], key: str, read: Callable[[Any], Any], kind: Any) -> tuple[Any, ...]:
    """Every row of a list, read; errors say which row."""
    found = []
    for number, row in enumerate(get(data, key, list, ())):
        try:
            found.append(read(item(row, kind)))
        except (GraphError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
            raise GraphError(f"{key}[{number}]: {error}") from error
    return tuple(found)
