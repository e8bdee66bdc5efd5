"""A recurrent network unrolled over time: a column a time step, a row a layer, read from a plan."""

from __future__ import annotations

from dataclasses import dataclass

from graphpart import Plan
from graphpart.draw.picture import palette
from graphpart.draw.timeline.svg import Sheet
from graphpart.ir.quantities import format_bytes

WIDE, HIGH, ACROSS, UP = 92.0, 38.0, 132.0, 78.0
LEFT, TOP = 120.0, 92.0


@dataclass(frozen=True)
class Cell:
    """One layer at one time step.

    Attributes:
        layer: its module's path.
        time: which call of the module.
        device: index of the device.
        reads: pairs (layer, time) of cells whose results it reads.
        wave: number of the earliest round in which it can run, if a cell takes one.
    """

    layer: str
    time: int
    device: int
    reads: tuple[tuple[str, int], ...]
    wave: int


def cells(plan: Plan) -> dict[tuple[str, int], Cell]:
    """Cells by layer and time; what belongs to no module is looked through."""
    found: dict[tuple[str, int], Cell] = {}
    behind: dict[str, tuple[tuple[str, int], ...]] = {}
    for op in plan.graph.operators:
        reads = tuple(dict.fromkeys(key for name in op.operands for key in behind.get(name, ())))
        if op.module_path:
            key = (op.module_path, sum(layer == op.module_path for layer, _ in found))
            wave = 1 + max((found[r].wave for r in reads), default=0)
            found[key] = Cell(*key, plan.placement.device(op.name), reads, wave)
            reads = (key,)
        behind.update((value.name, reads) for value in op.results)
    return found


def draw(plan: Plan, title: str) -> str:
    """SVG text: boxes coloured by device, thick arrows for messages, and the number of each cell's wave."""
    found = cells(plan)
    layers = list(dict.fromkeys(layer for layer, _ in found))
    num_steps = 1 + max(time for _, time in found)
    bottom = TOP + UP * (len(layers) - 1)
    sheet = Sheet(LEFT + ACROSS * num_steps, bottom + HIGH + 66)
    sheet.text(24, 30, title, 15, font_weight="bold")
    sheet.text(24, 50, totals(plan), 11, palette.NEUTRAL)
    corner = {(layer, time): (LEFT + ACROSS * time, bottom - UP * layers.index(layer)) for layer, time in found}
    for layer in layers:
        (device,) = {cell.device for cell in found.values() if cell.layer == layer}
        x, y = corner[layer, 0]
        color = palette.border(device)
        sheet.box(24, y - 12, LEFT - 40 + ACROSS * num_steps, HIGH + 24, palette.fill((device,)), color)
        sheet.text(34, y + 16, layer, 11, color, font_weight="bold")
        sheet.text(34, y + 32, plan.cluster.devices[device].name, 10, color)
    for key, cell in found.items():
        for read in cell.reads:
            _arrow(sheet, corner[read], corner[key], found[read], cell)
    for key, cell in found.items():
        x, y = corner[key]
        sheet.box(x, y, WIDE, HIGH, "white", palette.border(cell.device), css_class="cell")
        sheet.text(x + WIDE / 2, y + 24, f"wave {cell.wave}", 11, text_anchor="middle")
    for time in range(num_steps):
        place = LEFT + ACROSS * time + WIDE / 2
        sheet.text(place, bottom + HIGH + 30, f"t = {time + 1}", 11, palette.NEUTRAL, text_anchor="middle")
    note = "thick: a message between devices · cells of one wave do not depend on one another"
    sheet.text(24, bottom + HIGH + 54, note, 10, palette.NEUTRAL)
    return str(sheet)


def _arrow(sheet: Sheet, start: tuple[float, float], end: tuple[float, float], source: Cell, reader: Cell) -> None:
    sent = source.device != reader.device
    color, width = (palette.border(source.device), 2.2) if sent else (palette.NEUTRAL, 1.0)
    (x1, y1), (x2, y2) = start, end
    kind = {"css_class": "sent" if sent else "near"}
    if source.time == reader.time:
        sheet.arrow(x1 + WIDE / 2, y1, x2 + WIDE / 2, y2 + HIGH, color, width, **kind)
    else:
        sheet.arrow(x1 + WIDE, y1 + HIGH / 2, x2, y2 + HIGH / 2, color, width, **kind)


def totals(plan: Plan) -> str:
    """Messages and their bytes as the plan counts them, checked against the arrows."""
    found = cells(plan)
    crossing = {(read, found[key].device) for key in found for read in found[key].reads}
    crossing = {(read, device) for read, device in crossing if found[read].device != device}
    assert len(crossing) == plan.program.num_messages, "the arrows are not the program's messages"
    size = format_bytes(plan.program.message_bytes)
    return f"{len(plan.placement.devices)} devices · {plan.program.num_messages} messages, {size} forward"
