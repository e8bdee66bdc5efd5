"""Cut a placed graph into nodes: every operator's tiles, and the bridge nodes between them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from graphpart.ir.graph import Graph, Operator, Ref, Source, map_refs, refs
from graphpart.ir.placement import Placement, Tile
from graphpart.ir.region import Intervals, Region
from graphpart.lower.bridges import Bridges
from graphpart.lower.parts import Need, Node, Part, Parts
from graphpart.lower.samples import Samples
from graphpart.lower.tiles import TileInTime, narrowed, replicate_constants, tiles_of
from graphpart.rules.local.calls import LocalCall, local_call
from graphpart.rules.local.wide import WIDE, is_widened, keeps_wide, widened


def instantiate(
    graph: Graph,
    placement: Placement,
    samples: Samples,
    microbatches: Sequence[Intervals],
    wire_dtype: Mapping[str, str],
) -> Parts:
    """Instantiate every tile of every operator, and bridge what they need to what holds it.

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
        self.parts: dict[str, Part] = {}
        self.nodes: list[Node] = []
        self.wide: dict[str, str] = {}  # value whose partial results are wider than it -> its dtype
        self.bridges = Bridges(self.parts, self._emit, wire_dtype, self.wide)
        self.needs: dict[str, dict[Need, None]] = {}
        self.calls: dict[tuple[str, int], tuple[LocalCall, list[Need]]] = {}  # by operator and tile
        self.met: dict[Need, str] = {}
        self.rides_on: dict[str, str] = {}
        self.partial: dict[str, list[TileInTime]] = {}  # partial value -> tiles that make it, a term each
        tiles = replicate_constants(graph, placement)
        self.tiles = self._tiles(tiles, samples, microbatches)

    def run(self) -> Parts:
        for op in self.graph.operators:
            self._collect_needs(op)
        wanted = [self._need_whole(ref.name, None) if isinstance(ref, Ref) else None for ref in self.graph.outputs]
        updates = [(source, self._need_whole(v, self._home(source))) for source, v in self.graph.mutations]
        for source in self.graph.sources:
            self._add_source(source)
        for op in self.graph.operators:
            made: dict[str, list[Part]] = {v.name: [] for v in op.results}
            for tile_index, tile in enumerate(self.tiles[op.name]):
                for part in self._instantiate(op, tile_index, tile):
                    made[part.value].append(part)
            for name, parts in made.items():
                self._supply(name, parts)
        outputs = tuple(self.met[n] if n is not None else None for n in wanted)
        mutations = tuple((source, self._at_home(source, self.met[need])) for source, need in updates)
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
        self._supply(value.name, holders)

    def _tiles(
        self, tiles: Mapping[str, tuple[Tile, ...]], samples: Samples, microbatches: Sequence[Intervals]
    ) -> dict[str, list[TileInTime]]:
        """Tiles of every operator in time; an operator that is linear in a partial value takes its parts one by one."""
        found: dict[str, list[TileInTime]] = {}
        partial = self.partial
        for op in self.graph.operators:
            carrier = self._carrier(op, partial, tiles)
            if carrier is not None:
                self.rides_on[op.name] = carrier
                (own,) = tiles[op.name]
                found[op.name] = [
                    TileInTime(own.device, microbatch=t.microbatch, term=t.term) for t in partial[carrier]
                ]
            else:
                found[op.name] = [
                    narrowed(op, tile, lambda name, device=tile.device: self._is_at_hand(name, device, found))  # type: ignore[misc]
                    for tile in tiles_of(op, tiles[op.name], samples, microbatches)
                ]
            made = found[op.name]
            if len({t.term for t in made}) > 1 and (is_widened(op) or (carrier is not None and carrier in self.wide)):
                self.wide.update((value.name, value.dtype) for value in op.results)
            # Only what is cut in nothing but terms can be taken one by one, each term once.
            if len({t.term for t in made}) == len(made) > 1 and all(len(t.term) == len(t.axes or t.term) for t in made):
                for value in op.results:
                    partial[value.name] = made
        return found

    def _is_at_hand(self, name: str, device: int, tiles: Mapping[str, Sequence[TileInTime]]) -> bool:
        """Whether a device makes or keeps a value, or is given it by the caller."""
        producer = self.graph.producer.get(name)
        if producer is not None:
            return any(tile.device == device for tile in tiles[producer.name])
        source = self.graph.source[name]
        return source.kind == "input" or any(s.device == device for s in self.placement.home(source.value))

    def _carrier(
        self, op: Operator, partial: Mapping[str, list[TileInTime]], tiles: Mapping[str, tuple[Tile, ...]]
    ) -> str | None:
        """The partial value an operator can take part by part, if it is linear in it and not cut itself."""
        names = [name for name in op.operands if name in partial]
        if not names or op.rule is None or len(tiles[op.name]) != 1 or tiles[op.name][0].axes or op.random:
            return None
        positions = tuple(i for i, name in enumerate(op.operands) if name in partial)
        times = {tuple(t.microbatch for t in partial[name]) for name in names}
        jointly = any(set(positions) == set(group) for group in op.rule.linear)
        wide = [name in self.wide for name in op.operands]
        if any(wide) and not keeps_wide(op, [len(self.graph.values[name].shape) for name in op.operands], wide):
            return None
        return names[0] if jointly and len(times) == 1 else None

    def _collect_needs(self, op: Operator) -> None:
        for tile_index, tile in enumerate(self.tiles[op.name]):
            regions = tuple(tile.needed(op, i, self.graph.values[name].shape) for i, name in enumerate(op.operands))
            call = local_call(op, tile.axes, regions)
            if tile.term and op.results[0].name in self.wide and is_widened(op):
                call = widened(op, call)
            needs = [self._need(op, tile_index, tile, op.operands[i], regions[i]) for i in call.operands]
            self.calls[op.name, tile_index] = (call, needs)
            for need in needs:
                self.needs.setdefault(need.value, {})[need] = None

    def _need(self, op: Operator, tile_index: int, tile: TileInTime, name: str, region: Region) -> Need:
        rides = op.name in self.rides_on and name in self.partial
        return Need(name, region, tile.device, _part_name(name, tile_index) if rides else "")

    def _need_whole(self, value: str, device: int | None) -> Need:
        if device is None:
            producer = self.graph.producer.get(value)
            device = self.tiles[producer.name][-1].device if producer else self._home(value)
        need = Need(value, Region.full(self.graph.values[value].shape), device)
        self.needs.setdefault(value, {})[need] = None
        return need

    def _home(self, source: str) -> int:
        return self.placement.home(self.graph.values[source])[0].device

    def _at_home(self, source: str, part: str) -> str:
        """What a buffer is overwritten with, on the device where the buffer is; inputs belong to the caller."""
        return part if self.graph.source[source].kind == "input" else self.bridges.bring(part, self._home(source))

    def _supply(self, value: str, holders: list[Part]) -> None:
        needs = list(self.needs.get(value, ()))
        if needs:
            self.met.update(self.bridges.supply(holders, needs))

    def _emit(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _instantiate(self, op: Operator, tile_index: int, tile: TileInTime) -> list[Part]:
        call, needs = self.calls.pop((op.name, tile_index))
        names = iter([self.met[need] for need in needs])
        args, kwargs = map_refs((call.args, dict(call.kwargs)), lambda _: Ref(next(names)))
        regions = [tile.made(op, i) for i in range(len(op.results))]
        single = len(self.tiles[op.name]) == 1
        made = [
            Part(
                name=value.name if single else _part_name(value.name, tile_index),
                value=value.name,
                region=region,
                dtype=WIDE if value.name in self.wide else value.dtype,
                device=tile.device,
                microbatch=tile.microbatch,
                node=len(self.nodes),
                term=tile.term,
                requires_grad=value.requires_grad,
            )
            for value, region in zip(op.results, regions, strict=True)
        ]
        self._emit(
            Node(
                operator=op.name,
                target=call.target,
                args=args,
                kwargs=kwargs,
                operands=tuple(ref.name for ref in refs((args, kwargs))),
                results=tuple(p.name for p in made),
                device=tile.device,
                microbatch=tile.microbatch,
                key=_key(op.name, regions) if op.random else None,
                share=tile.share(op),
            )
        )
        self.parts.update((p.name, p) for p in made)
        return made


def _part_name(value: str, tile_index: int) -> str:
    return f"{value}#{tile_index}"


def _key(operator: str, regions: Sequence[Region]) -> int:
    """A seed that depends on the operator and the region alone, so that equal regions draw equal numbers."""
    text = f"{operator} {' '.join(map(str, regions))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
