"""One decision for all traces of a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graphpart.errors import PlanError
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.program import DEFAULT_DEADLINE_S
from graphpart.planning.choices import Choices
from graphpart.planning.make import make_plan
from graphpart.planning.plan import Plan
from graphpart.planning.reuse import reused
from graphpart.runtime.parameters.edge_guard import masks_of
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

    @property
    def deadline_s(self) -> float:
        """How long a device waits for one message, in seconds."""
        return DEFAULT_DEADLINE_S if self.choices.deadline_s is None else self.choices.deadline_s

    def plan(self, graph: Graph, tensors: Mapping[str, Tensor]) -> Plan:
        """The plan of a trace.

        Args:
            graph: the traced model.
            tensors: the model's tensors by name, for masks to be read.

        Raises:
            MicrobatchError: if it is the first, and its batch is empty.
            PlanError: if the decision is another model's.
        """
        if self.decision is None:
            self.decision = make_plan(graph, self.cluster, self.choices, masks=masks_of(graph, tensors))
            return self.decision
        _check_parameters(self.decision, graph)
        return reused(self.decision, graph)


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
