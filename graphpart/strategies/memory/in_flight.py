"""In-flight limits: how many microbatches' activations each device keeps under the plan's schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from graphpart.cost.memory.forecast import MemoryForecast
from graphpart.ir.placement import Placement


@dataclass(frozen=True)
class StepPeak:
    """What devices hold at most during a step under one placement.

    Attributes:
        memory: per device, what it holds when it holds most.
        in_flight: per device, of how many microbatches it then keeps activations; not whole where it keeps only some of
            a microbatch's.
    """

    memory: MemoryForecast
    in_flight: tuple[float, ...]

    def over_bytes(self, limits: Sequence[float]) -> list[float]:
        """Per device, the bytes that it holds beyond its limit."""
        pairs = zip(self.memory.devices, limits, strict=True)
        return [max(device.total_bytes - limit, 0.0) for device, limit in pairs]


@dataclass(frozen=True)
class InFlight:
    """What the schedule lets devices hold, for strategies, which know no schedules.

    Attributes:
        on_chain: ``on_chain(num_stages, chunks)``: per stage of a chain, of how many microbatches its device keeps
            activations; what a split can count on before there is one.
        trial: what devices hold under a placement: lowered, ordered and simulated.
        groups: group by name of an operator that runs again for its backward, besides those of the placement.
    """

    on_chain: Callable[[int, int], Sequence[float]]
    trial: Callable[[Placement], StepPeak]
    groups: Mapping[str, str] = field(default_factory=dict)

    def peak(self, placement: Placement) -> StepPeak:
        """What devices hold at most under a placement."""
        groups = {**self.groups, **placement.recompute}
        return self.trial(placement if groups == placement.recompute else replace(placement, recompute=groups))
