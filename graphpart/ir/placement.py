"""The decision: tiles of every operator's iteration space, and the device of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import prod
from operator import or_

from graphpart.errors import PlacementError
from graphpart.ir.graph import Graph, Operator, Value
from graphpart.ir.region import Intervals, Region


@dataclass(frozen=True)
class Tile:
    """A sub-space of one operator's iteration space, on one device.

    Attributes:
        device: index of the device in the cluster.
        axes: index set per cut axis; an axis not named is whole. ``{}`` is the whole operator.
        reads: per contracted axis, the only indices that the tile has to read, because a masked weight is zero at all
            others: what a group of neurons has edges to.
    """

    device: int
    axes: Mapping[str, Intervals] = field(default_factory=dict)
    reads: Mapping[str, Intervals] = field(default_factory=dict)

    def share(self, op: Operator) -> float:
        """The part of an operator's work that its tile does: its part of the space, less what is masked."""
        if op.rule is None:
            return 1.0
        extents = op.rule.extents
        return prod(len(part) / max(extents[axis], 1) for axis, part in {**self.axes, **self.reads}.items())

    def made(self, op: Operator, index: int) -> Region:
        """The region of one of an operator's results that its tile makes; all of it for an operator without a rule."""
        if op.rule is None:
            return Region.full(op.results[index].shape)
        return op.rule.region(op.rule.results[index], self.axes)

    def needed(self, op: Operator, index: int, shape: Sequence[int]) -> Region:
        """The region of one of an operator's operands, of this shape, that its tile reads."""
        if op.rule is None:
            return Region.full(shape)
        return op.rule.region(op.rule.operands[index], {**self.axes, **self.reads})

    def region(self, op: Operator, value: Value) -> Region:
        """The region of a value that an operator's tile makes or reads; empty where a window lies outside of it."""
        whole = Region.full(value.shape)
        if op.rule is None or not (self.axes or self.reads):
            return whole
        for index, result in enumerate(op.results):
            if result.name == value.name:
                return self.made(op, index)
        found = [self.needed(op, i, value.shape) for i, name in enumerate(op.operands) if name == value.name]
        return reduce(or_, found) if found else whole


@dataclass(frozen=True)
class Shard:
    """A region of a parameter, on the device that keeps it.

    Attributes:
        device: index of the device in the cluster.
        region: the part of the parameter.
    """

    device: int
    region: Region


@dataclass(frozen=True)
class Placement:
    """Where everything lives and runs.

    Attributes:
        tiles: per operator name, tiles of its iteration space. Tiles are equal (replicas) or disjoint, and cover it.
        homes: per parameter, buffer or constant (value name), the index of the device that keeps it.
        shards: per parameter whose home is cut over several devices, its parts: disjoint, covering it. It has no
            entry in ``homes``.
        recompute: per operator that is run again for its backward, the name of its group: operators of one group keep
            nothing for their backward but what the group reads.
    """

    tiles: Mapping[str, tuple[Tile, ...]]
    homes: Mapping[str, int] = field(default_factory=dict)
    shards: Mapping[str, tuple[Shard, ...]] = field(default_factory=dict)
    recompute: Mapping[str, str] = field(default_factory=dict)

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

    def home(self, value: Value) -> tuple[Shard, ...]:
        """The parts of a parameter, buffer or constant, and who keeps each; device 0 where nothing is said."""
        return self.shards.get(value.name) or (Shard(self.homes.get(value.name, 0), Region.full(value.shape)),)

    @property
    def devices(self) -> tuple[int, ...]:
        """Indices of the devices that run or keep something."""
        used = {tile.device for tiles in self.tiles.values() for tile in tiles}
        used |= {shard.device for shards in self.shards.values() for shard in shards}
        return tuple(sorted(used | set(self.homes.values())))

    def check(self, graph: Graph, num_devices: int) -> None:
        """Raise a :class:`PlacementError` that names the first thing out of order."""
        legal: set[object] = set()  # cuts that were looked at, with their rules
        for op in graph.operators:
            tiles = self.tiles.get(op.name, ())
            if not tiles:
                raise PlacementError(f"operator {op} has no device")
            _check_devices(op, tiles, num_devices)
            cut = (op.rule, tuple([(tuple(tile.axes.items()), tuple(tile.reads.items())) for tile in tiles]))
            if cut not in legal:
                _check_cut(op, tiles)
                legal.add(cut)
        for name, home in self.homes.items():
            if name not in graph.source:
                raise PlacementError(f"the placement gives a home to {name!r}, which {graph.name} does not have")
            if not 0 <= home < num_devices:
                raise PlacementError(f"{name!r} is at home on device {home}; there are {num_devices} devices")
        for name, shards in self.shards.items():
            if name not in graph.source:
                raise PlacementError(f"the placement cuts the home of {name!r}, which {graph.name} does not have")
            _check_shards(graph.source[name].value, shards, num_devices)
        for name in self.recompute:
            if name not in graph.operator:
                raise PlacementError(f"the placement recomputes {name!r}, which is no operator of {graph.name}")


