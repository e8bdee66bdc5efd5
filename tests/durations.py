"""Measure the fast tests that ``tests/durations.json`` does not list yet, and leave out those that are gone.

``python -m tests.durations`` after adding a fast test, ``python -m tests.durations --all`` to measure all again. What
counts is CPU time, of the test and of the processes that it starts, which a busy machine changes little.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Generator

import pytest

from tests.helpers.tiers import DURATIONS


class Recorder:
    """Runs the fast tests that are not known, and notes what each takes.

    Attributes:
        known: CPU seconds by test, of tests that need not run.
        fast: all fast tests.
        measured: CPU seconds by test, of tests that ran.
    """

    def __init__(self, known: dict[str, float]) -> None:
        self.known = known
        self.fast: list[str] = []
        self.measured: Counter[str] = Counter()
        self._since_s = 0.0

    @pytest.hookimpl(trylast=True)  # when the slow ones are left out already
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.fast = [item.nodeid for item in items]
        self.known |= {item.nodeid: 0.0 for item in items if item.path.name == "test_tiers.py"}  # they read the result
        known = [item for item in items if item.nodeid in self.known]
        config.hook.pytest_deselected(items=known)
        items[:] = [item for item in items if item.nodeid not in self.known]
        self._since_s = cpu_s()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Called after set-up, the test itself, and what follows it."""
        now_s = cpu_s()
        self.measured[item.nodeid] += now_s - self._since_s  # type: ignore[assignment]
        self._since_s = now_s
        return (yield)


def cpu_s() -> float:
    """CPU seconds of this process and of those it has started and waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="measure the tests that are listed, too")
    again = parser.parse_args().all
    recorder = Recorder({} if again or not DURATIONS.exists() else json.loads(DURATIONS.read_text()))
    code = pytest.main(["-q", "-m", "not slow", "-n", "0"], [recorder])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return code
    durations = recorder.known | {test: round(time_s, 3) for test, time_s in recorder.measured.items()}
    DURATIONS.write_text(json.dumps({test: durations[test] for test in sorted(recorder.fast)}, indent=0) + "\n")
    print(f"{len(recorder.fast)} fast tests take {sum(durations[test] for test in recorder.fast):.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
