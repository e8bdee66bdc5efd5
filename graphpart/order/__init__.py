"""Schedules: the order of each device's tasks, as data."""

from graphpart.order.asynchronous import Async, asynchronous
from graphpart.order.chain import held_on_chain
from graphpart.order.clock import start_times
from graphpart.order.dry_run import channels, dry_run, in_flight
from graphpart.order.gpipe import gpipe
from graphpart.order.registry import SCHEDULES, Scheduler, make_schedule
from graphpart.order.text import parse_schedule, schedule_text, staircase

__all__ = [
    "SCHEDULES",
    "Async",
    "Scheduler",
    "asynchronous",
    "channels",
    "dry_run",
    "gpipe",
    "held_on_chain",
    "in_flight",
    "make_schedule",
    "parse_schedule",
    "schedule_text",
    "staircase",
    "start_times",
]
