"""A timeline as a trace that Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

The format is Chrome's, as in "Trace Event Format" (Google, 2016). Each device is a process, with a track of what it
computes and waits for, tracks of the messages that leave and arrive, and counters of its memory. An arrow leads from
where a message leaves over where it arrives to the task that reads it.
"""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphpart.draw.picture.render import write_text
from graphpart.ir.schedule import Task
from graphpart.ir.timeline import Event, MemorySample, Timeline

Record = Mapping[str, Any]


def save_trace(timeline: Timeline, path: str | Path) -> Path:
    """Write a timeline as a trace in JSON; the same bytes for the same timeline.

    Args:
        timeline: predicted or measured.
        path: where to; viewers expect ``.json``.

    Raises:
        DrawError: if the file cannot be written.
    """
    trace = {"displayTimeUnit": "ms", "traceEvents": list(trace_records(timeline))}
    return write_text(json.dumps(trace, ensure_ascii=False, separators=(",", ":")) + "\n", path)


def trace_records(timeline: Timeline) -> Iterator[Record]:
    """The records of a trace: names of tracks, slices, arrows, and counters of memory."""
    tracks = _tracks(timeline)
    for device, name in enumerate(timeline.names):
        yield _metadata("process_name", device, 0, name=name)
        yield _metadata("process_sort_index", device, 0, sort_index=device)
    for track in tracks:
        yield _metadata("thread_name", track.device, track.thread, name=track.name)
        yield _metadata("thread_sort_index", track.device, track.thread, sort_index=track.thread)
    for track in tracks:
        for event in track.events:
            yield _slice(event, track, timeline.names)
    yield from _arrows(tracks)
    for device, samples in enumerate(timeline.memory):
        yield from _counters(device, samples)


@dataclass(frozen=True)
class _Track:
    """A row of the viewer: events of one device that don't overlap.

    Attributes:
        device: index of the device.
        kind: ``compute``, ``send`` or ``receive``.
        name: what it is called.
        thread: its number, unique in the trace.
        events: in order of their start.
    """

    device: int
    kind: str
    name: str
    thread: int
    events: Sequence[Event]


def _tracks(timeline: Timeline) -> list[_Track]:
    """Work and waits of each device on one track; messages on as many as are under way at once."""
    found: defaultdict[tuple[int, str], list[Event]] = defaultdict(list)
    for event in timeline.events:
        found[event.device, "send" if event.kind == "send" else "compute"].append(event)
        if event.kind == "send" and event.peer is not None:
            found[event.peer, "receive"].append(event)
    tracks: list[_Track] = []
    for device in range(timeline.num_devices):
        for kind in ("compute", "send", "receive"):
            for number, events in enumerate(lanes(found[device, kind]), 1):
                name = kind if number == 1 else f"{kind} {number}"
                tracks.append(_Track(device, kind, name, len(tracks) + 1, events))
    return tracks


def lanes(events: Iterable[Event]) -> list[list[Event]]:
    """Events in as few rows as possible, so that those of one row don't overlap.

    Args:
        events: in order of their start.
    """
    rows: list[list[Event]] = []
    free: list[tuple[float, int]] = []
    for event in events:
        if free and free[0][0] <= event.start_s:
            _, row = heapq.heappop(free)
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(event)
        heapq.heappush(free, (event.end_s, row))
    return rows


def _slice(event: Event, track: _Track, names: Sequence[str]) -> Record:
    args: dict[str, Any] = {}
    if event.is_work:
        name = f"{event.kind} {event.name}" if event.microbatch is None else f"{event.kind}{event.microbatch}"
        args["segment"] = event.name
    else:
        name = f"wait for {event.name}" if event.kind == "wait" else event.name
        other = event.device if track.kind == "receive" else event.peer
        if other is not None:
            args["to" if track.kind == "send" else "from"] = names[other]
        args["bytes"] = event.size_bytes
    if event.microbatch is not None:
        args["microbatch"] = event.microbatch
    start_us = _microseconds(event.start_s)
    return {
        "ph": "X",
        "name": name,
        "cat": event.kind if track.kind == "compute" else track.kind,
        "pid": _process(track.device),
        "tid": track.thread,
        "ts": start_us,
        "dur": round(_microseconds(event.end_s) - start_us, 3),
        "args": args,
    }


def _arrows(tracks: Sequence[_Track]) -> Iterator[Record]:
    """Per message, an arrow from where it leaves over where it arrives to its reader, as far as these are known."""
    arrives_on = {id(event): track for track in tracks if track.kind == "receive" for event in track.events}
    computed = [(track, event) for track in tracks if track.kind == "compute" for event in track.events]
    read_in = {(track.device, Task(e.kind, e.name)): (track, e) for track, e in computed if e.is_work}
    number = 0
    for track in tracks:
        for event in track.events if track.kind == "send" else ():
            there = arrives_on.get(id(event))
            if there is None:
                continue
            number += 1
            read = read_in.get((there.device, event.reader)) if event.reader is not None else None
            yield _arrow("s", number, track, event.start_s)
            yield _arrow("t" if read else "f", number, there, event.start_s)
            if read:
                yield _arrow("f", number, read[0], read[1].start_s)


def _arrow(phase: str, number: int, track: _Track, time_s: float) -> Record:
    """A point of an arrow; ``bp`` binds it to the slice around it, not to the next one."""
    place = {"pid": _process(track.device), "tid": track.thread, "ts": _microseconds(time_s)}
    return {"ph": phase, "name": "message", "cat": "message", "id": number, "bp": "e", **place}


def _counters(device: int, samples: Sequence[MemorySample]) -> Iterator[Record]:
    """Memory by what it is for (a viewer stacks these), and in total."""
    kinds = [kind for kind in (samples[0].size_bytes if samples else ()) if any(s.size_bytes[kind] for s in samples)]
    for sample in samples:
        place = {"ph": "C", "pid": _process(device), "ts": _microseconds(sample.time_s)}
        yield {**place, "name": "memory in bytes", "args": {kind: sample.size_bytes[kind] for kind in kinds}}
        yield {**place, "name": "memory in all", "args": {"bytes": sum(sample.size_bytes.values())}}


def _metadata(name: str, device: int, thread: int, /, **args: Any) -> Record:
    return {"ph": "M", "name": name, "pid": _process(device), "tid": thread, "args": args}


def _process(device: int) -> int:
    """A device's process: from 1 up, as viewers take process 0 for the idle one."""
    return device + 1


def _microseconds(time_s: float) -> float:
    """The format's unit, to the nanosecond, so that neighbours still meet."""
    return round(time_s * 1e6, 3)
