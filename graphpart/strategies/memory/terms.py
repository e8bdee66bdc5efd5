"""The terms that a strategy counts with, besides the graph and the devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphpart.cost.memory.forecast import MemoryForecast, forecast_memory, usable_bytes
from graphpart.cost.storage import ADAMW_BYTES_PER_ELEMENT
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.strategies.cuts.neuron_groups import Masks
from graphpart.strategies.memory.in_flight import InFlight


@dataclass(frozen=True)
class Terms:
    """What a strategy counts with.

    Attributes:
        num_microbatches: parts of the batch, in time.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element; AdamW's by default.
        memory_reserve: part of each device's memory to leave free, in ``[0, 1)``.
        in_flight: what the step's schedule lets devices hold; all microbatches if None.
        masks: per buffer that masks a weight, where it is not zero.
    """

    num_microbatches: int = 1
    optimizer_bytes_per_element: float = ADAMW_BYTES_PER_ELEMENT
    memory_reserve: float = 0.0
    in_flight: InFlight | None = None
    masks: Masks | None = None

    @property
    def keywords(self) -> dict[str, Any]:
        """What a user's own strategy is told, as keywords."""
        return {
            "num_microbatches": self.num_microbatches,
            "optimizer_bytes_per_element": self.optimizer_bytes_per_element,
            "memory_reserve": self.memory_reserve,
        }

    def with_groups(self, groups: Mapping[str, str]) -> Terms:
        """These terms, where more groups run again for their backward, by operator name."""
        if self.in_flight is None:
            return self
        return replace(self, in_flight=replace(self.in_flight, groups={**self.in_flight.groups, **groups}))

    def limits_bytes(self, cluster: Cluster) -> list[float]:
        """Per device, the bytes that it may hold."""
        return [usable_bytes(device, self.memory_reserve) for device in cluster.devices]

    def memory(
        self, graph: Graph, placement: Placement, cluster: Cluster, in_flight: float | Sequence[float] | None = None
    ) -> MemoryForecast:
        """The forecast of memory per device.

        Args:
            graph: the traced model.
            placement: where everything runs and lives.
            cluster: the devices.
            in_flight: microbatches whose activations each device keeps at once; all by default.
        """
        return forecast_memory(
            graph,
            placement,
            len(cluster),
            num_microbatches=self.num_microbatches,
            in_flight=in_flight,
            optimizer_bytes_per_element=self.optimizer_bytes_per_element,
        )


DEFAULT_TERMS = Terms()
"""What strategies count with unless told otherwise: one microbatch, AdamW, nothing left free."""
