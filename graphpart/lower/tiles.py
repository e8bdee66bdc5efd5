"""Cut operators into tiles: in space as the placement says, and in time by microbatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphpart.errors import PlacementError
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement, Tile
from graphpart.ir.region import Intervals, Region
from graphpart.lower.samples import Samples


@dataclass(frozen=True, slots=True)
class TileInTime:
    """One tile of an operator, for one microbatch.

    Attributes:
        device: index of its device.
        microbatch: which microbatch, or None if the step computes it once.
        axes: index set per cut axis.
    """

    device: int
    microbatch: int | None
    axes: Mapping[str, Intervals]

    def region_of_result(self, op: Operator, index: int) -> Region:
        """The region of a result that the tile makes (all of it for an operator without a rule)."""
        if op.rule is None:
            return Region.full(op.results[index].shape)
        return op.rule.region(op.rule.results[index], self.axes)

    def region_of_operand(self, op: Operator, index: int, shape: Sequence[int]) -> Region:
        """The region of an operand that the tile needs."""
        if op.rule is None:
            return Region.full(shape)
        return op.rule.region(op.rule.operands[index], self.axes)

    def is_partial(self, op: Operator) -> bool:
        """Whether its results have to be summed with those of other tiles."""
        return op.rule is not None and any(axis in op.rule.sums for axis in self.axes)


def tiles_of(
    op: Operator, tiles: Sequence[Tile], samples: Samples, microbatches: Sequence[Intervals]
) -> list[TileInTime]:
    """All tiles of an operator, by microbatch and then in the placement's order.

    Raises:
        PlacementError: if the placement cuts the sample axis that microbatches cut already.
    """
    axis = samples.axes.get(op.name) if len(microbatches) > 1 else None
    if axis is None:
        return [TileInTime(tile.device, None, tile.axes) for tile in tiles]
    if any(axis.axis in tile.axes for tile in tiles):
        raise PlacementError(
            f"operator {op} is cut along its samples ({axis.axis!r}) in space, and in time by "
            f"{len(microbatches)} microbatches; use num_microbatches=1 with this placement"
        )
    return [
        TileInTime(tile.device, m, {**tile.axes, axis.axis: axis.position.expand(part, samples.batch)})
        for m, part in enumerate(microbatches)
        for tile in tiles
    ]


def replicate_constants(graph: Graph, placement: Placement) -> dict[str, tuple[Tile, ...]]:
    """Tiles with every operator that depends on nothing put on each device that reads it.

    Masks and position ids are cheap, deterministic and stateless: computing them again beats sending them.
    """
    constant: set[str] = set()
    for op in graph.operators:
        if (
            not op.random
            and op.results
            and all(name in graph.producer and graph.producer[name].name in constant for name in op.operands)
        ):
            constant.add(op.name)
    tiles = dict(placement.tiles)
    for op in reversed(graph.operators):
        if op.name not in constant:
            continue
        readers = {t.device for v in op.results for user in graph.consumers[v.name] for t in tiles[user.name]}
        if readers:
            tiles[op.name] = tuple(Tile(device) for device in sorted(readers))
    return tiles
