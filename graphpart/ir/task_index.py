"""The tasks of a workload by number: what passes over a million of them work with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from graphpart.ir.program import Segment
from graphpart.ir.schedule import Task, place_of_update

Column = NDArray[np.int64]
"""A whole number for each task, in the order of the tasks."""


@dataclass(frozen=True, eq=False)
class TaskIndex:
    """Tasks by number, with what ordering and simulation ask of them.

    Attributes:
        tasks: by number: forward tasks in the order of the program's segments, then backward ones, then updates.
        before: per task, those that must have ended before it may start.
        segments: per task, the segment that it works for; updates have none, and are left out.
        value_maker: per wire, the forward task that makes its value; None for a source.
        gradient_makers: per wire that gets a gradient, the tasks that make a part of it, in the order in which the
            parts are added.
    """

    tasks: tuple[Task, ...]
    before: tuple[tuple[int, ...], ...]
    segments: tuple[Segment, ...]
    value_maker: Mapping[str, int | None]
    gradient_makers: Mapping[str, tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.tasks)

    @cached_property
    def number(self) -> Mapping[Task, int]:
        """The number of each task."""
        return dict(zip(self.tasks, range(len(self)), strict=True))

    @cached_property
    def kind(self) -> NDArray[np.str_]:
        """Per task, its kind."""
        return np.array([task.kind for task in self.tasks], "U1")

    @cached_property
    def device(self) -> Column:
        """Per task, the index of its device."""
        updates = self.tasks[len(self.segments) :]
        devices = [segment.device for segment in self.segments] + [place_of_update(task)[0] for task in updates]
        return np.array(devices, np.int64)

    @cached_property
    def microbatch(self) -> Column:
        """Per task, its microbatch; -1 for what the step runs once."""
        return self._column([-1 if s.microbatch is None else s.microbatch for s in self.segments], -1)

    @cached_property
    def level(self) -> Column:
        """Per task, the level of its segment; 0 for updates."""
        return self._column([segment.level for segment in self.segments], 0)

    def _column(self, values: Sequence[int], of_updates: int) -> Column:
        found = np.full(len(self), of_updates, np.int64)
        found[: len(values)] = values
        return found

    @cached_property
    def num_before(self) -> Column:
        """Per task, how many others it waits for."""
        return np.fromiter(map(len, self.before), np.int64, len(self))

    @cached_property
    def edges(self) -> tuple[Column, Column]:
        """Tasks that others wait for, and those others: a place in both for each time that one waits for one."""
        num_edges = int(self.num_before.sum())
        waiting = np.repeat(np.arange(len(self)), self.num_before)
        return np.fromiter(chain.from_iterable(self.before), np.int64, num_edges), waiting

    @cached_property
    def after(self) -> Sequence[Sequence[int]]:
        """Per task, those that wait for it."""
        return grouped(*self.edges, len(self))

    @cached_property
    def backward(self) -> Mapping[int, int]:
        """Per forward task that has one, its backward task."""
        return {self.before[number][0]: number for number in np.flatnonzero(self.kind == "B").tolist()}

    def seconds(self, durations: Mapping[Task, float] | None) -> list[float]:
        """Per task, how long it takes; one unit each if None."""
        return [1.0] * len(self) if durations is None else list(map(durations.__getitem__, self.tasks))


def grouped(keys: Column, values: Column, num_keys: int) -> list[list[int]]:
    """Per key, from 0 up, the values that stand beside it, in their order.

    Args:
        keys: whole numbers below ``num_keys``.
        values: as many.
        num_keys: how many keys there are.
    """
    flat = values[np.argsort(keys, kind="stable")].tolist()
    ends = np.cumsum(np.bincount(keys, minlength=num_keys)).tolist()
    return [flat[start:end] for start, end in pairwise([0, *ends])]
