"""Who holds what: devices, FLOPs, parameters and crossings of a placement, for pictures and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from graphpart.ir.graph import DTYPE_BYTES, Graph
from graphpart.ir.placement import Placement, Shard
from graphpart.ir.program import Bridge, Program


@dataclass(frozen=True, slots=True)
class Crossing:
    """A value that one device makes or keeps and another one reads.

    Attributes:
        value: name of the value.
        source: index of the device that has it.
        destination: index of the device that needs it.
        size_bytes: bytes that cross in one step, over all microbatches.
        parts: messages that carry them.
        parameter: whether it is a source of the graph, sent once a step, and no activation.
    """

    value: str
    source: int
    destination: int
    size_bytes: int
    parts: int = 1
    parameter: bool = False


def operator_devices(graph: Graph, placement: Placement) -> dict[str, tuple[int, ...]]:
    """Per operator name, the sorted indices of the devices that hold a tile of it."""
    return {op.name: tuple(sorted({t.device for t in placement.tiles[op.name]})) for op in graph.operators}


def device_flops(graph: Graph, placement: Placement, num_devices: int) -> list[float]:
    """Per device, FLOPs of one forward and backward pass; work done twice counts twice."""
    total = [0.0] * num_devices
    for op in graph.operators:
        for tile in placement.tiles[op.name]:
            total[tile.device] += (op.flops_forward + op.flops_backward) * tile.share(op)
    return total


def parameter_homes(graph: Graph, placement: Placement) -> dict[str, tuple[Shard, ...]]:
    """Per parameter, buffer or constant, who keeps which part."""
    return {s.value.name: placement.home(s.value) for s in graph.sources if s.kind != "input"}


def device_parameter_bytes(graph: Graph, placement: Placement, num_devices: int) -> list[int]:
    """Per device, bytes of the parameters at home there; a tied weight counts once."""
    total = [0] * num_devices
    homes = parameter_homes(graph, placement)
    for source in graph.parameters:
        for shard in homes.get(source.value.name, ()):
            total[shard.device] += shard.region.num_elements * DTYPE_BYTES[source.value.dtype]
    return total


def crossings(graph: Graph, placement: Placement) -> tuple[Crossing, ...]:
    """Every value that must change device, estimated from the placement alone.

    Whole values are assumed: one transfer per (value, source, destination), as lowering does for operators
    that are not cut. A value made in tiles counts as present wherever one of its tiles is, and values that
    are made from no source are made where they are read.
    """
    devices = operator_devices(graph, placement)
    homes = parameter_homes(graph, placement)
    found = []
    for name, value in graph.values.items():
        maker = graph.producer.get(name)
        have = devices[maker.name] if maker else tuple(dict.fromkeys(s.device for s in homes.get(name, ())))
        need = {d for user in graph.consumers[name] for d in devices[user.name]}
        if have and not (maker and maker.name in graph.unsourced):
            found += [
                Crossing(name, have[0], d, value.size_bytes, parameter=maker is None) for d in sorted(need - set(have))
            ]
    return tuple(found)


def short_target(target: str) -> str:
    """The part of an operator's target that a person would say: ``linear`` for ``aten.linear.default``."""
    parts = target.split(".")
    return parts[1] if len(parts) > 2 and parts[0] else parts[-1]


def by_pair(found: tuple[Crossing, ...]) -> Mapping[tuple[int, int], tuple[Crossing, ...]]:
    """Crossings grouped by (source, destination), in order of device."""
    grouped: dict[tuple[int, int], list[Crossing]] = {}
    for crossing in found:
        grouped.setdefault((crossing.source, crossing.destination), []).append(crossing)
    return {pair: tuple(grouped[pair]) for pair in sorted(grouped)}


def program_crossings(
    graph: Graph, program: Program, bridges: tuple[Bridge, ...] | None = None
) -> tuple[Crossing, ...]:
    """The program's forward messages, or other ``bridges`` of it, summed by (value, source, destination)."""
    size: Counter[tuple[str, int, int]] = Counter()
    parts: Counter[tuple[str, int, int]] = Counter()
    for bridge in program.bridges if bridges is None else bridges:
        key = (program.wire[bridge.wire].value, bridge.source, bridge.destination)
        size[key] += bridge.size_bytes
        parts[key] += 1
    return tuple(
        Crossing(*key, size[key], parts[key], key[0] in graph.source and graph.source[key[0]].kind != "input")
        for key in size
    )
