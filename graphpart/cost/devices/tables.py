"""Values of tables that people write, each checked, with messages that name the file and the key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from graphpart.errors import ClusterError


def check_keys(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse a key that is none of the known ones, with the nearest that is."""
    for key in table:
        if key not in known:
            near = get_close_matches(str(key), list(known), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
            raise ClusterError(f"{where}: unknown key {key!r}; {hint}")


def tables(data: Mapping[str, Any], key: str, where: str) -> list[Mapping[str, Any]]:
    """The tables of a list, none if it is left out."""
    tables = data.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise ClusterError(f"{where}: key {key!r} has to be a list of tables [[{key}]]")
    return tables


def text(table: Mapping[str, Any], key: str, where: str) -> str:
    """A text."""
    if key not in table:
        raise ClusterError(f"{where}: key {key!r} is missing")
    if not isinstance(table[key], str):
        raise ClusterError(f"{where}: key {key!r} has to be text, not {table[key]!r}")
    return table[key]


def number(table: Mapping[str, Any], key: str, where: str) -> float:
    """A finite number."""
    if key not in table:
        raise ClusterError(f"{where}: key {key!r} is missing")
    value = table[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ClusterError(f"{where}: key {key!r} has to be a number, not {value!r}")
    if not abs(value) < float("inf"):
        raise ClusterError(f"{where}: key {key!r} has to be finite, not {value!r}")
    return value


def whole_number(table: Mapping[str, Any], key: str, where: str) -> int:
    """A whole number."""
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ClusterError(f"{where}: key {key!r} has to be a whole number, not {value!r}")
    return value


def boolean(table: Mapping[str, Any], key: str, where: str) -> bool:
    """True or false."""
    if not isinstance(table.get(key), bool):
        raise ClusterError(f"{where}: key {key!r} has to be true or false, not {table.get(key)!r}")
    return bool(table[key])
