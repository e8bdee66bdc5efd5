"""Which tests are fast, slow and long: what the marks mean, and the time that the fast tests may take together."""

from __future__ import annotations

import json
import os
import zlib
from collections import defaultdict
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

MOST_CASES = 4
"""A test with more slow cases is slow in some of them, and long in the others."""

ONE_IN = 6
"""Of the slow cases of such a test, one in so many stays slow."""

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


def mark_long(items: Iterable[pytest.Item]) -> None:
    """Mark the slow cases of tests that have many long, but for one in so many, and those of a test marked ``whole``.

    Cases are chosen by their names and ``GRAPHPART_SEED``: another seed runs others.
    """
    seed = os.environ.get("GRAPHPART_SEED", "0")
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("whole"):
            tests[item.nodeid.split("[")[0]].append(item)
    for cases in tests.values():
        if len(cases) > MOST_CASES:
            cases.sort(key=lambda item: zlib.crc32(f"{seed} {item.name}".encode()))
            for item in cases[max(MOST_CASES, len(cases) // ONE_IN) :]:
                item.add_marker("long")
