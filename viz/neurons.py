"""A small network neuron by neuron: who computes which, and which values are sent, read from a plan's program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from graphpart import Plan
from graphpart.draw.picture import palette
from graphpart.draw.timeline.svg import Sheet
from graphpart.ir.graph import Operator
from graphpart.ir.program import Bridge
from graphpart.ir.quantities import format_bytes
from graphpart.ir.region import Intervals

Masks = Mapping[str, Sequence[Sequence[float]]]

DOT, STEP, BAND_GAP, COLUMN = 7.0, 22.0, 34.0, 120.0
LEFT, TOP = 40.0, 104.0


@dataclass(frozen=True)
class Column:
    """The neurons of one layer, or the inputs.

    Attributes:
        name: what stands under it.
        values: names of the values that carry the neurons: the layer's result, and what pointwise operators make of it.
        device_of: per neuron, the index of its device; -1 for inputs, which every device has.
        reads: per neuron, the neurons of the column before that it reads.
    """

    name: str
    values: tuple[str, ...]
    device_of: tuple[int, ...]
    reads: tuple[Intervals, ...]


@dataclass(frozen=True)
class Wire:
    """An edge between neurons of columns that follow one another.

    Attributes:
        column: number of the column that it leads to.
        source: neuron in the column before.
        destination: neuron in the column.
        is_sent: whether the source's value is sent to the destination's device.
    """

    column: int
    source: int
    destination: int
    is_sent: bool


def columns(plan: Plan, masks: Masks | None = None) -> tuple[Column, ...]:
    """Layers of a chain: operators that read a layer and weights, and whose last result dimension runs over neurons.

    Pointwise operators between layers belong to the layer before them.

    Args:
        plan: the plan.
        masks: by layer, the edges that its mask leaves, ``[neurons, neurons before]``.
    """
    graph = plan.graph
    (source,) = graph.inputs
    found = [Column("input", (source.value.name,), (-1,) * source.value.shape[-1], ())]
    for op in graph.operators:
        last = found[-1]
        if op.operands[0] not in last.values:
            continue  # it makes a weight
        devices = tuple(_device(plan, op, i) for i in range(op.results[0].shape[-1]))
        if len(op.operands) > 1:
            mask = (masks or {}).get(op.module_path)
            reads = tuple(_reads(op, i) if mask is None else _edges(mask[i]) for i in range(len(devices)))
            found.append(Column(op.module_path, (op.results[0].name,), devices, reads))
        else:
            assert last.device_of == devices, f"{op} is not where its layer is"
            found[-1] = Column(last.name, (*last.values, op.results[0].name), devices, last.reads)
    return tuple(found)


def _axis(op: Operator) -> str:
    assert op.rule is not None
    ((axis,),) = [dims[-1] for dims in op.rule.results]
    return axis


def _device(plan: Plan, op: Operator, neuron: int) -> int:
    axis = _axis(op)
    (device,) = {t.device for t in plan.placement.tiles[op.name] if axis not in t.axes or neuron in set(t.axes[axis])}
    return device


def _reads(op: Operator, neuron: int) -> Intervals:
    assert op.rule is not None
    return op.rule.region(op.rule.operands[0], {_axis(op): Intervals.indices([neuron])}).dims[-1]


def _edges(row: Sequence[float]) -> Intervals:
    return Intervals.indices(i for i, weight in enumerate(row) if weight)


def wires(plan: Plan, masks: Masks | None = None) -> tuple[Wire, ...]:
    """Every edge between neurons; those that change device are checked against the program's messages.

    Raises:
        AssertionError: if what is needed elsewhere is not sent, what isn't needed is, or something is sent twice.
    """
    layers = columns(plan, masks)
    found = []
    needed: set[tuple[int, int, int, int]] = set()
    for number, layer in enumerate(layers[1:], 1):
        before = layers[number - 1]
        for neuron, reads in enumerate(layer.reads):
            for source in reads:
                ends = before.device_of[source], layer.device_of[neuron]
                found.append(Wire(number, source, neuron, ends[0] != ends[1] and ends[0] >= 0))
                if found[-1].is_sent:
                    needed.add((number - 1, source, *ends))
    column_of = {value: number for number, layer in enumerate(layers[:-1]) for value in layer.values}
    sent = [
        (column_of[wire.value], neuron, bridge.source, bridge.destination)
        for bridge in plan.program.bridges
        if (wire := plan.program.wire[bridge.wire]).value in column_of
        for neuron in wire.region.dims[-1]
    ]
    assert len(sent) == len(set(sent)), "a neuron's value is sent to a device twice"
    assert set(sent) == needed, "what is sent is not what is needed"
    return tuple(found)


def draw(plan: Plan, title: str, masks: Masks | None = None) -> str:
    """SVG text: a column of dots a layer, a box a device, thin lines within devices and thick ones between."""
    layers = columns(plan, masks)
    places = _places(layers)
    width = LEFT * 2 + COLUMN * (len(layers) - 1)
    bottom = max(y for column in places for _, y in column)
    sheet = Sheet(max(width, LEFT + 5.6 * len(totals(plan))), bottom + 74)
    sheet.text(LEFT - 16, 30, title, 15, font_weight="bold")
    sheet.text(LEFT - 16, 50, totals(plan), 11, palette.NEUTRAL)
    _device_boxes(sheet, plan, layers, places)
    edges = sorted(wires(plan, masks), key=lambda w: w.is_sent)
    for wire in edges:
        (x1, y1), (x2, y2) = places[wire.column - 1][wire.source], places[wire.column][wire.destination]
        device = layers[wire.column - 1].device_of[wire.source]
        if wire.is_sent:
            sheet.line(x1, y1, x2, y2, palette.border(device), 1.8, stroke_opacity="0.75", css_class="sent")
        else:
            sheet.line(x1, y1, x2, y2, palette.FAINT, 0.7, css_class="near")
    for layer, dots in zip(layers, places, strict=True):
        for neuron, (x, y) in enumerate(dots):
            device = layer.device_of[neuron]
            color = palette.border(device) if device >= 0 else palette.NEUTRAL
            where = plan.cluster.devices[device].name if device >= 0 else "every device"
            sheet.dot(x, y, DOT, "white", color, f"{neuron} on {where}")
            sheet.text(x, y + 2.6, str(neuron), 7.5, color, text_anchor="middle")
        middle = {"text_anchor": "middle"}
        sheet.text(dots[0][0], bottom + 34, layer.name, 10, palette.NEUTRAL, **middle)
    sheet.text(LEFT - 16, bottom + 58, "thick: the value is sent to another device, once", 10, palette.NEUTRAL)
    return str(sheet)


def totals(plan: Plan) -> str:
    """How many messages the plan counts in a forward pass, and their bytes."""
    layers = columns(plan)
    carried = {value for layer in layers[:-1] for value in layer.values}
    kinds: dict[str, list[Bridge]] = {"between layers": [], "for weights": [], "for the output": []}
    for bridge in plan.program.bridges:
        value = plan.program.wire[bridge.wire].value
        returned = value in layers[-1].values
        kind = "between layers" if value in carried else "for the output" if returned else "for weights"
        kinds[kind].append(bridge)
    counts = [f"{_amount(bridges)} {kind}" for kind, bridges in kinds.items() if bridges]
    return " · ".join([f"{len(plan.placement.devices)} devices", *counts])


def _amount(bridges: Sequence[Bridge]) -> str:
    size = format_bytes(sum(b.size_bytes for b in bridges))
    return f"{len(bridges)} message{'s' if len(bridges) != 1 else ''} ({size})"


def _places(layers: Sequence[Column]) -> list[list[tuple[float, float]]]:
    """Where each neuron's dot is: a band for each device of a column, alike in all columns."""
    rank_of = _ranks(layers)
    counts = [Counter(rank_of[device] for device in layer.device_of) for layer in layers[1:]]
    bands = [max(count[rank] for count in counts) for rank in range(1 + max(rank_of.values()))]
    starts = [TOP + sum(bands[:i]) * STEP + i * BAND_GAP for i in range(len(bands))]
    bottom = starts[-1] + (bands[-1] - 1) * STEP
    placed = []
    for number, layer in enumerate(layers):
        x = LEFT + number * COLUMN
        if number == 0:
            first = (TOP + bottom - (len(layer.device_of) - 1) * STEP) / 2
            placed.append([(x, first + i * STEP) for i in range(len(layer.device_of))])
            continue
        dots: dict[int, tuple[float, float]] = {}
        for device in set(layer.device_of):
            rank = rank_of[device]
            own = [i for i, d in enumerate(layer.device_of) if d == device]
            spare = (bands[rank] - len(own)) * STEP / 2
            dots.update({i: (x, starts[rank] + spare + at * STEP) for at, i in enumerate(own)})
        placed.append([dots[i] for i in range(len(layer.device_of))])
    return placed


