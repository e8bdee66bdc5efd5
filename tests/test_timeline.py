"""Timelines as a person meets them: tables, charts, traces, and a forecast beside a measurement."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import graphpart as gp
from graphpart.draw.timeline.gantt import PLOT_WIDTH, draw_timelines, timelines_svg
from graphpart.draw.timeline.perfetto import lanes, trace_records
from graphpart.errors import DrawError
from graphpart.ir.schedule import Task
from graphpart.ir.timeline import Event, MemorySample, Timeline
from graphpart.planning.plan import Plan

FORECAST = Timeline(
    2,
    (
        Event(0, "F", "S0", 0.0, 0.002, 0),
        Event(0, "F", "S1", 0.002, 0.004, 1),
        Event(0, "send", "a0", 0.002, 0.003, 0, 1, 4000, Task("F", "T0")),
        Event(1, "F", "T0", 0.003, 0.007, 0),
        Event(0, "send", "a1", 0.004, 0.005, 1, 1, 4000, Task("F", "T1")),
        Event(1, "F", "T1", 0.007, 0.011, 1),
        Event(1, "B", "T1", 0.011, 0.016, 1),
    ),
    num_messages=2,
    message_bytes=8000,
    memory=(
        (
            MemorySample(0.0, {"parameters": 100, "messages": 0}),
            MemorySample(0.002, {"parameters": 100, "messages": 0}),
        ),
        (MemorySample(0.0, {"parameters": 50, "messages": 0}), MemorySample(0.003, {"parameters": 50, "messages": 40})),
    ),
    device_names=("left", "right"),
)


@pytest.fixture(scope="module")
def trained() -> tuple[Plan, Timeline]:
    """A plan with a forward and a backward message a microbatch, and a step of it as measured."""
    torch.manual_seed(0)
    layers = (nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
    parted = gp.partition(nn.Sequential(*layers), 2, strategy={"0": 0, "1": 0, "2": 1, "3": 1}, num_microbatches=3)
    parted.record = True
    parted(torch.randn(6, 16, requires_grad=True)).sum().backward()
    return parted.plan, parted.timeline()


def pipeline(num_stages: int, num_microbatches: int) -> Timeline:
    """The forward of a pipeline whose stages take a second."""
    events = []
    for m in range(num_microbatches):
        for k in range(num_stages):
            events.append(Event(k, "F", f"d{k}.m{m}", m + k, m + k + 1.0, m))
            if k + 1 < num_stages:
                events.append(Event(k, "send", f"a{k}.m{m}", m + k + 1.0, m + k + 1.1, m, k + 1, 1000))
    count = (num_stages - 1) * num_microbatches
    return Timeline(num_stages, tuple(sorted(events, key=lambda e: e.start_s)), count, 1000 * count)


def test_messages_are_measured_with_their_ends_and_sizes(trained: tuple[Plan, Timeline]) -> None:
    plan, measured = trained
    sent = [event for event in measured.events if event.kind == "send"]
    bridges = (*plan.program.bridges, *plan.backward.bridges)
    assert sorted((e.name, e.device, e.peer, e.size_bytes) for e in sent) == sorted(
        (b.wire, b.source, b.destination, b.size_bytes) for b in bridges
    )
    waits = [event for event in measured.events if event.kind == "wait"]
    assert sorted((e.name, e.peer, e.device) for e in waits) == sorted((e.name, e.device, e.peer) for e in sent)
    assert measured.names == ("cpu:0", "cpu:1") and len(sent) == 6


def test_a_task_starts_when_its_messages_are_there(trained: tuple[Plan, Timeline]) -> None:
    """What a device waits for is no work: both follow each other, without overlap."""
    _, measured = trained
    for device in range(2):
        own = [e for e in measured.events if e.device == device and e.kind != "send"]
        assert all(a.end_s <= b.start_s for a, b in pairwise(own))
    for wait, task in pairwise(e for e in measured.events if e.device == 1 and e.kind in ("wait", "F")):
        if wait.kind == "wait":
            assert wait.reader == Task("F", task.name)


def test_forecast_and_measurement_know_the_same_readers(trained: tuple[Plan, Timeline]) -> None:
    plan, measured = trained
    found = [{(e.name, e.device): e.reader for e in t.events if e.kind == "send"} for t in (plan.timeline, measured)]
    assert found[0] == found[1] and None not in found[0].values()


def test_a_simulated_step_has_memory_over_time(trained: tuple[Plan, Timeline]) -> None:
    plan, _ = trained
    timeline = gp.simulate(plan)
    assert timeline.events == plan.timeline.events
    assert timeline.peak_memory_bytes == tuple(c.peak.memory.total_bytes for c in plan.memory_over_time)
    assert set(timeline.memory[0][0].size_bytes) >= {"parameters", "gradients", "messages"}
    assert plan.timeline.peak_memory_bytes == ()


def slices_by_track(records: list[Any]) -> dict[tuple[int, int], list[Any]]:
    found = defaultdict(list)
    for record in records:
        if record["ph"] == "X":
            found[record["pid"], record["tid"]].append(record)
    return found


def check_trace(records: list[Any]) -> None:
    """What the format asks for: named tracks, slices that don't overlap on one, arrows between slices."""
    named = {(r["pid"], r["tid"]): r["args"]["name"] for r in records if r["name"] == "thread_name"}
    tracks = slices_by_track(records)
    assert set(tracks) == set(named) and len({thread for _, thread in named}) == len(named)
    for slices in tracks.values():
        assert all(round(a["ts"] + a["dur"], 3) <= b["ts"] for a, b in pairwise(slices))
        assert all(s["dur"] >= 0 and s["name"] for s in slices)
    arrows = defaultdict(list)
    for record in records:
        if record["ph"] in "stf":
            around = tracks[record["pid"], record["tid"]]
            assert any(s["ts"] <= record["ts"] <= round(s["ts"] + s["dur"], 3) for s in around)
            arrows[record["id"]].append(record)
    for points in arrows.values():
        assert [p["ph"] for p in points] in (["s", "f"], ["s", "t", "f"])
        assert all(a["ts"] <= b["ts"] for a, b in pairwise(points))


