"""What a file may hold before anybody reads it: plain data of bounded depth, with numbers that arithmetic bears."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphpart.errors import GraphError

MAX_DEPTH = 48
"""Objects in lists in objects…: an argument of an operator has a few, and recursion must not end in the stack's end."""

MAX_NUMBER = 2**64
"""Above this no size, rate or number of a file makes sense."""

MAX_TEXT = 20_000
"""Characters of a name, a note or a source line."""


def check_plain(data: Any) -> None:
    """Refuse data that is no sensible file's, whoever reads it later.

    Args:
        data: what a JSON or TOML file holds.

    Raises:
        GraphError: naming the place and what stands there.
    """
    rows: list[tuple[tuple[Any, ...], Any]] = [((), data)]
    while rows:
        place, item = rows.pop()
        if isinstance(item, str):
            _check_text(place, item)
        elif isinstance(item, (int, float)):
            if not abs(item) <= MAX_NUMBER:
                text = "a number of many digits" if isinstance(item, int) else repr(item)
                raise GraphError(f"{_named(place)} holds {text}; numbers are finite and at most 2**64")
        elif isinstance(item, (list, tuple, Mapping)):
            if len(place) >= MAX_DEPTH:
                raise GraphError(f"{_named(place[:3])} is nested more than {MAX_DEPTH} deep")
            inside = item.items() if isinstance(item, Mapping) else enumerate(item)
            for key, value in inside:
                if isinstance(key, str):
                    _check_text(place, key)
                rows.append(((*place, key), value))


def _check_text(place: tuple[Any, ...], text: str) -> None:
    if len(text) > MAX_TEXT:
        raise GraphError(f"{_named(place)} has a text of {len(text)} characters; {MAX_TEXT} are the most")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GraphError(f"{_named(place)} has a text that is not Unicode") from error


def _named(place: tuple[Any, ...]) -> str:
    """A place in nested data: ``graph.operators[3].name``."""
    found = ""
    for key in place:
        found += f"[{key}]" if isinstance(key, int) else f".{str(key)[:40]}"
    return found.lstrip(".") or "the file"
