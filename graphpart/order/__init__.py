"""Schedules: the order of each device's tasks, as data."""

from graphpart.order.check import dry_run
from graphpart.order.gpipe import gpipe
from graphpart.order.registry import SCHEDULES, Scheduler, make_schedule

__all__ = ["SCHEDULES", "Scheduler", "dry_run", "gpipe", "make_schedule"]