def test_a_trace_holds_tracks_arrows_and_memory(tmp_path: Path) -> None:
    path = FORECAST.save_trace(tmp_path / "new" / "trace.json")
    records = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    check_trace(records)
    processes = {r["pid"]: r["args"]["name"] for r in records if r["name"] == "process_name"}
    assert list(processes.values()) == ["left", "right"] and 0 not in processes
    tracks = [(processes[r["pid"]], r["args"]["name"]) for r in records if r["name"] == "thread_name"]
    assert tracks == [("left", "compute"), ("left", "send"), ("right", "compute"), ("right", "receive")]
    (first,) = (r for r in records if r["ph"] == "X" and r["args"].get("segment") == "T0")
    assert (first["ts"], first["dur"], first["name"], first["cat"]) == (3000.0, 4000.0, "F0", "F")
    arrived = [(r["ts"], r["dur"], r["args"]["from"], r["args"]["bytes"]) for r in records if r.get("cat") == "receive"]
    assert arrived == [(2000.0, 1000.0, "left", 4000), (4000.0, 1000.0, "left", 4000)]
    assert [(r["ph"], r["ts"], r["pid"]) for r in records if r.get("id") == 2] == [
        ("s", 4000.0, 1), ("t", 4000.0, 2), ("f", 7000.0, 2),
    ]  # fmt: skip
    counters = [(r["pid"], r["ts"], r["name"], r["args"]) for r in records if r["ph"] == "C"]
    assert counters[-2:] == [
        (2, 3000.0, "memory in bytes", {"parameters": 50, "messages": 40}),
        (2, 3000.0, "memory in all", {"bytes": 90}),
    ]
    assert counters[0] == (1, 0.0, "memory in bytes", {"parameters": 100})  # kinds that stay empty are left out


def test_traces_of_real_steps_are_valid(trained: tuple[Plan, Timeline]) -> None:
    plan, measured = trained
    for timeline in (gp.simulate(plan), measured):
        records = list(trace_records(timeline))
        check_trace(records)
        ends = [r for r in records if r["ph"] == "f"]
        into = {s["args"].get("segment") for r in ends for s in slices_by_track(records)[r["pid"], r["tid"]]}
        assert len(ends) == timeline.num_messages == 6 and into >= {e.name for e in timeline.events if e.is_work}


def test_messages_under_way_at_once_lie_on_several_tracks() -> None:
    spans = [(0.0, 3.0), (1.0, 2.0), (2.0, 4.0), (2.5, 5.0), (3.0, 3.0)]
    rows = lanes(Event(0, "send", str(i), *span, peer=1) for i, span in enumerate(spans))
    assert [[event.name for event in row] for row in rows] == [["0", "4"], ["1", "2"], ["3"]]


def shapes(svg: str, tag: str) -> list[dict[str, str]]:
    return [node.attrib for node in ElementTree.fromstring(svg).iter(f"{{http://www.w3.org/2000/svg}}{tag}")]


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_a_chart_has_a_row_a_device_and_a_box_a_task(tmp_path: Path) -> None:
    svg = FORECAST.draw(tmp_path / "step.svg", title="Two <stages>").read_text(encoding="utf-8")
    words = texts(svg)
    for wanted in ("Two <stages>", "left", "right", "25 % busy", "81 % busy", "forward", "backward", "2 ms", "16 ms"):
        assert wanted in words, wanted
    assert "2 microbatches · a step takes 16 ms · 47 % idle · 2 messages, 8 kB" in words
    assert [word for word in words if word in ("0", "1")] == ["0", "0", "1", "1", "1"]
    tips = re.findall(r"<title>(.*)\n(.*)</title>", svg)
    assert ("forward of microbatch 0: T0", "4 ms from 3 ms") in tips
    assert ("a1 to right: 4 kB", "1 ms from 4 ms") in tips
    assert svg.count('class="message"') == 2
    boxes = {box["x"]: float(box["width"]) for box in shapes(svg, "rect") if box.get("stroke-width") == "0.7"}
    assert sum(boxes.values()) == pytest.approx(PLOT_WIDTH * 17 / 16, abs=1)


