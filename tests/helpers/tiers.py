"""Which tests are fast: what ``slow`` and ``sampled`` mean, and the time that the fast tests may take together."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent

DURATIONS = TESTS / "durations.json"
"""CPU seconds of every test that nobody marked slow, written by ``python -m tests.durations``."""

BUDGET_S = 170.0
"""Most CPU seconds of all fast tests together: half as many on two cores. ``make check`` takes some 45 s besides: ruff
and mypy, the workers' imports, one that waits for the other at the end. What calls read and change added half a minute.
"""

LONGEST_S = 0.6
"""A test that was measured to take more CPU seconds is slow, unless it is the quickest of its file."""

MEASURED = pytest.StashKey[list[str]]()
"""Names of the tests among those that a session has collected that nobody marked slow: they have to be measured."""

FAST = pytest.StashKey[list[str]]()
"""Names of the fast tests among these."""


def mark_slow(items: Iterable[pytest.Item]) -> tuple[list[str], list[str]]:
    """Mark the cases of a sampled test slow, but for one in so many, and what takes long.

    A case is chosen by its own name alone, so that it stays in its tier whatever is added or left out beside it.

    Returns:
        The names of the tests that have to be measured, and those of the fast ones among them.
    """
    known = json.loads(DURATIONS.read_text(encoding="utf-8")) if DURATIONS.exists() else {}
    candidates = []
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled and zlib.crc32(item.name.encode()) % sampled.args[0]:
            item.add_marker("slow")
        if not item.get_closest_marker("slow"):
            candidates.append(item)
    quickest: dict[str, str] = {}
    for name in sorted((item.nodeid for item in candidates), key=lambda name: known.get(name, 0.0)):
        quickest.setdefault(name.split("::")[0], name)
    fast = []
    for item in candidates:
        if known.get(item.nodeid, 0.0) <= LONGEST_S or item.nodeid in quickest.values():
            fast.append(item.nodeid)
        else:
            item.add_marker("slow")
    return [item.nodeid for item in candidates], fast
