"""Schedules: the order of each device's tasks, as data."""

from graphpart.order.check import dry_run
from graphpart.order.gpipe import gpipe

__all__ = ["dry_run", "gpipe"]
