"""A plan in words: who does what, what crosses, what else was considered, and what had to stay whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from graphpart.draw.modules import module_ranges
from graphpart.draw.share import (
    Crossing,
    by_pair,
    constant_operators,
    crossings,
    device_flops,
    device_parameter_bytes,
    operator_devices,
)
from graphpart.draw.text import (
    display_width,
    format_bytes,
    format_count,
    format_flops,
    format_time,
    plain,
    shorten,
    table,
)
from graphpart.draw.wiring import program_crossings
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement
from graphpart.ir.program import Backward, Program
from graphpart.ir.timeline import Timeline

__all__ = ["explain", "format_bytes", "format_count", "format_flops", "format_time", "table"]

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
    """
    sections = (
        _header(graph, placement, cluster, program, timeline),
        _devices(graph, placement, cluster, memory, timeline),
        _bridges(graph, placement, cluster, program, backward),
        _candidates(tuple(candidates)),
        _whole(graph),
        "\n".join(_wrapped(f"Note: {note}") for note in notes),
    )
    return "\n\n".join(section for section in sections if section)


def _header(
    graph: Graph, placement: Placement, cluster: Cluster, program: Program | None, timeline: Timeline | None
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
    return "\n".join(_wrapped(line) for line in lines)


def _devices(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    memory: Mapping[int, Any] | None,
    timeline: Timeline | None,
) -> str:
    devices = operator_devices(graph, placement)
    flops = device_flops(graph, placement, len(cluster))
    parameters = device_parameter_bytes(graph, placement, len(cluster))
    constants = constant_operators(graph)
    total = sum(flops) or 1.0
    headers = ["device", "modules", "ops", "FLOPs", "parameters"]
    headers += ["busy"] * (timeline is not None) + ["memory"] * (memory is not None)
    rows = []
    for i in placement.devices:
        row = [
            shorten(cluster.devices[i].name, 14),
            _cell(module_ranges(graph, devices, i, constants)),
            str(sum(i in d for d in devices.values())),
            f"{100 * flops[i] / total:.0f} %",
            format_bytes(parameters[i]),
        ]
        if timeline is not None:
            row.append(format_time(timeline.busy_s[i]) if i < timeline.num_devices else "–")
        if memory is not None:
            row.append(format_bytes(memory[i].total_bytes) if i in memory else "–")
        rows.append(row)
    return table(headers, rows, "ll" + "r" * 5)


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
    graph: Graph, placement: Placement, cluster: Cluster, program: Program | None, backward: Backward | None
) -> str:
    ahead = program_crossings(graph, program) if program is not None else crossings(graph, placement)
    back = _mirrored(graph, program, backward, ahead)
    forward, behind = by_pair(ahead), by_pair(back)
    if not forward and not behind:
        return "No bridges: nothing crosses between devices."
    rows = []
    for source, destination in sorted({*forward, *behind}):
        there, returned = forward.get((source, destination), ()), behind.get((source, destination), ())
        names = " → ".join(shorten(cluster.devices[i].name, 14) for i in (source, destination))
        rows.append([names, *_amount(there), *_amount(returned)])
    total = ["total", *_amount(ahead), *_amount(back)]
    shown = rows[:MOST_ROWS] + ([[f"… {len(rows) - MOST_ROWS} more", *[""] * 4]] if len(rows) > MOST_ROWS else [])
    title = "Bridges, per step" + ("" if program is not None else " (estimated from the placement)")
    headers = ["from → to", "forward", "bytes", "backward", "bytes"]
    return f"{title}\n{table(headers, [*shown, total] if len(rows) > 1 else shown, 'lrrrr')}"


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
    if operator.source is not None:
        place = f"{operator.source.file.rsplit('/', 1)[-1]}:{operator.source.line}"
        lines.append(shorten(f"{place}  {operator.source.code}".rstrip(), 61))
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
