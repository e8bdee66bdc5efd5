"""How operators of one form are cut: what their tiles call, read and make, whatever their values are called.

Devices are counted from an operator's first, so that what one stage of a pipeline does serves for the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graphpart.ir.graph import Operator, Ref, map_refs
from graphpart.ir.region import Region
from graphpart.lower.tiles import TileInTime
from graphpart.rules.local.calls import LocalCall, local_call
from graphpart.rules.local.wide import is_widened, widened


@dataclass(frozen=True, eq=False)
class TimeTiles:
    """The tiles of operators of one form; alike only to itself.

    Attributes:
        tiles: by microbatch, and then in the placement's order; their devices count from the operator's first.
    """

    tiles: tuple[TileInTime, ...]

    @cached_property
    def num_terms(self) -> int:
        """How many partial results they make; 1 where they make parts of the results."""
        return len({tile.term for tile in self.tiles})

    @cached_property
    def are_terms(self) -> bool:
        """Whether they are cut in nothing but terms, each once: then they can be taken one by one."""
        return self.num_terms == len(self.tiles) > 1 and all(len(t.term) == len(t.axes or t.term) for t in self.tiles)

    @cached_property
    def devices(self) -> frozenset[int]:
        """Where they are."""
        return frozenset(tile.device for tile in self.tiles)


@dataclass(frozen=True, slots=True)
class Want:
    """What a consumer wants of a value, as a :class:`~graphpart.lower.parts.Need` of some value will have it.

    Attributes:
        region: which part.
        device: counted from the consumer's first.
        part: the end of the name of the one partial result wanted as it is, if one is.
    """

    region: Region
    device: int
    part: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Wants:
    """All that operators of one form want of one operand, each once; alike only to itself."""

    wants: tuple[Want, ...]


@dataclass(frozen=True, slots=True)
class TileCall:
    """What one tile does.

    Attributes:
        call: its call.
        reads: for each reference of the call, which operand it is, of those told apart, and which of its wants.
        made: the region of every result.
        share: the part of the operator's work that it does.
        slots: positions of the references in the arguments; none where some are nested.
    """

    call: LocalCall
    reads: tuple[tuple[int, int], ...]
    made: tuple[Region, ...]
    share: float
    slots: tuple[int, ...] | None

    def arguments(self, names: Sequence[str]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments of the call on parts of these names."""
        if self.slots is None:
            left = iter(names)
            args, kwargs = map_refs((self.call.args, dict(self.call.kwargs)), lambda _: Ref(next(left)))
            return args, kwargs
        filled = list(self.call.args)
        for at, name in zip(self.slots, names, strict=True):
            filled[at] = Ref(name)
        return tuple(filled), self.call.kwargs


@dataclass(frozen=True, slots=True, eq=False)
class Cutting:
    """How operators of one form are cut; alike only to itself.

    Attributes:
        tiles: their tiles.
        calls: per tile, what it does.
        wants: per operand, of those told apart, what is wanted of it.
    """

    tiles: TimeTiles
    calls: tuple[TileCall, ...]
    wants: tuple[Wants, ...]


def part_name(value: str, tile_index: int) -> str:
    """What the part of a value is called that one of several tiles makes."""
    return f"{value}#{tile_index}"


def cutting_of(
    op: Operator, shapes: Sequence[tuple[int, ...]], tiles: TimeTiles, rides: Sequence[bool], is_wide: bool
) -> Cutting:
    """Find out how an operator is cut, and with it all of its form.

    Args:
        op: the operator.
        shapes: of its operands.
        tiles: its tiles.
        rides: per operand, whether each tile takes the partial result with its own number.
        is_wide: whether partial results are wider than the result.
    """
    at = {name: i for i, name in enumerate(dict.fromkeys(op.operands))}
    wants: list[dict[Want, int]] = [{} for _ in at]
    calls, known = [], {}
    for index, tile in enumerate(tiles.tiles):
        space = (tuple(tile.axes.items()), tuple(tile.reads.items()), bool(tile.term))
        if space not in known:  # of replicas
            known[space] = _local(op, shapes, tile, is_wide)
        regions, call, made, share, slots = known[space]
        reads = []
        for i in call.operands:
            operand = at[op.operands[i]]
            want = Want(regions[i], tile.device, part_name("", index) if rides[i] else "")
            reads.append((operand, wants[operand].setdefault(want, len(wants[operand]))))
        calls.append(TileCall(call, tuple(reads), made, share, slots))
    return Cutting(tiles, tuple(calls), tuple(Wants(tuple(found)) for found in wants))


def _local(
    op: Operator, shapes: Sequence[tuple[int, ...]], tile: TileInTime, is_wide: bool
) -> tuple[tuple[Region, ...], LocalCall, tuple[Region, ...], float, tuple[int, ...] | None]:
    """What a tile reads, calls and makes, its share of the work, and the slots of its call."""
    regions = tuple([tile.needed(op, i, shape) for i, shape in enumerate(shapes)])
    call = local_call(op, tile.axes, regions)
    if tile.term and is_wide and is_widened(op):
        call = widened(op, call)
    made = tuple([tile.made(op, i) for i in range(len(op.results))])
    slots = tuple([i for i, argument in enumerate(call.args) if isinstance(argument, Ref)])
    return regions, call, made, tile.share(op), slots if len(slots) == len(call.operands) else None