def check_tiles(op: Operator, tiles: Sequence[Tile], num_devices: int) -> None:
    """Raise a :class:`PlacementError` unless these tiles are a legal cut of the operator.

    They have to be on devices that exist, along axes that can be cut, in runs where windows overlap, equal or
    disjoint, and cover the operator's iteration space.
    """
    _check_devices(op, tiles, num_devices)
    _check_cut(op, tiles)


def _check_devices(op: Operator, tiles: Sequence[Tile], num_devices: int) -> None:
    for tile in tiles:
        if not 0 <= tile.device < num_devices:
            raise PlacementError(f"operator {op} is on device {tile.device}; there are {num_devices} devices")


def _check_cut(op: Operator, tiles: Sequence[Tile]) -> None:
    for tile in tiles:
        for axis, part in tile.axes.items():
            _check_axis(op, axis, part)
        for axis, part in tile.reads.items():
            sums = sorted(op.rule.sums) if op.rule else []
            if axis not in sums or axis in tile.axes or not part:
                raise PlacementError(
                    f"operator {op} has a tile that reads only {axis}={part}; that takes a contracted axis that is not "
                    f"cut itself: {', '.join(sums) or 'it has none'}"
                )
    distinct = list(dict.fromkeys(tuple(sorted(tile.axes.items())) for tile in tiles))
    if len(distinct) == 1 and not distinct[0]:
        return
    assert op.rule is not None
    spaces = [dict(axes) for axes in distinct]
    for i, one in enumerate(spaces if not _is_grid(spaces) else ()):
        for other in spaces[:i]:
            if all(one[a] & other[a] for a in one.keys() & other.keys()):
                raise PlacementError(
                    f"two tiles of operator {op} overlap: {_tile_text(one)} and {_tile_text(other)}; make them equal "
                    "(replicas) or disjoint"
                )
    extents = op.rule.extents
    covered = sum(prod(len(space[a]) if a in space else n for a, n in extents.items()) for space in spaces)
    if covered != prod(extents.values()):
        raise PlacementError(
            f"the tiles of operator {op} leave a part of it out: {'; '.join(map(_tile_text, spaces))} of "
            f"{', '.join(f'{a}={extents[a]}' for a in dict.fromkeys(a for s in spaces for a in s))}"
        )


def _is_grid(spaces: Sequence[Mapping[str, Intervals]]) -> bool:
    """Whether different spaces are cut along the same axes, each of them into parts that are apart: none overlap."""
    axes = spaces[0].keys()
    if any(space.keys() != axes for space in spaces):
        return False
    parts = [dict.fromkeys(space[axis] for space in spaces) for axis in axes]
    return all(sum(map(len, own)) == len(Intervals.of([run for part in own for run in part.runs])) for own in parts)


def _check_axis(op: Operator, axis: str, part: Intervals) -> None:
    legal = op.rule.cuttable if op.rule else ()
    if op.rule is None or axis not in legal:
        raise PlacementError(
            f"operator {op} cannot be cut along {axis!r}; "
            + (f"its axes that can be cut: {', '.join(legal)}" if legal else f"it has to stay whole ({_why(op)})")
        )
    if not part or not part <= Intervals.full(op.rule.extents[axis]):
        raise PlacementError(
            f"operator {op} has a tile {axis}={part}; give indices from 0 to {op.rule.extents[axis] - 1}, at least one"
        )
    if len(part.runs) > 1 and op.rule.needs_runs(axis):
        raise PlacementError(
            f"operator {op} has a tile {axis}={part} of several runs, but its windows along {axis!r} overlap; "
            f"give one run, such as {part.runs[0][0]}:{part.runs[-1][1]}"
        )


def _why(op: Operator) -> str:
    if op.rule is None:
        return op.note or "it has no axis rule"
    return "every axis has extent 1 or is needed whole"


def _tile_text(axes: Mapping[str, Intervals]) -> str:
    return " ".join(f"{axis}={part}" for axis, part in axes.items()) or "whole"


def _check_shards(value: Value, shards: Sequence[Shard], num_devices: int) -> None:
    whole = Region.full(value.shape)
    for i, shard in enumerate(shards):
        if not 0 <= shard.device < num_devices:
            raise PlacementError(
                f"a part of {value.name!r} is on device {shard.device}; there are {num_devices} devices"
            )
        if len(shard.region.dims) != len(value.shape) or not shard.region or not shard.region <= whole:
            raise PlacementError(f"the part {shard.region} of {value.name!r} does not lie in {list(value.shape)}")
        if any(shard.region & other.region for other in shards[:i]):
            raise PlacementError(f"two parts of the home of {value.name!r} overlap at {shard.region}")
    if sum(shard.region.num_elements for shard in shards) != value.num_elements:
        raise PlacementError(f"the parts of the home of {value.name!r} do not cover its {list(value.shape)}")


def default_homes(graph: Graph, device_of: Mapping[str, int]) -> dict[str, int]:
    """Each parameter, buffer and constant lives with its first consumer; a buffer with the operator that updates it.

    What nothing reads lives on device 0. In place of a device, ``device_of`` may give a stage, or another place.
    """
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
