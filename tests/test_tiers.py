"""The fast tests are few enough, every one of them has been measured, and each file has one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.tiers import BUDGET_S, DURATIONS, FAST, MEASURED, TESTS

STAND_INS = {
    "test_quickstart.py": "test_cli.py",
    "test_models.py": "test_smoke.py",
    "test_distributed.py": "test_smoke.py",
    "test_train_step_processes.py": "test_smoke.py",
    "test_host_memory.py": "test_executor.py",
}
"""Files of slow tests only, and the file that has such tests in the fast tier."""


@pytest.fixture
def config(request: pytest.FixtureRequest) -> pytest.Config:
    """Of this session, which must have collected all tests."""
    pytest.importorskip("transformers")
    config = request.config
    some = {Path(argument).resolve() for argument in config.args} - {TESTS, TESTS.parent}
    if some or config.option.ignore or config.option.ignore_glob:
        pytest.skip("only some tests were collected")
    return config


def test_every_fast_test_has_been_measured(config: pytest.Config) -> None:
    fast = config.stash[MEASURED]
    known = json.loads(DURATIONS.read_text(encoding="utf-8"))
    advice = "; run `python -m tests.durations`"
    assert not (new := sorted(set(fast) - known.keys())), f"not in {DURATIONS.name}: {new}{advice}"
    assert not (gone := sorted(known.keys() - set(fast))), (
        f"not to be measured, but in {DURATIONS.name}: {gone}{advice}"
    )


def test_the_fast_tests_fit_into_two_minutes(config: pytest.Config) -> None:
    measured = json.loads(DURATIONS.read_text(encoding="utf-8"))
    known = {test: measured[test] for test in config.stash[FAST]}
    longest = sorted(known.items(), key=lambda item: -item[1])[:10]
    assert sum(known.values()) <= BUDGET_S, f"{sum(known.values()):.0f} s; the longest are {longest}"


def test_each_file_has_a_fast_test(config: pytest.Config) -> None:
    files = {test.split("::")[0] for test in config.stash[FAST]}
    missing = {path.name for path in TESTS.glob("test_*.py") if f"tests/{path.name}" not in files}
    assert missing == STAND_INS.keys(), "leave one test of each file fast, or one case of many with `sampled`"
    assert all(f"tests/{name}" in files for name in STAND_INS.values())
