"""What a training step's schedule lets devices hold at once, for strategies, which know no schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from graphpart.cost.memory.forecast import MemoryForecast
from graphpart.ir.placement import Placement


@dataclass(frozen=True)
class Held:
    """What devices hold under one placement.

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
class Holding:
    """What the schedule lets devices hold. Without one, all microbatches are in flight.

    Attributes:
        on_chain: ``on_chain(num_stages, chunks)``: per stage of a chain, of how many microbatches its device keeps
            activations; what a split can count on before there is one.
        look: what devices hold under a placement: lowered, ordered and simulated.
        groups: group by name of an operator that runs again for its backward, besides those of the placement.
    """

    on_chain: Callable[[int, int], Sequence[float]]
    look: Callable[[Placement], Held]
    groups: Mapping[str, str] = field(default_factory=dict)

    def of(self, placement: Placement) -> Held:
        """What devices hold under a placement."""
        groups = {**self.groups, **placement.recompute}
        return self.look(placement if groups == placement.recompute else replace(placement, recompute=groups))
