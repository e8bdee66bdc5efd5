"""One decision for all traces of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graphpart.errors import OutOfMemoryError, PlacementError, PlanError
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.program import DEFAULT_DEADLINE_S
from graphpart.planning.choices import Choices
from graphpart.planning.make import make_plan
from graphpart.planning.plan import Plan, memory_together
from graphpart.planning.reuse import reused
from graphpart.runtime.parameters.edge_guard import masks_of
from graphpart.runtime.parameters.model_state import ModelState
from graphpart.trace.origin import warn_user


class Planner:
    """Plans the first trace, and carries that decision over to later ones, so that parameters stay where they are.

    Args:
        cluster: the devices.
        choices: what the user decided.
        plan: a decision made before, for this model; None to make one.
    """

    def __init__(self, cluster: Cluster, choices: Choices, plan: Plan | None = None) -> None:
        self.cluster = cluster
        self.choices = choices
        self.decision = plan
        self._is_given = plan is not None

    @property
    def deadline_s(self) -> float:
        """How long a device waits for one message, in seconds."""
        return DEFAULT_DEADLINE_S if self.choices.deadline_s is None else self.choices.deadline_s

    def _made(self, graph: Graph, state: ModelState) -> Plan:
        return make_plan(graph, self.cluster, self.choices, masks=masks_of(graph, state.tensors))

    def _piece(self, graph: Graph, state: ModelState, beside: Sequence[Plan]) -> Plan:
        """A new plan for a part of a call, in the memory that the parts before leave it.

        It has at most as many microbatches as samples, and stays whole if it cannot be split as the user wants; the
        plan then says why.
        """
        masks = masks_of(graph, state.tensors)
        sizes = [graph.values[name].shape[dim] for name, dim in graph.sample_dims.items()]
        most = max(1, min(sizes, default=1))  # no samples, no microbatches
        choices = replace(self.choices, num_microbatches=min(self.choices.num_microbatches, most))
        left = _left_by(beside, self.cluster)
        try:
            plan = make_plan(graph, left, choices, masks=masks)
        except OutOfMemoryError as reason:
            if left is self.cluster:
                raise
            more = "the graphs of this call that run before it wait for backward, too, and fill the rest"
            raise OutOfMemoryError(f"{reason}; {more}") from reason
        except PlacementError as reason:
            single = replace(choices, strategy="single", strategy_options=None)
            plan = make_plan(graph, left, single, masks=masks)
            plan = replace(plan, notes=(*plan.notes, f"this graph of several runs on one device: {reason}"))
        return _at_home(replace(plan, cluster=self.cluster), state)

    def plan(self, graph: Graph, state: ModelState, *, beside: Sequence[Plan] | None = None) -> Plan:
        """The plan of a trace.

        Args:
            graph: the traced model.
            state: the model's tensors, for masks to be read, and their homes.
            beside: of a part of a call, the plans of the parts before it, whose parameters stay at home and whose
                memory is taken; None for a whole call.

        Raises:
            MicrobatchError: if it is the first, and its batch is empty.
            OutOfMemoryError: if nothing fits.
            PlanError: if the decision is another model's.
        """
        if self.decision is None or (beside is not None and not self._is_given):
            plan = self._made(graph, state) if beside is None else self._piece(graph, state, beside)
            self.decision = self.decision or plan
            return plan
        _check_parameters(self.decision, graph)
        return reused(self.decision, graph)


def _left_by(plans: Sequence[Plan], cluster: Cluster) -> Cluster:
    """The devices with the memory that some plans leave."""
    if not plans:
        return cluster
    held = memory_together(plans).devices
    devices = [
        replace(device, memory_bytes=max(device.memory_bytes - memory.total_bytes, 1))
        for device, memory in zip(cluster.devices, held, strict=True)
    ]
    return replace(cluster, devices=tuple(devices))


def _at_home(plan: Plan, state: ModelState) -> Plan:
    """The plan with parameters and buffers where they live already."""
    homes, shards = dict(plan.placement.homes), dict(plan.placement.shards)
    for source in plan.graph.sources:
        name = source.value.name
        parts = state.homes.get(name) if source.kind in ("parameter", "buffer") else None
        if parts is None:
            continue
        homes.pop(name, None)
        shards.pop(name, None)
        if len(parts) > 1:
            shards[name] = parts
        else:
            homes[name] = parts[0].device
    return replace(plan, placement=replace(plan.placement, homes=homes, shards=shards))


def _check_parameters(plan: Plan, graph: Graph) -> None:
    """Refuse a plan of another model, and warn where parameters had other sizes when it was made."""
    planned = {name: source.value.shape for source in plan.graph.parameters for name in source.names}
    missing = {name for source in graph.parameters for name in source.names} - planned.keys()
    if missing and graph.name != plan.graph.name:
        raise PlanError(
            f"the plan was made for {plan.graph.name}, which has no parameter {sorted(missing)[0]!r} of "
            f"{graph.name}; plan this model again"
        )
    for source in graph.parameters:
        shape = planned.get(source.names[0], source.value.shape)
        if shape != source.value.shape:
            warn_user(
                f"the plan was made for a {source.names[0]!r} of {list(shape)}, but it is "
                f"{list(source.value.shape)}; its forecasts are for the other sizes"
            )
            return
