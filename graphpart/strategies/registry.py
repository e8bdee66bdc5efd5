"""Strategies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from types import MappingProxyType
from typing import Any

from graphpart.errors import PlacementError
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


def check_options(strategy: Any, options: Any, strategies: Mapping[str, Strategy]) -> None:
    """Refuse options that are none, that no strategy is named for, or that the strategy does not have."""
    if options is None:
        return
    if not isinstance(options, Mapping):
        raise PlacementError(f"strategy_options={options!r}; give a mapping, such as {{'shard_parameters': True}}")
    if options and (strategy == "auto" or not (isinstance(strategy, str) or callable(strategy))):
        raise PlacementError(f"strategy_options {sorted(options)} need the name of the strategy they are for")
    if isinstance(strategy, str) and strategy in strategies:
        known = [n for n in signature(strategies[strategy]).parameters if n not in ("graph", "cluster")]
        for option in options:
            if option not in known:
                raise PlacementError(f"strategy {strategy!r} has no option {option!r}; it has {', '.join(known)}")
