"""Schedules as text: golden staircases, and what is written reads back."""

from __future__ import annotations

import random
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphpart.errors import ScheduleError
from graphpart.ir.schedule import Task
from graphpart.order import SCHEDULES, make_schedule, parse_schedule, schedule_text, staircase
from tests.helpers.pipelines import pipeline
from tests.oracle import random_schedule

GOLDEN = {
    "gpipe": """
        device 0: 0F0 0F1 0F2 0F3 .   .   .   .   0B0 0B1 0B2 0B3
        device 1: .   1F0 1F1 1F2 1F3 .   .   1B0 1B1 1B2 1B3 .
        device 2: .   .   2F0 2F1 2F2 2F3 2B0 2B1 2B2 2B3 .   .
    """,
    # A warm-up of K - 1 - s forwards, then one forward and one backward in turn.
    "1f1b": """
        device 0: 0F0 0F1 0F2 .   .   0B0 0F3 0B1 .   0B2 .   0B3
        device 1: .   1F0 1F1 .   1B0 1F2 1B1 1F3 1B2 .   1B3 .
        device 2: .   .   2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3 .   .
    """,
    # Idle for (K - 1) (F + B - W) = 2 units on every device, as ZB-H1 is.
    "zero-bubble": """
        device 0: 0F0 0F1 0F2 .   .   0B0 0W0 0F3 0B1 0W1 0B2 0W2 0B3 0W3
        device 1: .   1F0 1F1 .   1B0 1F2 1B1 1W0 1F3 1B2 1W1 1B3 1W2 1W3
        device 2: .   .   2F0 2B0 2F1 2B1 2F2 2B2 2W0 2F3 2B3 2W1 2W2 2W3
    """,
    # The longest chain ahead goes first: on a chain of devices that is GPipe.
    "list": """
        device 0: 0F0 0F1 0F2 0F3 .   .   .   .   0B0 0B1 0B2 0B3
        device 1: .   1F0 1F1 1F2 1F3 .   .   1B0 1B1 1B2 1B3 .
        device 2: .   .   2F0 2F1 2F2 2F3 2B0 2B1 2B2 2B3 .   .
    """,
}
INTERLEAVED = {
    # Two stages a device: before its first backward, device 0 begins 2 (K - 1) + (v - 1) K + 1 = 5, device 1 three.
    (2, 4): """
        device 0: 0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 .   2B2 .   2B3 0B2 0B3
        device 1: .   1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3 .
    """,
    # Four microbatches are no multiple of three devices: the last group is a short one.
    (3, 4): """
        device 0: 0F0 0F1 0F2 3F0 3F1 3F2 0F3 .   3B0 .   3B1 .   3F3 3B2 .   0B0 0B1 0B2 3B3 .   .   0B3
        device 1: .   1F0 1F1 1F2 4F0 4F1 4F2 4B0 1F3 4B1 .   4B2 .   4F3 1B0 1B1 1B2 4B3 .   .   1B3 .
        device 2: .   .   2F0 2F1 2F2 5F0 5B0 5F1 5B1 5F2 5B2 2F3 2B0 2B1 5F3 2B2 5B3 .   .   2B3 .   .
    """,
}


def golden(text):
    return textwrap.dedent(text).strip()


@pytest.mark.parametrize("name", GOLDEN)
def test_staircases_of_three_devices_and_four_microbatches(name):
    workload = pipeline(3, 4, split=SCHEDULES[name].split)
    schedule = make_schedule(name, workload)
    assert staircase(workload, schedule) == golden(GOLDEN[name])
    assert parse_schedule(workload, name, GOLDEN[name]) == schedule


@pytest.mark.parametrize(("num_devices", "num_microbatches"), INTERLEAVED)
def test_staircases_of_two_stages_a_device(num_devices, num_microbatches):
    workload = pipeline(num_devices, num_microbatches, num_chunks=2)
    schedule = make_schedule("interleaved", workload)
    text = INTERLEAVED[num_devices, num_microbatches]
    assert staircase(workload, schedule) == golden(text)
    assert parse_schedule(workload, "interleaved", text) == schedule


def test_every_schedule_has_a_golden_staircase():
    assert {*GOLDEN, "interleaved"} == set(SCHEDULES)


def test_a_task_longer_than_others_goes_on_in_dashes():
    workload = pipeline(2, 2, updates=True)
    schedule = make_schedule("1f1b", workload)
    durations = {task: {"F": 1.0, "B": 2.0, "U": 0.5}[task.kind] for task in workload.waits_for}
    assert staircase(workload, schedule, durations) == golden("""
        device 0: 0F0 0F1 .   0B0 --- 0B1 0U
        device 1: .   1F0 1B0 1F1 1B1 1U  .
    """)
    assert parse_schedule(workload, "1f1b", staircase(workload, schedule, durations)) == schedule


def test_tasks_that_take_no_time_are_all_shown():
    workload = pipeline(2, 2)
    schedule = make_schedule("gpipe", workload)
    durations = {task: float(task.kind == "B") for task in workload.waits_for}
    text = staircase(workload, schedule, durations)
    assert [row.split()[2:] for row in text.splitlines()] == [
        ["0F0", "0F1", "0B0", "0B1"],
        ["1F0", "1F1", "1B0", "1B1", "."],
    ]
    assert parse_schedule(workload, "gpipe", text) == schedule


@settings(max_examples=60, deadline=None)
@given(
    num_devices=st.integers(1, 12),
    num_microbatches=st.integers(1, 12),
    num_chunks=st.integers(1, 3),
    seed=st.integers(0, 1 << 32),
    durations=st.booleans(),
)
def test_random_schedules_read_back(num_devices, num_microbatches, num_chunks, seed, durations):
    workload = pipeline(num_devices, num_microbatches, num_chunks=num_chunks)
    rng = random.Random(seed)
    schedule = random_schedule(workload, rng)
    times = {task: rng.uniform(0.5, 3) for task in workload.waits_for} if durations else None
    assert parse_schedule(workload, "random", schedule_text(workload, schedule)) == schedule
    assert parse_schedule(workload, "random", staircase(workload, schedule, times)) == schedule


def test_a_device_without_tasks_needs_no_line():
    workload = pipeline(3, 2, train=False)
    idle = parse_schedule(workload, "short", "2F0 2F1\n\n0F0 . 0F1")
    assert [len(line) for line in idle.tasks] == [2, 0, 2]
    assert idle.tasks[2] == (Task("F", "s2.m0"), Task("F", "s2.m1"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0F0 0F7", "line 1: '0F7' is no task"),
        ("0F0\n1F0 1f1", "line 2: '1f1' is no task"),
        ("device 0: 0F0 1F0", "line 1: '1F0' runs on device 1, but '0F0' on device 0"),
        ("0F0\n0F1", "line 2: '0F1' begins a second line for device 0"),
        ("0B0", "'0B0' is no task"),
    ],
)
def test_a_bad_word_is_named(text, words):
    with pytest.raises(ScheduleError, match=words):
        parse_schedule(pipeline(2, 2, train=False), "bad", text)
