"""Strategies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from graphpart.ir.placement import Placement
from graphpart.strategies.batch import batch
from graphpart.strategies.feature import feature
from graphpart.strategies.free import free
from graphpart.strategies.hybrid import hybrid
from graphpart.strategies.layer import layer
from graphpart.strategies.single import single
from graphpart.strategies.spatial import spatial

Strategy = Callable[..., Placement]
"""``strategy(graph, cluster, **options) -> Placement``; raises a ``PlacementError`` where it has no plan."""

STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "layer": layer,
        "single": single,
        "batch": batch,
        "feature": feature,
        "spatial": spatial,
        "hybrid": hybrid,
        "free": free,
    }
)
"""Every strategy that needs nothing but a graph and a cluster."""
