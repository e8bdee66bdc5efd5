"""Memory budget of each stage of a layer split, refined by trials of the whole step."""

from __future__ import annotations

from collections.abc import Sequence

from graphpart.ir.cluster import Cluster
from graphpart.ir.placement import Placement
from graphpart.strategies.memory.in_flight import StepPeak
from graphpart.strategies.memory.terms import Terms

_SLIGHT = 0.05
"""Microbatches by which a trial may differ from what was counted on, as bytes are rounded."""


class StageMemory:
    """Limits of devices, and the parts of the batch that are in flight on stages; both learn from trials of a step.

    A schedule's number for a stage follows from where it is on a chain. Operators that wait for the whole batch hold
    more, and messages take memory, too: a trial of a whole step shows that, and the next split leaves room for it.

    Attributes:
        limits: bytes that each device may hold, in rounds if there are several chunks a device.
    """

    def __init__(self, cluster: Cluster, terms: Terms, chunks: int) -> None:
        self._usable = terms.limits_bytes(cluster)
        self.limits = [limit / chunks for _ in range(chunks) for limit in self._usable]
        self._chunks = chunks
        self._terms = terms
        self._seen: dict[int, float] = {}  # microbatches in flight, by stages to the end

    def parts(self, num_stages: int) -> tuple[float, ...]:
        """Per stage, the part of the batch whose activations it keeps, if there are so many stages."""
        if self._terms.in_flight is None:
            return (1.0,) * num_stages
        flights = self._terms.in_flight.on_chain(num_stages, self._chunks)
        seen = (self._seen.get(num_stages - stage, 0.0) for stage in range(num_stages))
        return tuple(min(max(pair) / self._terms.num_microbatches, 1.0) for pair in zip(flights, seen, strict=True))

    def excess(self, placement: Placement) -> StepPeak | None:
        """What devices hold under a placement if that is too much, else None."""
        peak = None if self._terms.in_flight is None else self._terms.in_flight.peak(placement)
        return peak if peak is not None and any(peak.over_bytes(self._usable)) else None

    def learn(self, devices: Sequence[int], peak: StepPeak) -> None:
        """Take into account what devices were seen to hold.

        Args:
            devices: per stage, its device.
            peak: what they hold.
        """
        known = self.parts(len(devices))
        over = peak.over_bytes(self._usable)
        for stage, (device, part) in enumerate(zip(devices, known, strict=True)):
            seen = peak.in_flight[device]
            if seen > part * self._terms.num_microbatches + _SLIGHT:
                self._seen[len(devices) - stage] = seen
                over[device] = 0.0  # that may be all
        for place in range(len(self.limits)):
            self.limits[place] -= over[place % len(self._usable)] / self._chunks
