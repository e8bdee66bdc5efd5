"""Which tests are fast: what ``slow`` and ``sampled`` mean, and the time that the fast tests may take together."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent

DURATIONS = TESTS / "durations.json"
"""CPU seconds of every fast test, written by ``python -m tests.durations``."""

BUDGET_S = 140.0
"""Most CPU seconds of all fast tests together, so that ``make check`` takes two minutes on two cores: of 120 seconds 30
are for ruff and mypy, 15 for the workers to import torch and collect, 5 for one that waits for the other at the end.
"""

FAST = pytest.StashKey[list[str]]()
"""Names of the fast tests among those that a session has collected."""


def mark_slow(items: Iterable[pytest.Item]) -> list[str]:
    """Mark the cases of a sampled test slow, but for one in so many; returns the names of the fast tests.

    A case is chosen by its own name alone, so that it stays in its tier whatever is added or left out beside it.
    """
    fast = []
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled and zlib.crc32(item.name.encode()) % sampled.args[0]:
            item.add_marker("slow")
        if not item.get_closest_marker("slow"):
            fast.append(item.nodeid)
    return fast
