"""The decision: tiles of every operator's iteration space, and the device of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graphpart.errors import PlacementError
from graphpart.ir.graph import Graph
from graphpart.ir.region import Intervals


@dataclass(frozen=True)
class Tile:
    """A sub-space of one operator's iteration space, on one device.

    Attributes:
        device: index of the device in the cluster.
        axes: index set per cut axis; an axis not named is whole. ``{}`` is the whole operator.
    """

    device: int
    axes: Mapping[str, Intervals] = field(default_factory=dict)


@dataclass(frozen=True)
class Placement:
    """Where everything lives and runs.

    Attributes:
        tiles: per operator name, tiles that cover its iteration space.
        homes: per parameter, buffer or constant (value name), the index of the device that keeps it.
    """

    tiles: Mapping[str, tuple[Tile, ...]]
    homes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def whole(cls, graph: Graph, device_of: Mapping[str, int]) -> Placement:
        """Every operator whole on one device; each parameter at home with its first consumer.

        Args:
            graph: the traced model.
            device_of: device index per operator name.

        Raises:
            PlacementError: if an operator has no device, or an unknown operator is named.
        """
        missing = [op for op in graph.operators if op.name not in device_of]
        if missing:
            raise PlacementError(
                f"{len(missing)} operators have no device, first {missing[0]}; give every operator a device index"
            )
        unknown = [name for name in device_of if name not in graph.operator]
        if unknown:
            raise PlacementError(f"the placement names {unknown[0]!r}, which is no operator of {graph.name}")
        return cls({name: (Tile(device),) for name, device in device_of.items()}, default_homes(graph, device_of))

    def device(self, operator_name: str) -> int:
        """The device of an operator that is not cut."""
        return self.tiles[operator_name][0].device

    @property
    def devices(self) -> tuple[int, ...]:
        """Indices of the devices that run or keep something."""
        used = {tile.device for tiles in self.tiles.values() for tile in tiles}
        return tuple(sorted(used | set(self.homes.values())))

    def check(self, graph: Graph, num_devices: int) -> None:
        """Raise a :class:`PlacementError` that names the first thing out of order."""
        for op in graph.operators:
            for tile in self.tiles.get(op.name, ()):
                if not 0 <= tile.device < num_devices:
                    raise PlacementError(f"operator {op} is on device {tile.device}; there are {num_devices} devices")
                for axis in tile.axes:
                    legal = sorted(a for a in op.rule.extents if op.rule.can_cut(a)) if op.rule else []
                    if axis not in legal:
                        raise PlacementError(
                            f"operator {op} cannot be cut along {axis!r}; "
                            + (f"its axes that can be cut: {', '.join(legal)}" if legal else "it has to stay whole")
                        )
            if not self.tiles.get(op.name):
                raise PlacementError(f"operator {op} has no device")
        for name, home in self.homes.items():
            if name not in graph.source:
                raise PlacementError(f"the placement gives a home to {name!r}, which {graph.name} does not have")
            if not 0 <= home < num_devices:
                raise PlacementError(f"{name!r} is at home on device {home}; there are {num_devices} devices")


def default_homes(graph: Graph, device_of: Mapping[str, int]) -> dict[str, int]:
    """Each parameter, buffer and constant lives with its first consumer; a buffer with the operator that updates it."""
    homes = {}
    writers = {source: graph.producer[value].name for source, value in graph.mutations if value in graph.producer}
    for source in graph.sources:
        name = source.value.name
        if source.kind == "input":
            continue
        users = graph.consumers[name]
        if name in writers:
            homes[name] = device_of[writers[name]]
        else:
            homes[name] = device_of[users[0].name] if users else 0
    return homes
