"""Timelines as tables: what each device did in a step, and a forecast beside a measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from graphpart.draw.words.text import table
from graphpart.errors import GraphpartError
from graphpart.ir.quantities import format_bytes, format_time
from graphpart.ir.timeline import Timeline

WORK_NAMES = {"F": "forward", "B": "backward", "W": "weights", "U": "update"}
"""What kinds of work are called."""


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What one device did in a step.

    Attributes:
        work_s: seconds by kind of work, such as ``F`` and ``B``.
        idle_s: the rest of the step, in seconds.
        sent_bytes: bytes of the messages that left it.
        num_messages: how many those were.
    """

    work_s: Mapping[str, float]
    idle_s: float
    sent_bytes: int
    num_messages: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A forecast and a measurement of the same thing; None where nothing was measured."""

    predicted: float
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; None where nothing was predicted, or nothing measured."""
        return self.measured / self.predicted if self.predicted and self.measured is not None else None


@dataclass(frozen=True)
class Comparison:
    """A forecast of a step beside a measurement of it; ``print()`` shows a table.

    Attributes:
        predicted: the forecast.
        measured: the measurement.
    """

    predicted: Timeline
    measured: Timeline

    @property
    def step_s(self) -> Pair:
        """Makespans."""
        return Pair(self.predicted.makespan_s, self.measured.makespan_s)

    @property
    def bubble(self) -> Pair:
        """Idle parts of the devices' time."""
        return Pair(self.predicted.bubble, self.measured.bubble)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of work in either."""
        return tuple(dict.fromkeys((*self.predicted.kinds, *self.measured.kinds)))

    @property
    def devices(self) -> tuple[tuple[DeviceUse, DeviceUse | None], ...]:
        """Per device, what it was predicted to do and what it did; None where nothing was measured."""
        seen = {event.device for event in self.measured.events}
        pairs = zip(device_uses(self.predicted, self.kinds), device_uses(self.measured, self.kinds), strict=True)
        return tuple((one, other if device in seen else None) for device, (one, other) in enumerate(pairs))

    def __str__(self) -> str:
        percent = " → ".join(f"{100 * timeline.bubble:.0f} %" for timeline in (self.predicted, self.measured))
        headers = ["device", *(WORK_NAMES.get(kind, kind) for kind in self.kinds), "idle", "sends", "messages"]
        shows: list[Callable[[float], str]] = [*[format_time] * (len(self.kinds) + 1), format_bytes, str]
        rows = []
        for name, (one, other) in zip(self.predicted.names, self.devices, strict=True):
            predicted = _quantities(one)
            measured: Sequence[float | None] = [None] * len(predicted) if other is None else _quantities(other)
            pairs = map(Pair, predicted, measured)
            rows.append((name, *(_cell(pair, show) for pair, show in zip(pairs, shows, strict=True))))
        step = _cell(self.step_s, format_time)
        first = f"predicted → measured: a step takes {step}, {percent} idle"
        return f"{first}\n\n{table(headers, _folded(rows))}"


def compare(predicted: Timeline, measured: Timeline) -> Comparison:
    """A forecast of a step beside a measurement of it.

    Args:
        predicted: the forecast.
        measured: the measurement of the same plan; one process of several has measured its own device alone.

    Raises:
        GraphpartError: if the numbers of devices differ.
    """
    if predicted.num_devices != measured.num_devices:
        raise GraphpartError(
            f"a timeline of {predicted.num_devices} devices cannot be compared with one of {measured.num_devices}; "
            "give timelines of the same plan"
        )
    return Comparison(predicted, measured)


def summary(timeline: Timeline) -> str:
    """A step in a table, a row a device; neighbours that do the same share a row."""
    headers = ["device", *(WORK_NAMES.get(kind, kind) for kind in timeline.kinds), "idle", "", "sends", "messages"]
    peaks = timeline.peak_memory_bytes
    rows = []
    for number, (name, use) in enumerate(zip(timeline.names, device_uses(timeline, timeline.kinds), strict=True)):
        work = [format_time(use.work_s[kind]) for kind in timeline.kinds]
        part = f"{100 * use.idle_s / timeline.makespan_s:.0f} %" if timeline.makespan_s else ""
        sends = (format_bytes(use.sent_bytes), str(use.num_messages))
        memory = (format_bytes(peaks[number]),) if peaks else ()
        rows.append((name, *work, format_time(use.idle_s), part, *sends, *memory))
    headers += ["most memory"] * bool(peaks)
    return f"{totals(timeline)}\n\n{table(headers, _folded(rows), 'l' + 'r' * (len(headers) - 1))}"


def totals(timeline: Timeline) -> str:
    """The whole step in a line."""
    messages = f"{timeline.num_messages} message{'' if timeline.num_messages == 1 else 's'}"
    parts = [f"{timeline.num_microbatches} microbatches"] if timeline.num_microbatches > 1 else []
    parts += [f"a step takes {format_time(timeline.makespan_s)}", f"{100 * timeline.bubble:.0f} % idle"]
    parts.append(f"{messages}, {format_bytes(timeline.message_bytes)}" if timeline.num_messages else "no messages")
    return " · ".join(parts)


def device_uses(timeline: Timeline, kinds: Sequence[str]) -> tuple[DeviceUse, ...]:
    """Per device, what it did in a step.

    Args:
        timeline: of the step.
        kinds: kinds of work to tell apart.
    """
    spent_s = {kind: timeline.spent_s(kind) for kind in kinds}
    sent_bytes, num_messages = [0] * timeline.num_devices, [0] * timeline.num_devices
    for event in timeline.events:
        if event.kind == "send":
            sent_bytes[event.device] += event.size_bytes
            num_messages[event.device] += 1
    return tuple(
        DeviceUse(
            {kind: spent_s[kind][device] for kind in kinds},
            timeline.makespan_s - timeline.busy_s[device],
            sent_bytes[device],
            num_messages[device],
        )
        for device in range(timeline.num_devices)
    )


def _quantities(use: DeviceUse) -> list[float]:
    """What a row of a comparison shows."""
    return [*use.work_s.values(), use.idle_s, use.sent_bytes, use.num_messages]


def _cell(pair: Pair, show: Callable[[float], str]) -> str:
    """``1.2 ms → 1.8 ms ×1.50``, or one text where both read the same."""
    one, other = show(pair.predicted), "–" if pair.measured is None else show(pair.measured)
    if one == other:
        return one
    return f"{one} → {other}" + ("" if pair.ratio is None else f" ×{pair.ratio:.2f}")


def _folded(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows of neighbours that read the same as one row, with the first and the last name."""
    found = []
    for cells, group in groupby(rows, key=lambda row: row[1:]):
        names = [row[0] for row in group]
        found.append((names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}", *cells))
    return found
