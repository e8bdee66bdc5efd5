"""Timelines as charts: a row a device, time from left to right. Written as SVG, without any library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import floor, log10
from pathlib import Path

from graphpart.draw.picture import palette
from graphpart.draw.picture.render import write_text
from graphpart.draw.timeline.compare import WORK_NAMES, totals
from graphpart.draw.timeline.svg import Sheet
from graphpart.draw.words.text import shorten
from graphpart.errors import DrawError
from graphpart.ir.quantities import format_bytes, format_time
from graphpart.ir.timeline import Event, Timeline

HUES = {"F": 0, "B": 1, "W": 2, "U": 3}
"""The palette's colour of each kind of work; others are grey."""

PLOT_WIDTH = 1000.0
LEFT, RIGHT, HEAD, FOOT = 110.0, 90.0, 58.0, 40.0
MOST_ARROWS = 200
MOST_TIPS = 5000
NARROWEST = 1.0
"""Boxes narrower than this many pixels are put together; with more than 64 devices, in proportion to their number."""

WAITING = "#EEEEF1"
SENDING = "#7A3E9D"


def draw_timelines(timelines: Mapping[str, Timeline], path: str | Path) -> Path:
    """Draw timelines one under the other, on one axis of time.

    Args:
        timelines: by title; with one of them the title may be empty.
        path: where to, ending in ``.svg``.

    Raises:
        DrawError: if the suffix is another, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".svg":
        raise DrawError(f"cannot draw a timeline to {str(path)!r}: give a path that ends in .svg")
    return write_text(timelines_svg(timelines), path)


def timelines_svg(timelines: Mapping[str, Timeline]) -> str:
    """The SVG text of :func:`draw_timelines`.

    A box is a task: its colour says forward or backward and its shade and number the microbatch (a number is left out
    where the box is too small). The strip below holds the messages that the device sends while they are under way;
    an arrow leads to the task that reads one, unless there are too many. What is left grey is idle.
    """
    scale = _Scale(max((t.makespan_s for t in timelines.values()), default=0.0) or 1.0)
    panels = [_Panel(title, timeline, scale) for title, timeline in timelines.items()]
    sheet = Sheet(LEFT + PLOT_WIDTH + RIGHT, sum(panel.height for panel in panels) + 10)
    top = 0.0
    for panel in panels:
        panel.draw(sheet, top)
        top += panel.height
    return str(sheet)


@dataclass(frozen=True)
class _Scale:
    """The axis of time: from 0 to the longest step."""

    longest_s: float

    def x(self, time_s: float) -> float:
        return LEFT + PLOT_WIDTH * time_s / self.longest_s

    def ticks_s(self) -> Iterator[float]:
        """Round times, some six to twelve of them."""
        rough = self.longest_s / 8
        power = 10.0 ** floor(log10(rough))
        step = next(step for factor in (1, 2, 5, 10) if (step := factor * power) >= rough)
        number = 0
        while number * step <= self.longest_s * (1 + 1e-9):
            yield number * step
            number += 1


class _Panel:
    """The chart of one timeline."""

    def __init__(self, title: str, timeline: Timeline, scale: _Scale) -> None:
        self.title, self.timeline, self.scale = title, timeline, scale
        self.row = max(6.0, min(44.0, 900.0 / max(1, timeline.num_devices)))
        self.work_height, self.send_height = 0.62 * self.row, 0.16 * self.row
        self.height = HEAD + self.row * timeline.num_devices + FOOT
        self.has_tips = len(timeline.events) <= MOST_TIPS
        self.narrow_s = NARROWEST * max(1.0, timeline.num_devices / 64) * scale.longest_s / PLOT_WIDTH
        self.top = 0.0

    def draw(self, sheet: Sheet, top: float) -> None:
        """Put it on the sheet."""
        self.top = top + HEAD
        self._heading(sheet, top)
        self._axis(sheet)
        self._rows(sheet)
        messages = [event for event in self.timeline.events if event.kind == "send"]
        for event in self._merged(messages):
            self._message(sheet, event)
        for event in self._merged(event for event in self.timeline.events if event.is_work):
            self._work(sheet, event)
        if len(messages) <= MOST_ARROWS:
            for event in messages:
                self._arrow(sheet, event)

    def _y(self, device: int) -> float:
        return self.top + self.row * device

    def _heading(self, sheet: Sheet, top: float) -> None:
        if self.title:
            sheet.text(LEFT, top + 20, shorten(self.title, 100), 14, font_weight="bold")
        sheet.text(LEFT, top + 38, totals(self.timeline), 11, palette.NEUTRAL)
        entries = [("idle", WAITING, palette.FAINT)]
        if self.timeline.num_messages:
            entries.append(("message", SENDING, SENDING))
        for kind in reversed(self.timeline.kinds):
            entries.append((WORK_NAMES.get(kind, kind), *_colors(kind, 0.0)))
        x = LEFT + PLOT_WIDTH
        for words, fill, border in entries:
            x -= 6.0 * len(words)
            sheet.text(x, top + 38, words, 11, palette.NEUTRAL)
            x -= 15
            sheet.box(x, top + 28.5, 11, 11, fill, border, corner=2)
            x -= 14

    def _axis(self, sheet: Sheet) -> None:
        bottom = self._y(self.timeline.num_devices)
        for time_s in self.scale.ticks_s():
            x = self.scale.x(time_s)
            sheet.line(x, self.top - 4, x, bottom + 4, palette.MODULE_BORDER, 0.5)
            sheet.text(x, bottom + 17, format_time(time_s), 10, palette.NEUTRAL, text_anchor="middle")

    def _rows(self, sheet: Sheet) -> None:
        """Names and busy parts; the idle time of the whole step lies below what is drawn later."""
        size, step_s = min(11.0, 0.9 * self.row), self.timeline.makespan_s
        for device, name in enumerate(self.timeline.names):
            y = self._y(device)
            base = y + self.work_height / 2 + 0.35 * size
            sheet.box(LEFT, y, self.scale.x(step_s) - LEFT, self.work_height, WAITING, "none", corner=0)
            sheet.text(LEFT - 8, base, shorten(name, 16), size, text_anchor="end")
            part = f"{100 * self.timeline.busy_s[device] / step_s:.0f} % busy" if step_s else ""
            sheet.text(LEFT + PLOT_WIDTH + 8, base, part, size, palette.NEUTRAL)

    def _merged(self, events: Iterable[Event]) -> Iterator[Event]:
        """Events; those too narrow to see are put together with neighbours of their device and kind."""
        held: dict[int, Event] = {}
        for event in events:
            last = held.get(event.device)
            if last is not None and last.kind == event.kind:
                end_s = max(last.end_s, event.end_s)
                if max(end_s - last.start_s, event.start_s - last.end_s) < self.narrow_s:
                    held[event.device] = last._replace(end_s=end_s)
                    continue
            if last is not None:
                yield last
            held[event.device] = event
        yield from held.values()

    def _work(self, sheet: Sheet, event: Event) -> None:
        x, y = self.scale.x(event.start_s), self._y(event.device)
        width = max(0.4, self.scale.x(event.end_s) - x)
        number, last = event.microbatch or 0, max(1, self.timeline.num_microbatches - 1)
        fill, border = _colors(event.kind, min(1.0, number / last))
        if width < 4:  # an outline would cover it
            sheet.box(x, y, width, self.work_height, fill, "none", corner=0, tip=self._tip(event))
        else:
            sheet.box(x, y, width, self.work_height, fill, border, corner=2, tip=self._tip(event), stroke_width="0.7")
        label = WORK_NAMES.get(event.kind, event.kind)
        if self.timeline.num_microbatches > 1:
            label = "" if event.microbatch is None else str(event.microbatch)
        size = min(11.0, 0.75 * self.work_height)
        longest = max(len(label), len(str(last)))  # all numbers, or none
        if label and size >= 6 and width >= 0.6 * size * longest + 2:
            base = y + self.work_height / 2 + 0.35 * size
            sheet.text(x + width / 2, base, label, size, text_anchor="middle", pointer_events="none")

    def _message(self, sheet: Sheet, event: Event) -> None:
        x, y = self.scale.x(event.start_s), self._y(event.device) + self.work_height + 0.03 * self.row
        width = max(0.6, self.scale.x(event.end_s) - x)
        sheet.box(x, y, width, self.send_height, SENDING, "none", corner=0, tip=self._tip(event), opacity="0.6")

    def _arrow(self, sheet: Sheet, event: Event) -> None:
        """From where a message leaves to the row of its receiver, where it arrives."""
        if event.peer is None:
            return
        down = event.peer > event.device
        start = self._y(event.device) + (self.work_height if down else 0)
        end = self._y(event.peer) + (0 if down else self.work_height)
        x1, x2 = self.scale.x(event.start_s), self.scale.x(event.end_s)
        sheet.line(x1, start, x2, end, SENDING, 0.8, css_class="message", opacity="0.8")
        sheet.dot(x2, end, 1.6, SENDING, "none")

    def _tip(self, event: Event) -> str:
        if not self.has_tips:
            return ""
        span = f"{format_time(event.end_s - event.start_s)} from {format_time(event.start_s)}"
        if event.is_work:
            part = "" if event.microbatch is None else f" of microbatch {event.microbatch}"
            return f"{WORK_NAMES.get(event.kind, event.kind)}{part}: {event.name}\n{span}"
        there = "" if event.peer is None else f" to {self.timeline.names[event.peer]}"
        return f"{event.name}{there}: {format_bytes(event.size_bytes)}\n{span}"


def _colors(kind: str, depth: float) -> tuple[str, str]:
    """Fill and border of a kind of work; ``depth`` in [0, 1] darkens the fill."""
    hue = HUES.get(kind)
    if hue is None:
        return WAITING, palette.NEUTRAL
    return _mixed(palette.FILLS[hue], palette.BORDERS[hue], 0.55 * depth), palette.BORDERS[hue]


def _mixed(one: str, other: str, part: float) -> str:
    """A colour between two, both written as ``#RRGGBB``."""
    pairs = ((int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * part):02X}" for a, b in pairs)
