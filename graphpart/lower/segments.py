"""Group nodes into segments, and turn what passes between segments into wires and bridges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from graphpart.ir.graph import DTYPE_BYTES, Graph
from graphpart.ir.program import BRIDGE_TARGETS, Bridge, Program, Segment, Step, Wire
from graphpart.lower.collectives import name_collectives
from graphpart.lower.parts import Node, Part, Parts

SegmentKey = tuple[int, int | None, int]
"""Device, microbatch, level: nodes that agree on these run as one segment."""

_Key = tuple[int, int | None, str]
"""Device, microbatch, and the group that is run again for its backward (empty for none)."""


def assemble(
    graph: Graph,
    parts: Parts,
    num_devices: int,
    sample_sizes: Sequence[int],
    recompute: Mapping[str, str],
    deadline_s: float,
) -> Program:
    """Build the program: the largest segments that keep the graph of segments acyclic.

    A node's level is the longest chain of changes of (device, microbatch, recomputed group) before it. Every edge
    between different groups rises in level, so no cycle can arise; segments sorted by level are in an order that
    respects all edges.

    Args:
        graph: the graph that was cut.
        parts: its nodes.
        num_devices: devices of the cluster.
        sample_sizes: samples per microbatch.
        recompute: per operator that is run again for its backward, its group.
        deadline_s: how long a device waits for one message.
    """
    keys = _keys(parts, recompute)
    levels = _buckets(parts, keys, _levels(graph, parts, keys))
    members: dict[SegmentKey, list[Node]] = {}
    group_of: list[SegmentKey] = []
    for node, level in zip(parts.nodes, levels, strict=True):
        group = (node.device, node.microbatch, level)
        group_of.append(group)
        members.setdefault(group, []).append(node)
    wires = _wires(parts, group_of)
    order = sorted(members, key=lambda g: (g[2], -1 if g[1] is None else g[1], g[0]))
    again = {group for group, key in zip(group_of, keys, strict=True) if key[2]}
    segments = tuple(_segment(g, members[g], parts, wires, g in again, sample_sizes) for g in order)
    bridges = _bridges(segments, wires)
    return Program(
        graph=graph,
        num_devices=num_devices,
        num_microbatches=len(sample_sizes),
        sample_sizes=tuple(sample_sizes),
        wires=tuple(wires.values()),
        segments=segments,
        bridges=bridges,
        outputs=parts.outputs,
        mutations=parts.mutations,
        deadline_s=deadline_s,
        collectives=name_collectives(parts.exchanges, bridges),
    )


def segment_name(group: SegmentKey) -> str:
    """``d0.l2`` or, for a microbatch, ``d0.l2.m1``."""
    device, microbatch, level = group
    return f"d{device}.l{level}" + ("" if microbatch is None else f".m{microbatch}")


def _keys(parts: Parts, recompute: Mapping[str, str]) -> list[_Key]:
    """What nodes of one segment agree on; a part of a bridge is run again with the group that makes all it reads.

    So a value that other devices send parts of is put together once, and kept, where a group reads it.
    """
    keys: list[_Key] = []
    for node in parts.nodes:
        place = (node.device, node.microbatch)
        if node.target in BRIDGE_TARGETS:
            makers = {None if (n := parts.parts[name].node) is None else keys[n] for name in node.operands}
            maker = makers.pop() if len(makers) == 1 else None
            keys.append(maker if maker is not None and maker[:2] == place else (*place, ""))
        else:
            keys.append((*place, recompute.get(node.operator, "")))
    return keys


def _levels(graph: Graph, parts: Parts, key: Sequence[_Key]) -> list[int]:
    nodes, part_of = parts.nodes, parts.parts
    numbers: dict[_Key, int] = {}
    place = [numbers.setdefault(own, len(numbers)) for own in key]
    levels: list[int] = []
    waits_for_input: list[bool] = []
    reads_weights: list[bool] = []
    inputs = {s.value.name for s in graph.inputs}
    users: list[list[int]] = [[] for _ in nodes]
    for i, node in enumerate(nodes):
        level, waits, weights, here = 0, False, False, place[i]
        for name in node.operands:
            part = part_of[name]
            maker = part.node
            if maker is None:
                waits = waits or part.value in inputs
                weights = weights or part.origin == "parameter"
                continue
            users[maker].append(i)
            waits = waits or waits_for_input[maker]
            weights = weights or reads_weights[maker]
            after = levels[maker] + (place[maker] != here)
            if after > level:
                level = after
        levels.append(level)
        waits_for_input.append(waits)
        reads_weights.append(weights)
    # What depends on no input (masks, casts of weights) runs where it is first needed, not in a segment of its own;
    # so does what could run before the rest of its recomputed group, and what prepares an input for its own device's
    # work on the same samples (shifted labels).
    for i in reversed(range(len(nodes))):
        here, own = place[i], users[i]
        if not own:
            continue
        if waits_for_input[i]:
            is_early = key[i][2] and any(place[j] == here for j in own)
            if not is_early and (reads_weights[i] or any(place[j] != here for j in own)):
                continue
        levels[i] = max(levels[i], min([levels[j] - (here != place[j]) for j in own]))
    return levels


BUCKET_BYTES = 25 * 1000 * 1000
"""Bytes of shared parameters whose gradients leave together (PyTorch DDP's default: Li et al., VLDB 2020)."""


def _buckets(parts: Parts, keys: Sequence[_Key], levels: Sequence[int]) -> list[int]:
    """Levels with long segments cut where they have read a bucket of parameters that other devices read as well.

    Recomputed groups of one level get levels of their own.

    A segment's gradients are there when all of its backward has run; cut in buckets, those of its end travel to be
    summed while its beginning still computes.
    """
    readers: dict[str, set[int]] = {}
    for node in parts.nodes:
        for name in node.operands:
            part = parts.parts[name]
            if part.origin == "parameter" and part.requires_grad:
                readers.setdefault(name, set()).add(node.device)
    shared = {
        name: parts.parts[name].region.num_elements * DTYPE_BYTES[parts.parts[name].dtype]
        for name, devices in readers.items()
        if len(devices) > 1
    }
    filled: dict[tuple[_Key, int], tuple[int, int]] = {}  # per group, its bucket and the bytes in it
    seen: set[tuple[tuple[_Key, int], str]] = set()
    cut: list[tuple[int, int, str]] = []
    for node, key, level in zip(parts.nodes, keys, levels, strict=True):
        group = (key, level)
        bucket, size_bytes = filled.get(group, (0, 0))
        if size_bytes >= BUCKET_BYTES:
            bucket, size_bytes = bucket + 1, 0
        for name in node.operands:
            if name in shared and (group, name) not in seen:
                seen.add((group, name))
                size_bytes += shared[name]
        filled[group] = (bucket, size_bytes)
        cut.append((level, bucket, key[2]))
    number = {place: i for i, place in enumerate(sorted(set(cut)))}
    return [number[place] for place in cut]


def _wires(parts: Parts, group_of: Sequence[SegmentKey]) -> dict[str, Wire]:
    """Parts that leave the segment that makes them, and sources that are read."""
    crossing: dict[str, None] = {}
    for i, node in enumerate(parts.nodes):
        for name in node.operands:
            part = parts.parts[name]
            if part.node is None or group_of[part.node] != group_of[i]:
                crossing[name] = None
    for wanted in (*parts.outputs, *(name for _, name in parts.mutations)):
        if wanted is not None:
            crossing[wanted] = None
    return {name: _wire(parts.parts[name], group_of) for name in crossing}


def _wire(part: Part, group_of: Sequence[SegmentKey]) -> Wire:
    shape = part.region.shape
    return Wire(
        name=part.name,
        value=part.value,
        region=part.region,
        shape=shape,
        dtype=part.dtype,
        size_bytes=prod(shape) * DTYPE_BYTES[part.dtype],
        origin=part.origin,
        device=part.device,
        microbatch=part.microbatch,
        segment="" if part.node is None else segment_name(group_of[part.node]),
        differentiable=part.requires_grad,
    )


def _segment(
    group: SegmentKey,
    nodes: Sequence[Node],
    parts: Parts,
    wires: Mapping[str, Wire],
    recompute: bool,
    sample_sizes: Sequence[int],
) -> Segment:
    device, microbatch, level = group
    made = {name for node in nodes for name in node.results}
    inputs = dict.fromkeys(name for node in nodes for name in node.operands if name not in made)
    outputs = [name for node in nodes for name in node.results if name in wires]
    used = {name for node in nodes for name in node.operands} | set(outputs)
    steps = tuple(
        Step(n.operator, n.target, n.args, n.kwargs, tuple(r if r in used else "" for r in n.results), n.key, n.share)
        for n in nodes
    )
    fraction = 1.0 if microbatch is None else sample_sizes[microbatch] / sum(sample_sizes)
    return Segment(
        name=segment_name(group),
        device=device,
        microbatch=microbatch,
        level=level,
        steps=steps,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        reach=_reach(nodes, parts, list(inputs), outputs),
        fraction=fraction,
        recompute=recompute,
    )


def _reach(
    nodes: Sequence[Node], parts: Parts, inputs: Sequence[str], outputs: Sequence[str]
) -> dict[str, frozenset[str]]:
    """Per output, the inputs from which a gradient path leads to it."""
    part_of = parts.parts
    found = {name: 1 << i for i, name in enumerate(inputs) if part_of[name].requires_grad}  # a bit for each input
    for node in nodes:
        sources = 0
        for name in node.operands:
            sources |= found.get(name, 0)
        if sources:
            found.update((name, sources) for name in node.results if part_of[name].requires_grad)
    named: dict[int, frozenset[str]] = {}
    for name in outputs:
        if (bits := found.get(name, 0)) not in named:
            named[bits] = frozenset([name for i, name in enumerate(inputs) if bits >> i & 1])
    return {name: named[found[name]] for name in outputs if name in found}


def _bridges(segments: Sequence[Segment], wires: Mapping[str, Wire]) -> tuple[Bridge, ...]:
    """One message per wire and reading device. Inputs are at hand everywhere and need none."""
    seen: dict[tuple[str, int], Bridge] = {}
    for segment in segments:
        for name in segment.inputs:
            wire = wires[name]
            if wire.device != segment.device and wire.origin != "input" and (name, segment.device) not in seen:
                seen[name, segment.device] = Bridge(name, wire.device, segment.device, wire.size_bytes, len(seen))
    return tuple(seen.values())