def _ranks(layers: Sequence[Column]) -> dict[int, int]:
    """Which band a device has: devices that share columns are below one another, others may share a band."""
    groups: list[set[int]] = []
    for layer in layers[1:]:
        devices = set(layer.device_of)
        together = devices.union(*(group for group in groups if group & devices))
        groups = [*(group for group in groups if not group & devices), together]
    return {device: rank for group in groups for rank, device in enumerate(sorted(group))}


def _device_boxes(
    sheet: Sheet, plan: Plan, layers: Sequence[Column], places: Sequence[Sequence[tuple[float, float]]]
) -> None:
    """A box around each device's neurons in columns that follow one another."""
    for device in plan.placement.devices:
        mine = [number for number, layer in enumerate(layers) if device in layer.device_of]
        for _, run in groupby(enumerate(mine), key=lambda pair: pair[1] - pair[0]):
            numbers = [number for _, number in run]
            dots = [places[n][i] for n in numbers for i, d in enumerate(layers[n].device_of) if d == device]
            left, right = min(x for x, _ in dots) - 18, max(x for x, _ in dots) + 18
            top, bottom = min(y for _, y in dots) - 22, max(y for _, y in dots) + 13
            name = plan.cluster.devices[device].name
            sheet.box(left, top, right - left, bottom - top, palette.fill((device,)), palette.border(device))
            sheet.text(left + 5, top - 4, name, 10, palette.border(device), font_weight="bold")
