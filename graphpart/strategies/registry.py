"""Strategies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from graphpart.ir.placement import Placement
from graphpart.strategies.layer import layer
from graphpart.strategies.single import single

Strategy = Callable[..., Placement]
"""``strategy(graph, cluster, **options) -> Placement``; raises a ``PlacementError`` where it has no plan."""

STRATEGIES: Mapping[str, Strategy] = MappingProxyType({"layer": layer, "single": single})
"""Every strategy that needs nothing but a graph and a cluster."""
