"""Cut a placed graph into nodes: every operator's tiles, and the bridge nodes between them."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from itertools import islice

from graphpart.ir.forms import forms
from graphpart.ir.graph import Graph, Operator, Ref, Source
from graphpart.ir.placement import Placement, Tile
from graphpart.ir.region import Intervals, Region
from graphpart.lower.bridges import Bridges
from graphpart.lower.cutting import Cutting, TimeTiles, Want, Wants, cutting_of, part_name
from graphpart.lower.parts import Need, Node, Part, Parts
from graphpart.lower.replay import Bridging, bridging_of
from graphpart.lower.samples import Samples
from graphpart.lower.tiles import TileInTime, narrowed, replicate_constants, tiles_of, windows_seen
from graphpart.rules.local.wide import WIDE, is_widened, keeps_wide


def instantiate(
    graph: Graph,
    placement: Placement,
    samples: Samples,
    microbatches: Sequence[Intervals],
    wire_dtype: Mapping[str, str],
) -> Parts:
    """Instantiate every tile of every operator, and bridge what they need to what holds it.

    What operators of one form do under like tiles is found out once, and so are the bridges of values that are held and
    wanted alike: repeated blocks, and stages of them, differ in the names of values and in where their devices begin.

    Args:
        graph: the graph, means over samples already exposed.
        placement: tiles per operator and homes of sources.
        samples: the graph's sample axis.
        microbatches: samples of each microbatch; one entry means no cut in time.
        wire_dtype: per value that is cast between devices, the type it crosses in.
    """
    return _Cutter(graph, placement, samples, microbatches, wire_dtype).run()


class _Cutter:
    def __init__(
        self,
        graph: Graph,
        placement: Placement,
        samples: Samples,
        microbatches: Sequence[Intervals],
        wire_dtype: Mapping[str, str],
    ) -> None:
        self.graph = graph
        self.placement = placement
        self.samples = samples
        self.microbatches = microbatches
        self.wire_dtype = wire_dtype
        self.forms = forms(graph)
        self.parts: dict[str, Part] = {}
        self.nodes: list[Node] = []
        self.wide: dict[str, str] = {}  # value whose partial results are wider than it -> its dtype
        self.bridges = Bridges(self.parts, self._emit, wire_dtype, self.wide)
        self.partial: dict[str, TimeTiles] = {}  # partial value -> tiles that make it, a term each
        self.rides: set[str] = set()  # operators that take a partial value's parts one by one
        self.first: dict[str, int] = {}  # the first device of each operator
        self.tiles = self._tiles(replicate_constants(graph, placement))
        self.cuttings: dict[str, Cutting] = {}
        # Per value, what its consumers want in their order, with the device that they count from; and where in that
        # each operand of an operator is.
        self.wants: dict[str, list[tuple[Wants, int]]] = {}
        self.places: dict[str, list[tuple[str, int]]] = {}
        self.whole: dict[tuple[int, ...], Wants] = {}
        self.bridgings: dict[Hashable, Bridging] = {}
        self.met: dict[str, list[list[str]]] = {}  # likewise, names of parts

    def run(self) -> Parts:
        self._collect_wants()
        wanted = [self._want_whole(ref.name, None) if isinstance(ref, Ref) else None for ref in self.graph.outputs]
        updates = [(source, self._want_whole(v, self._home(source))) for source, v in self.graph.mutations]
        for source in self.graph.sources:
            self._add_source(source)
        for op in self.graph.operators:
            made = self._instantiate(op)
            for index, (value, parts) in enumerate(zip(op.results, made, strict=True)):
                self._supply(value.name, parts, (self.cuttings[op.name], index), self.first[op.name])
        outputs = tuple(self._met(place) if place is not None else None for place in wanted)
        mutations = tuple((source, self._at_home(source, self._met(place))) for source, place in updates)
        return Parts(self.parts, tuple(self.nodes), outputs, mutations, tuple(self.bridges.exchanges))

    def _add_source(self, source: Source) -> None:
        """The parts of a source as their homes keep them."""
        value, whole = source.value, Region.full(source.value.shape)
        holders = []
        for shard in self.placement.home(value):
            name = value.name if shard.region == whole else f"{value.name}{shard.region}"
            holders.append(
                Part(
                    name=name,
                    value=value.name,
                    region=shard.region,
                    dtype=value.dtype,
                    device=shard.device,
                    microbatch=None,
                    node=None,
                    origin=source.kind,
                    requires_grad=value.requires_grad,
                )
            )
            self.parts[name] = holders[-1]
        first = min(part.device for part in holders)
        homes = tuple([(part.device - first, part.region) for part in holders])
        self._supply(value.name, holders, (source.kind, value.dtype, value.requires_grad, value.shape, homes), first)

    def _tiles(self, tiles: Mapping[str, tuple[Tile, ...]]) -> dict[str, TimeTiles]:
        """Tiles of every operator in time; an operator that is linear in a partial value takes its parts one by one."""
        found: dict[str, TimeTiles] = {}
        known: dict[Hashable, TimeTiles] = {}
        for op in self.graph.operators:
            own = tiles[op.name]
            first = self.first[op.name] = min(tile.device for tile in own)
            carrier = self._carrier(op, own)
            key: Hashable
            if carrier is not None:
                self.rides.add(op.name)
                key = self.partial[carrier]
            else:
                spaces = tuple([(t.device - first, tuple(t.axes.items()), tuple(t.reads.items())) for t in own])
                at_hand = tuple([self._is_at_hand(name, t.device, found) for name in windows_seen(op) for t in own])
                key = (self.forms[op.name], self.samples.axes.get(op.name), spaces, at_hand)
            if key not in known:
                known[key] = TimeTiles(tuple(self._tiles_in_time(op, own, carrier, found)))
            made = found[op.name] = known[key]
            if made.num_terms > 1 and (is_widened(op) or (carrier is not None and carrier in self.wide)):
                self.wide.update((value.name, value.dtype) for value in op.results)
            if made.are_terms:
                self.partial.update((value.name, made) for value in op.results)
        return found

    def _tiles_in_time(
        self, op: Operator, tiles: Sequence[Tile], carrier: str | None, found: Mapping[str, TimeTiles]
    ) -> list[TileInTime]:
        """The tiles of an operator and of all like it, on devices counted from the first."""
        if carrier is not None:
            return [TileInTime(0, microbatch=t.microbatch, term=t.term) for t in self.partial[carrier].tiles]
        first = self.first[op.name]
        return [
            narrowed(op, tile, lambda name, device=tile.device + first: self._is_at_hand(name, device, found))  # type: ignore[misc]
            for tile in tiles_of(op, tiles, self.samples, self.microbatches, first)
        ]

    def _is_at_hand(self, name: str, device: int, tiles: Mapping[str, TimeTiles]) -> bool:
        """Whether a device makes or keeps a value, or is given it by the caller."""
        producer = self.graph.producer.get(name)
        if producer is not None:
            return device - self.first[producer.name] in tiles[producer.name].devices
        source = self.graph.source[name]
        return source.kind == "input" or any(s.device == device for s in self.placement.home(source.value))

    def _carrier(self, op: Operator, tiles: Sequence[Tile]) -> str | None:
        """The partial value an operator can take part by part, if it is linear in it and not cut itself."""
        names = [name for name in op.operands if name in self.partial]
        if not names or op.rule is None or len(tiles) != 1 or tiles[0].axes or op.random:
            return None
        positions = tuple(i for i, name in enumerate(op.operands) if name in self.partial)
        times = {tuple(t.microbatch for t in self.partial[name].tiles) for name in names}
        jointly = any(set(positions) == set(group) for group in op.rule.linear)
        wide = [name in self.wide for name in op.operands]
        if any(wide) and not keeps_wide(op, [len(self.graph.values[name].shape) for name in op.operands], wide):
            return None
        return names[0] if jointly and len(times) == 1 else None

    def _collect_wants(self) -> None:
        known: dict[Hashable, Cutting] = {}
        for op in self.graph.operators:
            rides = tuple([op.name in self.rides and name in self.partial for name in op.operands])
            is_wide = bool(op.results) and op.results[0].name in self.wide
            key = (self.forms[op.name], self.tiles[op.name], rides, is_wide)
            if key not in known:
                shapes = [self.graph.values[name].shape for name in op.operands]
                known[key] = cutting_of(op, shapes, self.tiles[op.name], rides, is_wide)
            cutting = self.cuttings[op.name] = known[key]
            names = dict.fromkeys(op.operands)
            self.places[op.name] = [
                self._want(name, wants, self.first[op.name]) for name, wants in zip(names, cutting.wants, strict=True)
            ]

    def _want(self, value: str, wants: Wants, first_device: int) -> tuple[str, int]:
        """Note what a consumer wants; where its answer will be."""
        found = self.wants.setdefault(value, [])
        found.append((wants, first_device))
        return value, len(found) - 1

    def _want_whole(self, value: str, device: int | None) -> tuple[str, int]:
        if device is None:
            producer = self.graph.producer.get(value)
            device = (
                self.tiles[producer.name].tiles[-1].device + self.first[producer.name]
                if producer
                else self._home(value)
            )
        shape = self.graph.values[value].shape
        if shape not in self.whole:
            self.whole[shape] = Wants((Want(Region.full(shape), 0),))
        return self._want(value, self.whole[shape], device)

    def _met(self, place: tuple[str, int]) -> str:
        """The part that meets what is wanted whole."""
        value, consumer = place
        return self.met[value][consumer][0]

    def _home(self, source: str) -> int:
        return self.placement.home(self.graph.values[source])[0].device

    def _at_home(self, source: str, part: str) -> str:
        """What a buffer is overwritten with, on the device where the buffer is; inputs belong to the caller."""
        return part if self.graph.source[source].kind == "input" else self.bridges.bring(part, self._home(source))

    def _supply(self, value: str, holders: Sequence[Part], form: Hashable, first_device: int) -> None:
        """Meet what consumers want of a value.

        Args:
            value: its name.
            holders: the parts of it that exist.
            form: what these are but for the value's name, and where their devices begin.
            first_device: where that is.
        """
        consumers = self.wants.get(value, [])
        if not any(wants.wants for wants, _ in consumers):
            self.met[value] = [[] for _ in consumers]
            return
        wanted = tuple([(wants, first - first_device) for wants, first in consumers])
        key = (form, wanted, self.wire_dtype.get(value), self.wide.get(value))
        known = self.bridgings.get(key)
        if known is not None:
            self.met[value] = known.build(value, first_device, self.parts, self.nodes, self.bridges.exchanges)
            return
        needs = [
            [
                Need(value, want.region, want.device + first, value + want.part if want.part else "")
                for want in wants.wants
            ]
            for wants, first in consumers
        ]
        first_part, first_node, first_exchange = len(self.parts), len(self.nodes), len(self.bridges.exchanges)
        found = self.bridges.supply(holders, list(dict.fromkeys(need for own in needs for need in own)))
        self.met[value] = [[found[need] for need in own] for own in needs]
        self.bridgings[key] = bridging_of(
            value,
            first_device,
            holders,
            list(islice(reversed(self.parts.values()), len(self.parts) - first_part))[::-1],
            self.nodes[first_node:],
            first_node,
            self.bridges.exchanges[first_exchange:],
            self.met[value],
        )

    def _emit(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _instantiate(self, op: Operator) -> list[list[Part]]:
        """Nodes of an operator's tiles; per result, the parts that they make."""
        cutting, first = self.cuttings[op.name], self.first[op.name]
        met = [self.met[value][consumer] for value, consumer in self.places[op.name]]
        dtypes = [WIDE if value.name in self.wide else value.dtype for value in op.results]
        single = len(cutting.calls) == 1
        made: list[list[Part]] = [[] for _ in op.results]
        for index, (tile, own) in enumerate(zip(cutting.tiles.tiles, cutting.calls, strict=True)):
            names = tuple([met[operand][want] for operand, want in own.reads])
            args, kwargs = own.arguments(names)
            results = []
            for value, dtype, region, parts in zip(op.results, dtypes, own.made, made, strict=True):
                name = value.name if single else part_name(value.name, index)
                part = self.parts[name] = Part(
                    name,
                    value.name,
                    region,
                    dtype,
                    tile.device + first,
                    tile.microbatch,
                    len(self.nodes),
                    "segment",
                    tile.term,
                    value.requires_grad,
                )
                parts.append(part)
                results.append(name)
            self.nodes.append(
                Node(
                    op.name,
                    own.call.target,
                    args,
                    kwargs,
                    names,
                    tuple(results),
                    tile.device + first,
                    tile.microbatch,
                    _key(op.name, own.made) if op.random else None,
                    own.share,
                )
            )
        return made


def _key(operator: str, regions: Sequence[Region]) -> int:
    """A seed that depends on the operator and the region alone, so that equal regions draw equal numbers."""
    text = f"{operator} {' '.join(map(str, regions))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
