"""Trial plans: lowers, orders and simulates a candidate placement to see what each device would hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from graphpart.cost import MemoryForecast
from graphpart.cost.memory.forecast import trains
from graphpart.ir.placement import Placement
from graphpart.order import held_on_chain
from graphpart.planning.plan import Plan
from graphpart.strategies import InFlight, StepPeak

_MOST_KEPT = 4  # plans of the placements that were tried last


class Trials:
    """Plans of candidate placements; one that comes again is not lowered again.

    Attributes:
        base: what all these plans have in common.
    """

    def __init__(self, base: Plan) -> None:
        self.base = base
        self._plans: deque[Plan] = deque(maxlen=_MOST_KEPT)

    def plan(self, placement: Placement) -> Plan:
        """The plan with a placement."""
        for plan in self._plans:
            if plan.placement == placement:
                return plan
        self._plans.append(replace(self.base, placement=placement))
        return self._plans[-1]

    def peak(self, placement: Placement) -> StepPeak:
        """What devices hold at most in a step under a placement, by the plan's schedule."""
        plan = self.plan(placement)
        assert plan.schedule is not None
        training, thriftiest = plan.training, plan.trainer.thriftiest(plan.schedule)
        peaks = tuple(curve.peak.memory for curve in training.memory)
        memory = MemoryForecast(peaks, plan.choices.optimizer_bytes_per_element)
        return StepPeak(memory, plan.trainer.in_flight(thriftiest))

    def in_flight(self, groups: Mapping[str, str]) -> InFlight | None:
        """What the schedule lets devices hold, for strategies; None where all microbatches are in flight.

        Args:
            groups: group by name of an operator that runs again anyway.
        """
        schedule, num_microbatches = self.base.schedule, self.base.num_microbatches
        if schedule is None or not trains(self.base.graph):
            return None

        def on_chain(num_stages: int, num_chunks: int) -> tuple[float, ...]:
            return held_on_chain(schedule, num_stages, num_microbatches, num_chunks)

        return InFlight(on_chain, self.peak, groups)
