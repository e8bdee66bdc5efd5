"""How much room the stages of a layer split have, under what the step's schedule lets them hold."""

from __future__ import annotations

from collections.abc import Sequence

from graphpart.cost.memory.forecast import usable_bytes
from graphpart.ir.cluster import Cluster
from graphpart.ir.placement import Placement
from graphpart.strategies.memory.in_flight import Held, Holding

_SLIGHT = 0.05
"""Microbatches by which a look may differ from what was counted on, as bytes are rounded."""


class Room:
    """Limits of devices, and the parts of the batch that are in flight on stages; both learn from looks at a step.

    A schedule's number for a stage follows from where it is on a chain. Operators that wait for the whole batch hold
    more, and messages take memory, too: a look at a whole step shows that, and the next split has to leave room for it.

    Attributes:
        limits: bytes that each device may hold, in rounds if there are several chunks a device.
    """

    def __init__(
        self, cluster: Cluster, memory_reserve: float, chunks: int, num_microbatches: int, holding: Holding | None
    ) -> None:
        self.limits: list[float] = [
            usable_bytes(device, memory_reserve) / chunks for _ in range(chunks) for device in cluster.devices
        ]
        self._usable = [usable_bytes(device, memory_reserve) for device in cluster.devices]
        self._chunks = chunks
        self._num_microbatches = num_microbatches
        self._holding = holding
        self._seen: dict[int, float] = {}  # microbatches in flight, by stages to the end

    def parts(self, num_stages: int) -> tuple[float, ...]:
        """Per stage, the part of the batch whose activations it keeps, if there are so many stages."""
        if self._holding is None:
            return (1.0,) * num_stages
        flights = self._holding.on_chain(num_stages, self._chunks)
        seen = (self._seen.get(num_stages - stage, 0.0) for stage in range(num_stages))
        return tuple(min(max(pair) / self._num_microbatches, 1.0) for pair in zip(flights, seen, strict=True))

    def look(self, placement: Placement) -> Held | None:
        """What devices hold under a placement if that is too much, else None."""
        held = None if self._holding is None else self._holding.of(placement)
        return held if held is not None and any(held.over_bytes(self._usable)) else None

    def learn(self, devices: Sequence[int], held: Held) -> None:
        """Take into account what devices were seen to hold.

        Args:
            devices: per stage, its device.
            held: what they hold.
        """
        known = self.parts(len(devices))
        over = held.over_bytes(self._usable)
        for stage, (device, part) in enumerate(zip(devices, known, strict=True)):
            seen = held.in_flight[device]
            if seen > part * self._num_microbatches + _SLIGHT:
                self._seen[len(devices) - stage] = seen
                over[device] = 0.0  # that may be all
        for place in range(len(self.limits)):
            self.limits[place] -= over[place % len(self._usable)] / self._chunks
