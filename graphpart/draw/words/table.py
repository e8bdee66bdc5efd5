"""A plan in words: who does what, what crosses, what else was considered, and what had to stay whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from graphpart.draw.words.cuts import collectives, cuts
from graphpart.draw.words.groups import DeviceGroups, group_devices
from graphpart.draw.words.links import links
from graphpart.draw.words.modules import compress, module_ranges
from graphpart.draw.words.share import (
    Crossing,
    by_pair,
    crossings,
    device_flops,
    device_parameter_bytes,
    operator_devices,
    program_crossings,
)
from graphpart.draw.words.text import display_width, plain, shorten, table
from graphpart.ir.cluster import Cluster
from graphpart.ir.degrees import Degrees
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement
from graphpart.ir.program import Backward, Program
from graphpart.ir.quantities import format_bytes, format_count, format_flops, format_time
from graphpart.ir.timeline import Timeline

WIDTH = 100
"""Most columns of a line."""

MOST_ROWS = 12
"""Candidates, bridges or operators beyond this number are only counted."""


def explain(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    program: Program | None = None,
    memory: Mapping[int, Any] | None = None,
    candidates: Iterable[Any] = (),
    timeline: Timeline | None = None,
    notes: Iterable[str] = (),
    *,
    backward: Backward | None = None,
    reruns: Iterable[Any] = (),
    schedule: str = "",
    degrees: Degrees | None = None,
) -> str:
    """A plan in words, for a terminal: at most 100 columns.

    Args:
        graph: the traced model.
        placement: where its operators run.
        cluster: the devices.
        program: the lowered program; its messages are counted instead of an estimate from the placement.
        memory: per device index, an object whose ``total_bytes`` is the memory forecast.
        candidates: plans that were compared, with ``strategy``, ``step_s`` and ``reason``.
        timeline: the forecast of a step.
        notes: sentences to add at the end.
        backward: the program's backward pass; without it, every differentiable message counts as mirrored.
        reruns: per device that runs modules again for their backward, what that costs and saves.
        schedule: the order of the tasks, in words.
        degrees: what the placement was made to; tables are by its stages then.
    """
    groups = group_devices(placement, cluster, degrees)
    sections = (
        _header(graph, placement, cluster, program, timeline, memory),
        "" if degrees is None else _degrees(degrees, cluster),
        _devices(graph, placement, cluster, memory, timeline, groups),
        cuts(graph, placement, cluster, groups if degrees is not None else None),
        schedule,
        _bridges(graph, placement, cluster, program, backward, groups),
        collectives(program, backward),
        links(timeline),
        _reruns(tuple(reruns), cluster),
        _candidates(tuple(candidates)),
        _whole(graph),
        "\n".join(_wrapped(f"Note: {note}") for note in notes),
    )
    return "\n\n".join(section for section in sections if section)


def _header(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    program: Program | None,
    timeline: Timeline | None,
    memory: Mapping[int, Any] | None,
) -> str:
    used = [cluster.devices[i] for i in placement.devices]
    kinds = list(dict.fromkeys(d.kind for d in used))
    named = ", ".join(f"{sum(d.kind == kind for d in used)} × {kind}" for kind in kinds)
    idle = f" of {len(cluster)}" if len(used) < len(cluster) else ""
    facts = [
        f"{len(graph.operators)} operators",
        f"{format_count(graph.num_parameters)} parameters",
        f"{format_flops(graph.flops)} a step",
        f"{len(used)}{idle} device{'s' if len(cluster) > 1 else ''} ({named})",
    ]
    lines = [f"{graph.name}: {', '.join(facts)}"]
    forecast = []
    if program is not None and program.num_microbatches > 1:
        forecast.append(f"{program.num_microbatches} microbatches")
    if timeline is not None and timeline.events:
        forecast += [f"forecast {format_time(timeline.makespan_s)} a step", f"{100 * timeline.bubble:.0f} % idle"]
    lines += [", ".join(forecast)] if forecast else []
    if memory:
        fullest = max(memory, key=lambda i: memory[i].total_bytes / cluster.devices[i].memory_bytes)
        filled, device = memory[fullest].total_bytes, cluster.devices[fullest]
        lines.append(f"fullest device {device.name}: {format_bytes(filled)} of {format_bytes(device.memory_bytes)}")
    return "\n".join(_wrapped(line) for line in lines)


def _degrees(degrees: Degrees, cluster: Cluster) -> str:
    """What degrees say, and which devices are whose."""
    each = [f"{degrees.pp} stages (pp)"] * (degrees.pp > 1)
    each += [f"of {degrees.vp} intervals of layers each (vp)"] * (degrees.vp > 1)
    each += [f"{degrees.dp} replicas (dp)"] * (degrees.dp > 1)
    each += [f"{degrees.cp} blocks of positions (cp)"] * (degrees.cp > 1)
    each += [f"{degrees.tp} parts of features (tp)"] * (degrees.tp > 1)
    each += ["positions cut between them (sp)"] * degrees.sp
    each += ["parameters spread over replicas (zero)"] * (degrees.zero > 0)
    stage = degrees.stages()[0].size
    order = cluster.topology.neighbours_first()
    names = [cluster.devices[order[place]].name for place in (0, degrees.tp - 1, stage - 1)]
    where = [f"{names[0]} to {names[1]} share features"] * (degrees.tp > 1)
    where += [f"{names[0]} to {names[2]} are stage 0"] * (degrees.pp > 1 and stage > 1)
    return _wrapped("; ".join([f"Degrees {degrees}: {', '.join(each) or 'one device'}", *where]))


def _devices(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    memory: Mapping[int, Any] | None,
    timeline: Timeline | None,
    groups: DeviceGroups | None,
) -> str:
    members = groups.members if groups else tuple((i,) for i in range(len(cluster)))
    if groups:
        placement, cluster = groups.placement(placement), groups.cluster
    devices = operator_devices(graph, placement)
    flops = device_flops(graph, placement, len(cluster))
    parameters = device_parameter_bytes(graph, placement, len(cluster))
    num_operators = Counter(device for where in devices.values() for device in where)
    total = sum(flops) or 1.0
    headers = ["device", "modules", "ops", "FLOPs", "parameters"]
    headers += ["busiest" if groups else "busy"] * (timeline is not None)
    headers += ["fullest" if groups else "memory"] * (memory is not None)
    rows = []
    for i in placement.devices:
        row = [
            shorten(cluster.devices[i].name, 14),
            _cell(module_ranges(graph, devices, i, graph.unsourced)),
            str(num_operators[i]),
            f"{100 * flops[i] / total:.0f} %",
            format_bytes(parameters[i]),
        ]
        if timeline is not None:
            busy_s = [timeline.busy_s[d] for d in members[i] if d < timeline.num_devices]
            row.append(format_time(max(busy_s)) if busy_s else "–")
        if memory is not None:
            used_bytes = [memory[d].total_bytes for d in members[i] if d in memory]
            row.append(format_bytes(max(used_bytes)) if used_bytes else "–")
        rows.append(row)
    title = "Devices in groups; busiest and fullest are each group's extremes\n" if groups else ""
    return title + table(headers, rows, "ll" + "r" * 5)


def _cell(names: Sequence[str], width: int = 36, lines: int = 4) -> str:
    """Names on a few short lines; the last one says how many more there are."""
    found: list[list[str]] = []
    for name in names:
        name = shorten(name, width - 1)
        if found and display_width(", ".join([*found[-1], name])) < width:
            found[-1].append(name)
        else:
            found.append([name])
    if len(found) > lines:
        del found[lines:]
        if len(found[-1]) > 1 or display_width(found[-1][0]) > width - 10:
            found[-1].pop()
        found[-1].append(f"{len(names) - sum(map(len, found))} more")
    return ",\n".join(", ".join(line) for line in found)


def _bridges(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    program: Program | None,
    backward: Backward | None,
    groups: DeviceGroups | None,
) -> str:
    ahead = program_crossings(graph, program) if program is not None else crossings(graph, placement)
    back = _mirrored(graph, program, backward, ahead)
    if not ahead and not back:
        return "No bridges: nothing crosses between devices."
    if groups:
        ahead, back, cluster = groups.crossings(ahead), groups.crossings(back), groups.cluster
    back = tuple(replace(c, source=c.destination, destination=c.source) for c in back)  # beside what they answer
    within = [tuple(c for c in found if c.source == c.destination) for found in (ahead, back)]
    apart = [by_pair(tuple(c for c in found if c.source != c.destination)) for found in (ahead, back)]
    pairs = sorted({*apart[0], *apart[1]})
    largest = sorted(pairs, key=lambda pair: -sum(c.size_bytes for found in apart for c in found.get(pair, ())))
    rows = []
    for pair in (pair for pair in pairs if pair in largest[:MOST_ROWS]):
        names = " → ".join(shorten(cluster.devices[i].name, 14) for i in pair)
        rows.append([names, *_amount(apart[0].get(pair, ())), *_amount(apart[1].get(pair, ()))])
    if len(pairs) > MOST_ROWS:
        rest = [tuple(c for pair in largest[MOST_ROWS:] for c in found.get(pair, ())) for found in apart]
        rows.append([f"… {len(pairs) - MOST_ROWS} more", *_amount(rest[0]), *_amount(rest[1])])
    if any(within):
        rows.append(["within groups", *_amount(within[0]), *_amount(within[1])])
    if len(rows) > 1:
        rows.append(["total", *_amount(ahead), *_amount(back)])
    estimated = "" if program is not None else " (estimated from the placement)"
    title = f"Bridges, per step{estimated}; gradients go backward from right to left"
    return f"{title}\n{table(['from → to', 'forward', 'bytes', 'backward', 'bytes'], rows, 'lrrrr')}"


def _amount(found: Sequence[Crossing]) -> tuple[str, str]:
    if not found:
        return "–", "–"
    return str(sum(c.parts for c in found)), format_bytes(sum(c.size_bytes for c in found))


def _mirrored(
    graph: Graph, program: Program | None, backward: Backward | None, ahead: tuple[Crossing, ...]
) -> tuple[Crossing, ...]:
    """Gradient messages, as crossings from their senders."""
    if program is not None and backward is not None:
        return program_crossings(graph, program, backward.bridges)
    if program is not None:
        live = tuple(b for b in program.bridges if program.wire[b.wire].differentiable)
        ahead = program_crossings(graph, program, live)
    else:
        trainable = {s.value.name for s in graph.parameters if s.trainable}
        ahead = tuple(
            c for c in ahead if (c.value in trainable if c.parameter else graph.values[c.value].requires_grad)
        )
    return tuple(Crossing(c.value, c.destination, c.source, c.size_bytes, c.parts, c.parameter) for c in ahead)


def _reruns(reruns: Sequence[Any], cluster: Cluster) -> str:
    """What runs again for its backward, and the memory it is there for."""
    if not reruns:
        return ""
    rows = []
    for rerun in reruns[:MOST_ROWS]:
        device = cluster.devices[rerun.device]
        without = f"{format_bytes(rerun.without_bytes)} of {format_bytes(device.memory_bytes)}"
        what = f"{len(rerun.groups)}: {', '.join(compress(rerun.groups))}"
        numbers = [format_time(rerun.time_s), format_bytes(rerun.saved_bytes), without]
        rows.append([shorten(device.name, 12), *numbers, shorten(what, 40)])
    if len(reruns) > MOST_ROWS:
        rows.append([f"… {len(reruns) - MOST_ROWS} more", "", "", "", ""])
    return "Run again for backward\n" + table(["device", "time", "saves", "without", "groups"], rows, "lrrrl")


def _candidates(candidates: Sequence[Any]) -> str:
    if not candidates:
        return ""
    rows = [
        [shorten(str(c.strategy), 20), "–" if c.step_s is None else format_time(c.step_s), shorten(str(c.reason), 64)]
        for c in candidates[:MOST_ROWS]
    ]
    if len(candidates) > MOST_ROWS:
        rows.append([f"… {len(candidates) - MOST_ROWS} more", "", ""])
    return "Considered\n" + table(["strategy", "step", "reason"], rows, "lrl")


def _whole(graph: Graph) -> str:
    """Operators without an axis rule that samples flow through, by target."""
    carries = set(graph.sample_dims)
    found: dict[str, list[Operator]] = {}
    for op in graph.operators:
        if any(name in carries for name in op.operands):
            carries.update(v.name for v in op.results)
            if op.rule is None:
                found.setdefault(op.target, []).append(op)
    if not found:
        return ""
    rows = [[shorten(target, 30), str(len(ops)), _reason(ops[0])] for target, ops in list(found.items())[:MOST_ROWS]]
    if len(found) > MOST_ROWS:
        rows.append([f"… {len(found) - MOST_ROWS} more", "", ""])
    return "Computed whole: no axis rule, though they carry samples\n" + table(["operator", "ops", "why"], rows, "lrl")


def _reason(operator: Operator) -> str:
    lines = [shorten(operator.note or "no rule for this operator", 61)]
    if operator.source_line is not None:
        place = f"{operator.source_line.file.rsplit('/', 1)[-1]}:{operator.source_line.line}"
        lines.append(shorten(f"{place}  {operator.source_line.code}".rstrip(), 61))
    return "\n".join(lines)


def _wrapped(text: str, width: int = WIDTH) -> str:
    """Text broken between words to lines of at most ``width`` columns; further ones are indented."""
    lines = [""]
    for word in plain(text).split():
        if lines[-1] and display_width(lines[-1]) + display_width(word) + 1 > width:
            lines.append("  ")
        blank = " " if lines[-1].strip() else ""
        lines[-1] += blank + shorten(word, width - 2)
    return "\n".join(lines)
