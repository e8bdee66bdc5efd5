"""Measure the tests that ``tests/durations.json`` does not list yet, and leave out those that are gone.

``python -m tests.durations`` after adding a test that is not marked slow, with ``--all`` to measure all again. What
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

from tests.helpers.tiers import DURATIONS, LONGEST_S, MEASURED


class Recorder:
    """Runs the tests that nobody marked slow and that are not known, and notes what each takes.

    Attributes:
        known: CPU seconds by test, of tests that need not run.
        listed: all tests that nobody marked slow.
        measured: CPU seconds by test, of tests that ran.
        failed: those that failed; what they took says nothing.
    """

    def __init__(self, known: dict[str, float]) -> None:
        self.known = known
        self.listed: list[str] = []
        self.measured: Counter[str] = Counter()
        self.failed: set[str] = set()
        self._since_s = 0.0

    @pytest.hookimpl(trylast=True)  # when tests have their marks
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.listed = config.stash[MEASURED]
        self.known |= {item.nodeid: 0.0 for item in items if item.path.name == "test_tiers.py"}  # they read the result
        wanted = set(self.listed) - self.known.keys()
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
        items[:] = [item for item in items if item.nodeid in wanted]
        self._since_s = cpu_s()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Called after set-up, the test itself, and what follows it."""
        now_s = cpu_s()
        self.measured[item.nodeid] += now_s - self._since_s  # type: ignore[assignment]
        self._since_s = now_s
        report = yield
        if report.failed:
            self.failed.add(item.nodeid)
        return report


def cpu_s() -> float:
    """CPU seconds of this process and of those it has started and waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="measure the tests that are listed, too")
    again = parser.parse_args().all
    recorder = Recorder({} if again or not DURATIONS.exists() else json.loads(DURATIONS.read_text()))
    code = pytest.main(["-q", "-n", "0"], [recorder])
    durations = recorder.known | {test: round(time_s, 3) for test, time_s in recorder.measured.items()}
    listed = {test: durations[test] for test in sorted(durations.keys() & set(recorder.listed) - recorder.failed)}
    DURATIONS.write_text(json.dumps(listed, indent=0) + "\n")
    print(
        f"{len(listed)} tests take {sum(listed.values()):.1f} s, those of up to {LONGEST_S} s "
        f"{sum(time_s for time_s in listed.values() if time_s <= LONGEST_S):.1f} s"
    )
    return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else code


if __name__ == "__main__":
    sys.exit(main())
