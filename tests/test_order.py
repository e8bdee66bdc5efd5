"""Schedules: laws that hold for every one, and what each promises."""

from __future__ import annotations

import pytest
from pipelines import pipeline

from graphpart.errors import ScheduleError
from graphpart.order import SCHEDULES, dry_run, make_schedule


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("options", [{}, {"train": False}, {"split": True, "updates": True}, {"barrier": 1}])
def test_every_schedule_takes_every_kind_of_workload(name, options):
    workload = pipeline(3, 4, **options)
    dry_run(workload, make_schedule(name, workload))


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(ScheduleError, match="no schedule '1F1B'; give 'gpipe', '1f1b'"):
        make_schedule("1F1B", pipeline(2, 2))
