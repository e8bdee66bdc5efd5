"""How much of a call is split over the devices, and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphpart.cost import MemoryForecast
from graphpart.ir.quantities import format_bytes, format_flops, format_time
from graphpart.planning.plan import Plan, memory_together

WARN_BELOW = 0.9
"""A smaller share of FLOPs that is split is worth a warning."""


@dataclass(frozen=True)
class IslandReport:
    """A part of a graph that runs as it is.

    Attributes:
        operators: its operators.
        why: what keeps it from being lowered, with the user's line.
        flops: of one forward.
    """

    operators: tuple[str, ...]
    why: str
    flops: float


@dataclass(frozen=True)
class Coverage:
    """What a call of a model consists of.

    Attributes:
        name: the model's.
        plans: of its graphs, in the order in which they ran.
        breaks: why it is no single graph, with the user's line; none where it is one.
        islands: what of its graphs runs on one device.
        unread: parameters that no graph and no island reads: unused, or read by Python that is no graph.
        unread_share: their part of all elements of parameters.
    """

    name: str
    plans: tuple[Plan, ...]
    breaks: tuple[str, ...] = ()
    islands: tuple[IslandReport, ...] = ()
    unread: tuple[str, ...] = ()
    unread_share: float = 0.0

    @property
    def flops_split(self) -> float:
        """FLOPs of one forward in graphs that are planned."""
        return sum(op.flops_forward for plan in self.plans for op in plan.graph.operators)

    @property
    def flops_apart(self) -> float:
        """FLOPs of one forward in islands."""
        return sum(island.flops for island in self.islands)

    @property
    def share(self) -> float:
        """Of all of these FLOPs, those that are planned; where there are none, 1 if anything is planned, else 0."""
        total = self.flops_split + self.flops_apart
        return self.flops_split / total if total else float(bool(self.plans))

    @property
    def forecast_s(self) -> float:
        """A training step of the graphs that are planned, one after the other."""
        return sum(plan.timeline.makespan_s for plan in self.plans)

    @property
    def memory(self) -> MemoryForecast:
        """What these graphs hold on each device until backward; what several of them read is held once.

        Raises:
            ValueError: if none is planned.
        """
        return memory_together(self.plans)

    @property
    def is_little(self) -> bool:
        """Whether so little is planned, of what can be counted, that it is worth a warning.

        FLOPs of Python that is no graph are not counted; what it reads is no graph's to read.
        """
        return bool(self.breaks) and (not self.plans or min(self.share, 1 - self.unread_share) < WARN_BELOW)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, in sentences; none where a call is one graph."""
        if not self.breaks:
            return ()
        part, total = format_flops(self.flops_split), format_flops(self.flops_split + self.flops_apart)
        share = f"{100 * self.share:.0f} % of the FLOPs of a forward are planned ({part} of {total})"
        graphs = f"{_counted(len(self.plans), 'graph')}, planned in turn, with Python between them"
        found = [f"{self.name} runs as {graphs}; {share}" if self.plans else f"no graph of {self.name} is planned"]
        found += [f"the graph breaks: {why}" for why in self.breaks]
        found += [f"on one device as it is: {_listed(island.operators)} ({island.why})" for island in self.islands]
        if self.unread:
            found.append(f"no graph reads {_listed(self.unread)}")
        return tuple(found)

    def __str__(self) -> str:
        """The notes, a line each, and what the graphs take together."""
        if not self.breaks:
            return f"{self.name} is one graph, all of it planned"
        return "\n".join([*self.notes, *([self._together] if self.plans else [])])

    @property
    def _together(self) -> str:
        fullest = format_bytes(self.memory.peak_bytes)
        return f"together: {format_time(self.forecast_s)} a training step, and up to {fullest} on a device"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
