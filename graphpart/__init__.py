"""graphpart: split any PyTorch model over the devices at hand, and run it there as if nothing had happened."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphpart.api import partition, plan
    from graphpart.cost import make_cluster, preset
    from graphpart.errors import ArgumentError, GraphpartError
    from graphpart.ir.cluster import Cluster, Device, Link, SharedLink
    from graphpart.ir.degrees import Degrees, degrees
    from graphpart.ir.graph import Graph
    from graphpart.ir.placement import Placement, Shard, Tile
    from graphpart.ir.region import Intervals, Region
    from graphpart.ir.timeline import Timeline
    from graphpart.ir.topology import Switch
    from graphpart.module.calibrate import calibrate
    from graphpart.module.fused_update import TrainStep
    from graphpart.module.partitioned import PartitionedModule
    from graphpart.order import Async
    from graphpart.planning.choices import Choices
    from graphpart.planning.forecast import simulate
    from graphpart.planning.plan import Plan
    from graphpart.rules import register_rule
    from graphpart.strategies import colocate, keep_whole, pin, split

__version__ = "0.1.0"

# Names are imported when they are first used: planning a saved graph then loads no torch.
_HOME = {
    "ArgumentError": "graphpart.errors",
    "Async": "graphpart.order",
    "Choices": "graphpart.planning.choices",
    "Cluster": "graphpart.ir.cluster",
    "Degrees": "graphpart.ir.degrees",
    "Device": "graphpart.ir.cluster",
    "Graph": "graphpart.ir.graph",
    "GraphpartError": "graphpart.errors",
    "Intervals": "graphpart.ir.region",
    "Link": "graphpart.ir.cluster",
    "PartitionedModule": "graphpart.module.partitioned",
    "Placement": "graphpart.ir.placement",
    "Plan": "graphpart.planning.plan",
    "Region": "graphpart.ir.region",
    "Shard": "graphpart.ir.placement",
    "SharedLink": "graphpart.ir.cluster",
    "Switch": "graphpart.ir.topology",
    "Tile": "graphpart.ir.placement",
    "Timeline": "graphpart.ir.timeline",
    "TrainStep": "graphpart.module.fused_update",
    "calibrate": "graphpart.module.calibrate",
    "colocate": "graphpart.strategies",
    "degrees": "graphpart.ir.degrees",
    "keep_whole": "graphpart.strategies",
    "make_cluster": "graphpart.cost",
    "partition": "graphpart.api",
    "pin": "graphpart.strategies",
    "plan": "graphpart.api",
    "preset": "graphpart.cost",
    "register_rule": "graphpart.rules",
    "simulate": "graphpart.planning.forecast",
    "split": "graphpart.strategies",
}

__all__ = [
    "ArgumentError",
    "Async",
    "Choices",
    "Cluster",
    "Degrees",
    "Device",
    "Graph",
    "GraphpartError",
    "Intervals",
    "Link",
    "PartitionedModule",
    "Placement",
    "Plan",
    "Region",
    "Shard",
    "SharedLink",
    "Switch",
    "Tile",
    "Timeline",
    "TrainStep",
    "calibrate",
    "colocate",
    "degrees",
    "keep_whole",
    "make_cluster",
    "partition",
    "pin",
    "plan",
    "preset",
    "register_rule",
    "simulate",
    "split",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'graphpart' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