def test_numbers_go_where_boxes_are_small() -> None:
    for stages, microbatches, numbered in ((2, 4, True), (8, 12, True), (64, 128, False), (256, 64, False)):
        svg = timelines_svg({"": pipeline(stages, microbatches)})
        assert ("3" in texts(svg)) is numbered
        assert len(texts(svg)) < 2 * stages + 60 + stages * microbatches * numbered


def test_what_is_too_narrow_to_see_is_drawn_together() -> None:
    many = pipeline(2, 20_000)
    svg = timelines_svg({"": many})
    assert len(many.events) == 60_000 and len(shapes(svg, "rect")) < 4 * PLOT_WIDTH
    assert svg.count("<title>") == 0 and svg.count('class="message"') == 0
    work = [float(b["width"]) for b in shapes(svg, "rect") if b["fill"] not in ("white", "#EEEEF1", "#7A3E9D")]
    assert sum(work) == pytest.approx(2 * PLOT_WIDTH, rel=0.05)


def test_timelines_share_an_axis(tmp_path: Path) -> None:
    long = Timeline(1, (Event(0, "F", "S", 0.0, 0.032),))
    svg = draw_timelines({"one": FORECAST, "other": long}, tmp_path / "both.svg").read_text(encoding="utf-8")
    assert texts(svg).count("15 ms") == texts(svg).count("30 ms") == 2
    widths = {float(box["width"]) for box in shapes(svg, "rect") if box.get("fill") == "#EEEEF1"}
    assert {PLOT_WIDTH, PLOT_WIDTH / 2} <= widths


def test_an_empty_step_can_be_shown() -> None:
    nothing = Timeline(2, ())
    assert "device 1" in texts(timelines_svg({"nothing": nothing}))
    assert "no messages" in str(nothing) and "device 0 … device 1" in str(nothing)


@pytest.mark.parametrize("name", ["step.png", "step", "step.pdf"])
def test_other_pictures_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DrawError, match=r"ends in \.svg"):
        FORECAST.draw(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write, name in ((FORECAST.draw, "step.svg"), (FORECAST.save_trace, "step.json")):
        with pytest.raises(DrawError, match=name):
            write(tmp_path / "file" / name)


def test_a_step_prints_as_a_table() -> None:
    lines = str(FORECAST).split("\n")
    assert lines[0] == "2 microbatches · a step takes 16 ms · 47 % idle · 2 messages, 8 kB"
    assert lines[2].split() == ["device", "forward", "backward", "idle", "sends", "messages", "most", "memory"]
    assert lines[4].split() == ["left", "4", "ms", "0", "s", "12", "ms", "75", "%", "8", "kB", "2", "100", "B"]
    assert lines[5].split() == ["right", "8", "ms", "5", "ms", "3", "ms", "19", "%", "0", "B", "0", "90", "B"]


def test_devices_that_do_the_same_share_a_line() -> None:
    same = Timeline(3, tuple(Event(d, "F", f"S{d}", 0.0, 1.0) for d in range(3)), device_names=("a", "b", "c"))
    assert str(same).split("\n")[4:] == ["a … c       1 s   0 s  0 %    0 B         0"]


def test_a_forecast_is_compared_with_a_measurement() -> None:
    slower = Timeline(
        2,
        tuple(Event(e.device, e.kind, e.name, 2 * e.start_s, 2 * e.end_s, e.microbatch, e.peer, e.size_bytes)
              for e in FORECAST.events if e.kind != "B"),
        2, 8000,
    )  # fmt: skip
    found = FORECAST.compare(slower)
    assert found.step_s.ratio == pytest.approx(22 / 16)
    (_, left), (predicted, measured) = found.devices
    assert left is not None and measured is not None
    assert measured.work_s == pytest.approx({"F": 0.016, "B": 0.0}) and measured.idle_s == pytest.approx(0.006)
    assert predicted.work_s == pytest.approx({"F": 0.008, "B": 0.005})
    assert (predicted.sent_bytes, left.sent_bytes, left.num_messages) == (0, 8000, 2)
    lines = str(found).split("\n")
    assert lines[0] == "predicted → measured: a step takes 16 ms → 22 ms ×1.38, 47 % → 45 % idle"
    assert re.split(r"\s{2,}", lines[4]) == ["left", "4 ms → 8 ms ×2.00", "0 s", "12 ms → 14 ms ×1.17", "8 kB", "2"]
    assert re.split(r"\s{2,}", lines[5])[1:3] == ["8 ms → 16 ms ×2.00", "5 ms → 0 s ×0.00"]
    found = FORECAST.compare(replace(slower, events=tuple(event for event in slower.events if event.device == 1)))
    assert found.devices[0][1] is None  # as one process of several sees it
    assert re.split(r"\s{2,}", str(found).split("\n")[4])[:3] == ["left", "4 ms → –", "0 s → –"]
    with pytest.raises(gp.GraphpartError, match="2 devices cannot be compared with one of 3"):
        FORECAST.compare(Timeline(3, ()))
