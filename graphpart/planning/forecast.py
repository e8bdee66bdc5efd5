"""The forecast of a training step, from data sheets or from times measured here."""

from __future__ import annotations

from dataclasses import replace

from graphpart.cost.memory.curve import memory_over_time
from graphpart.cost.time.calibration import Calibration
from graphpart.errors import ArgumentError
from graphpart.ir.timeline import Timeline
from graphpart.planning.plan import Plan
from graphpart.simulator import simulate_workload


def simulate(plan: Plan, calibration: Calibration | None = None) -> Timeline:
    """The forecast of one training step under a plan, memory over time included.

    ``print()`` shows a table by device; see :class:`graphpart.Timeline` for pictures, traces and comparisons.

    Args:
        plan: the plan.
        calibration: measured times of the tasks of the plan's fused step, see :func:`graphpart.calibrate`: the forecast
            is one of that step. Without it, times follow from the devices' data sheets.

    Raises:
        ArgumentError: if there is no plan, or ``calibration`` is no calibration.
        PlanError: if the calibration is not of this plan's fused step.
    """
    if not isinstance(plan, Plan):
        hint = "; a partitioned model has one after its first call, or parted.prepare(...)" if plan is None else ""
        raise ArgumentError(f"simulate() takes a graphpart.Plan, not {plan!r}{hint}")
    if calibration is not None and not isinstance(calibration, Calibration):
        raise ArgumentError(f"calibration={calibration!r}; give what graphpart.calibrate(...) returned, or None")
    timeline, memory = plan.timeline, plan.memory_over_time
    if calibration is not None:
        workload, schedule = plan.training.workload, plan.training.schedule
        times = calibration.times_of(workload)
        timeline = simulate_workload(workload, schedule, plan.cluster, times=times)
        assert workload.backward is not None
        memory = memory_over_time(
            plan.graph, plan.placement, plan.program, workload.backward, timeline, plan.all_in_flight
        )
    return replace(timeline, memory=tuple(curve.samples for curve in memory))
