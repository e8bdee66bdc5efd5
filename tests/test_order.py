"""Schedules: laws that hold for every one, and what each promises."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graphpart as gp
from graphpart.errors import ArgumentError, ScheduleError
from graphpart.ir.cluster import Cluster, Device, Link
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.program import Bridge, Step
from graphpart.ir.schedule import Schedule, update_of
from graphpart.ir.workload import Workload
from graphpart.lower import backward_of
from graphpart.order import (
    SCHEDULES,
    channels,
    dry_run,
    in_flight,
    make_schedule,
    parse_schedule,
    schedule_text,
    start_times,
)
from graphpart.order.critical_path import upward_ranks
from graphpart.order.depth import depths
from graphpart.order.list_scheduler import Policy, list_tasks
from graphpart.simulator import simulate_workload
from tests.helpers.models import skips_example
from tests.helpers.pipelines import pipeline, random_workload, unchecked
from tests.oracle import random_placement, random_schedule

SIZES = {"num_devices": st.integers(1, 6), "num_microbatches": st.integers(1, 12)}


def durations_of(workload, rng):
    """Random ones, or whole numbers, so that tasks end together."""
    whole = rng.random() < 0.5
    return {task: float(rng.randint(0, 3)) if whole else rng.uniform(0.1, 3) for task in workload.waits_for}


def makespan(workload, schedule, durations=None):
    starts = start_times(workload, schedule, durations)
    return max(at + (1.0 if durations is None else durations[task]) for task, at in starts.items())


# --- laws of every schedule ---------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 32), name=st.sampled_from(list(SCHEDULES)))
def test_every_schedule_runs_every_task_once_after_what_it_waits_for(seed, name):
    rng = random.Random(seed)
    train = rng.random() < 0.85
    workload, _ = random_workload(rng, train=train, split=rng.random() < 0.6, updates=rng.random() < 0.5)
    durations = durations_of(workload, rng) if rng.random() < 0.7 else None
    schedule = make_schedule(name, workload, durations)
    assert schedule.name == name
    assert make_schedule(name, workload, durations) == schedule
    assert sorted(str(t) for line in schedule.tasks for t in line) == sorted(map(str, workload.waits_for))
    starts = start_times(workload, schedule, durations)

    def end(task):
        return starts[task] + (1.0 if durations is None else durations[task])

    for task, before in workload.waits_for.items():
        assert all(end(other) <= starts[task] for other in before)
    for device, line in enumerate(schedule.tasks):
        assert all(workload.device_of[task] == device for task in line)
        assert all(end(a) <= starts[b] for a, b in pairwise(line))
        assert all(
            task.kind == "U" for task in line[next((i for i, t in enumerate(line) if t.kind == "U"), len(line)) :]
        )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "options", [{}, {"train": False}, {"split": True, "updates": True}, {"barrier": 1}, {"barrier": 0}, {"barrier": 2}]
)
def test_every_schedule_takes_every_kind_of_pipeline(name, options):
    workload = pipeline(3, 4, **options)
    dry_run(workload, make_schedule(name, workload))


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(
        ArgumentError, match="no schedule '1F1B'; give 'gpipe', '1f1b', 'interleaved', 'zero-bubble', 'l"
    ):
        make_schedule("1F1B", pipeline(2, 2))


def test_tasks_that_wait_for_one_another_are_refused():
    program = pipeline(2, 1, train=False).program
    first, second = program.segments
    wires = tuple(replace(w, segment="s1.m0") if w.name == "a-1.m0" else w for w in program.wires)
    workload = Workload(unchecked(program, segments=(first, second), wires=wires))
    for name in set(SCHEDULES) - {"gpipe"}:
        with pytest.raises(ScheduleError, match="2 tasks of the program wait for one another"):
            make_schedule(name, workload)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_a_device_is_never_idle_while_a_task_is_ready(seed):
    """Without caps, the engine's own time is the time that the order takes: it never waits for a better task."""
    rng = random.Random(seed)
    workload, _ = random_workload(rng, split=True)
    durations = {task: rng.uniform(0.1, 3) for task in workload.waits_for}
    rank = {task: rng.random() for task in workload.waits_for}
    schedule = list_tasks("any", workload, Policy((np.array(list(rank.values())),)), durations)
    starts = start_times(workload, schedule, durations)
    for device, line in enumerate(schedule.tasks):
        busy = [(starts[t], starts[t] + durations[t]) for t in line]
        for task in line:
            ready = max((starts[o] + durations[o] for o in workload.waits_for[task]), default=0.0)
            waited = [(max(a, ready), min(b, starts[task])) for a, b in busy if a < starts[task] and b > ready]
            assert sum(b - a for a, b in waited) == pytest.approx(starts[task] - ready), (device, task)


def test_upward_ranks_are_longest_ways_to_the_end():
    workload = pipeline(2, 1, split=True)
    found = {workload.texts[task]: rank for task, rank in upward_ranks(workload).items()}
    assert found == {"0F0": 5, "1F0": 4, "1B0": 3, "1W0": 1, "0B0": 2, "0W0": 1}


# --- updates in schedules written by hand -------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 32), name=st.sampled_from(list(SCHEDULES)))
def test_an_update_before_a_task_that_reads_its_weights_or_makes_their_gradients_is_refused(seed, name):
    """What may follow an update is what has nothing to do with the weights at home on its device."""
    rng = random.Random(seed)
    split = rng.random() < 0.5
    workload, _ = random_workload(rng, split=split, updates=True)
    backward, segment = workload.backward, workload.program.segment
    schedule = make_schedule(name, workload)
    for device, line in enumerate(schedule.tasks):
        update = update_of(device)
        assert (update in line) == (device in workload.trained)
        if update not in line:
            continue
        weights = {wire.name for wire in workload.trained[device]}
        others = [task for task in line if task != update]
        at = rng.randint(0, len(others))

        def concerns(task, weights=weights):
            if task.kind == "F":
                return weights & set(segment[task.segment].inputs)
            return weights & {*segment[task.segment].inputs, *backward.segments[task.segment].inputs}

        moved = (*others[:at], update, *others[at:])
        text = schedule_text(
            workload, Schedule("", tuple(moved if d == device else x for d, x in enumerate(schedule.tasks)))
        )
        written = parse_schedule(workload, "by hand", text)
        if any(concerns(task) for task in others[at:]):
            with pytest.raises(
                ScheduleError, match=f"'by hand' would wait for ever: .*device {device} waits with {update} "
            ):
                dry_run(workload, written)
        elif all(workload.device_of[task] == device for task in workload.waits_for[update]):
            dry_run(workload, written)


def test_random_workloads_have_updates():
    found = [random_workload(random.Random(seed), updates=True)[0] for seed in range(50)]
    assert sum(bool(workload.trained) for workload in found) > 25


# --- what each schedule promises ----------------------------------------------------------------------------------


@given(**SIZES)
@settings(deadline=None)
def test_gpipes_bubble(num_devices, num_microbatches):
    """Huang et al., 2019, section 2.3, where all stages are equal."""
    workload = pipeline(num_devices, num_microbatches)
    ideal = (num_devices - 1) / (num_microbatches + num_devices - 1)
    time = makespan(workload, make_schedule("gpipe", workload))
    assert 1 - 2 * num_microbatches / time == pytest.approx(ideal)
    timeline = simulate_workload(*timed(workload, make_schedule("gpipe", workload)))
    assert timeline.bubble == pytest.approx(ideal)


def timed(workload, schedule):
    """A pipeline for the simulator: one operator of one second a stage, and links that take no time."""
    program, size = workload.program, workload.program.num_microbatches
    segments = tuple(
        replace(s, steps=(Step(f"o{s.level}", "toy", (), {}, (), share=1 / size),)) for s in program.segments
    )
    operators = tuple(
        Operator(f"o{i}", "aten.toy.default", (), flops_forward=size, flops_backward=size)
        for i in range(len({s.level for s in segments}))
    )
    devices = tuple(
        Device(f"cpu:{i}", "toy", {"float32": 1.0}, 10**9, 1e30, efficiency=1.0, overhead_s=0.0)
        for i in range(program.num_devices)
    )
    graph = Graph("Toy", (), operators, ())
    again = replace(workload, program=replace(program, graph=graph, segments=segments))
    return again, schedule, Cluster(devices, Link(0.0, float("inf")))


@given(**SIZES)
@settings(deadline=None)
def test_1f1b_is_as_fast_as_gpipe_with_fewer_microbatches_in_flight(num_devices, num_microbatches):
    workload = pipeline(num_devices, num_microbatches)
    gpipe, schedule = make_schedule("gpipe", workload), make_schedule("1f1b", workload)
    assert makespan(workload, schedule) == makespan(workload, gpipe)
    assert in_flight(workload, gpipe) == (num_microbatches,) * num_devices
    assert in_flight(workload, schedule) == tuple(min(num_devices - s, num_microbatches) for s in range(num_devices))


@given(**SIZES, seed=st.integers(0, 1 << 32), split=st.booleans())
@settings(deadline=None)
def test_1f1b_is_bounded_whatever_tasks_take(num_devices, num_microbatches, seed, split):
    workload = pipeline(num_devices, num_microbatches, split=split)
    schedule = make_schedule("1f1b", workload, durations_of(workload, random.Random(seed)))
    assert all(n <= num_devices - s for s, n in enumerate(in_flight(workload, schedule)))


@pytest.mark.parametrize("num_devices", range(1, 6))
@pytest.mark.parametrize("num_chunks", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_interleaved_bubble(num_devices, num_chunks, groups):
    """Narayanan et al., 2021, section 2.2.2: the bubble is 1F1B's with v times the microbatches."""
    num_microbatches = groups * num_devices
    workload = pipeline(num_devices, num_microbatches, num_chunks=num_chunks)
    schedule = make_schedule("interleaved", workload)
    work = 2 * num_chunks * num_microbatches
    ideal = (num_devices - 1) / (num_chunks * num_microbatches + num_devices - 1)
    assert 1 - work / makespan(workload, schedule) == pytest.approx(ideal)


@given(num_devices=st.integers(1, 6), num_microbatches=st.integers(1, 24))
@settings(deadline=None)
def test_zero_bubble_is_ahead_of_1f1b_in_the_same_memory(num_devices, num_microbatches):
    """Qi et al., 2024: each device is idle for (K - 1) (F + B - W), from K microbatches on."""
    workload = pipeline(num_devices, num_microbatches, split=True)
    schedule, plain = make_schedule("zero-bubble", workload), make_schedule("1f1b", workload)
    whole = pipeline(num_devices, num_microbatches)
    durations = {task: {"F": 1.0, "B": 2.0}[task.kind] for task in whole.waits_for}
    if num_devices > 1:
        assert makespan(workload, schedule) < makespan(whole, make_schedule("1f1b", whole, durations), durations)
    if num_devices > 1 and num_microbatches > 1:
        assert makespan(workload, schedule) < makespan(workload, plain)
    if num_microbatches >= num_devices:
        assert makespan(workload, schedule) == 3 * num_microbatches + num_devices - 1
    assert max(in_flight(workload, schedule)) <= num_devices


def test_list_scheduling_is_ahead_where_work_is_uneven():
    """What the long chain waits for goes first."""
    rng = random.Random(0)
    ahead = 0
    for _ in range(40):
        workload, _ = random_workload(rng)
        durations = {task: rng.choice([1.0, 1.0, 8.0]) for task in workload.waits_for}
        times = [makespan(workload, make_schedule(n, workload, durations), durations) for n in ("list", "gpipe")]
        ahead += (times[0] < times[1]) - (times[0] > times[1])
    assert ahead > 0


def test_a_barrier_lifts_the_caps_of_the_devices_before_it_only():
    workload = pipeline(4, 6, barrier=1)
    found = in_flight(workload, make_schedule("1f1b", workload))
    assert found == (6, 0, 2, 1)


def test_what_has_no_backward_begins_nothing():
    """Labels are counted on the last device before its stage runs at all; that uses up no cap."""
    workload = pipeline(2, 3)
    program, names = workload.program, tuple(f"count{m}" for m in range(3))
    model = program.segments[0]
    counts = [
        replace(model, name=n, device=1, microbatch=m, inputs=(), outputs=(n,), reach={}) for m, n in enumerate(names)
    ]
    total = replace(counts[0], name="total", microbatch=None, level=1, inputs=names, outputs=("total",))
    wires = [
        replace(program.wire["a1.m0"], name=c.name, segment=c.name, differentiable=False) for c in (*counts, total)
    ]
    stages = [replace(s, level=2, inputs=(*s.inputs, "total")) if s.device else s for s in program.segments]
    program = replace(program, segments=(*counts, total, *stages), wires=(*program.wires, *wires))
    workload = replace(workload, program=program)
    for name in ("1f1b", "interleaved"):
        schedule = make_schedule(name, workload)
        assert in_flight(workload, schedule)[1] == 1
        dry_run(workload, schedule)


# --- depths -------------------------------------------------------------------------------------------------------


def test_depths_of_chains_rings_and_diamonds():
    def of(num_devices, links, source_links=(), shared=False):
        program = pipeline(2, 1).program
        wire = program.wire["a0.m0"]
        assert wire.segment
        wires = [replace(wire, name=f"v{i}", value="v" if shared else f"v{i}") for i in range(len(links))]
        bridges = tuple(Bridge(f"v{i}", a, b, 4, i) for i, (a, b) in enumerate(links))
        bridges += tuple(Bridge("w0", a, b, 4, i) for i, (a, b) in enumerate(source_links))
        wires = (*program.wires, *wires)
        return depths(unchecked(program, num_devices=num_devices, bridges=bridges, wires=wires))

    assert of(4, [(0, 1), (1, 2), (2, 3)]) == (4, 3, 2, 1)
    assert of(3, [(2, 0), (0, 1)]) == (2, 1, 3)
    assert of(3, [(0, 1), (1, 0), (1, 2)]) == (3, 3, 1)  # two that feed each other are one group
    assert of(4, [(0, 1), (0, 2), (1, 3), (2, 3)]) == (3, 2, 2, 1)
    assert of(4, [(0, 2), (1, 3)]) == (2, 2, 1, 1)
    assert of(2, [(0, 1)], source_links=[(1, 0)]) == (2, 1)  # a parameter from elsewhere is there from the start
    assert of(3, []) == (1, 1, 1)
    # Parts of one value, to and fro: two that split an operator go together, and count once.
    assert of(3, [(0, 1), (1, 0), (1, 2)], shared=True) == (2, 2, 1)


# --- channels that do not buffer ----------------------------------------------------------------------------------


def run_through_channels(workload, schedule, rng):
    """Let devices work through channels as :func:`dry_run` describes them; returns the order of each channel.

    This knows nothing of ``waits_for``: a task needs its own device's earlier tasks, and messages. One device at a time
    makes one step, by chance.
    """
    program, backward = workload.program, workload.backward
    held = defaultdict(deque)  # sent, not yet taken, by (source, destination)
    order = defaultdict(list)
    stash = [set() for _ in range(program.num_devices)]
    position = [0] * program.num_devices
    parts = defaultdict(int)

    def send(bridge):
        held[bridge.source, bridge.destination].append(bridge.tag)
        order[bridge.source, bridge.destination].append(bridge.tag)

    def needs(task, device):
        if task.kind == "F":
            inputs = program.segment[task.segment].inputs
            return [b for b in program.bridges if b.destination == device and b.wire in inputs]
        if task.kind == "B":
            outputs = backward.segments[task.segment].outputs
            return [b for b in backward.bridges if b.destination == device and b.wire in outputs]
        return []

    def made(task, device):
        if task.kind == "F":
            outputs = program.segment[task.segment].outputs
            return [b for name in outputs for b in program.bridges if b.wire == name]
        if task.kind == "U":
            return []
        work, found = backward.segments[task.segment], []
        for name in work.inputs:
            if (workload.split and name in work.weights) == (task.kind == "W"):
                parts[name, device] += 1
                own = [s for s in backward.contributors[name] if program.segment[s].device == device]
                if parts[name, device] == len(own):
                    found += [b for b in backward.bridges if b.wire == name and b.source == device]
        return found

    for name in dict.fromkeys(b.wire for b in program.bridges if not program.wire[b.wire].segment):
        for bridge in program.bridges:
            if bridge.wire == name:
                send(bridge)
    moving = set(range(program.num_devices))
    while moving:
        device = rng.choice(sorted(moving))
        if position[device] == len(schedule.tasks[device]):
            moving.discard(device)
            continue
        task = schedule.tasks[device][position[device]]
        missing = [b for b in needs(task, device) if b.tag not in stash[device]]
        if missing:
            channel = held[missing[0].source, device]
            if channel:
                stash[device].add(channel.popleft())
            else:
                moving.discard(device)  # it waits for a message
            continue
        position[device] += 1
        for bridge in made(task, device):
            send(bridge)
            moving.add(bridge.destination)
    left = [line[at:] for at, line in zip(position, schedule.tasks, strict=True)]
    return {pair: tuple(tags) for pair, tags in order.items()}, left


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 32), name=st.sampled_from([*SCHEDULES, "random"]))
def test_channels_without_buffers_add_no_deadlock(seed, name):
    rng = random.Random(seed)
    workload, _ = random_workload(rng, split=name != "random" and rng.random() < 0.5)
    schedule = random_schedule(workload, rng) if name == "random" else make_schedule(name, workload)
    order, left = run_through_channels(workload, schedule, rng)
    assert not any(left)
    assert order == channels(workload, schedule)


@pytest.mark.parametrize("seed", range(3))
def test_workers_send_in_the_order_of_channels(seed):
    example = skips_example(7)
    parted = gp.partition(example.model, 3, strategy=random_placement("scattered", seed), num_microbatches=3)
    parted(*example.args)["loss"].backward()
    program = parted.plan.program
    (loss,) = (
        w for w, r in zip(program.outputs, parted.plan.graph.outputs, strict=True) if program.wire[w].shape == ()
    )
    workload = Workload(program, backward_of(program, [loss]))
    pair_of = {b.tag: (b.source, b.destination) for b in (*program.bridges, *workload.backward.bridges)}
    sent = defaultdict(tuple)
    for device in sorted(parted.last_step.counters):
        for tag in parted.last_step.counters[device].tags:
            sent[pair_of[tag]] += (tag,)
    assert sent == channels(workload, make_schedule("gpipe", workload))


def test_where_devices_wait_for_one_another_channels_do_too():
    workload = pipeline(2, 2)
    good = make_schedule("1f1b", workload)
    first, second = good.tasks
    bad = Schedule("bad", ((first[2], *first[:2], *first[3:]), second))  # backward before forward
    with pytest.raises(ScheduleError, match=r"'bad' would wait for ever: device 0 waits with B:s0.m0"):
        dry_run(workload, bad)
    assert run_through_channels(workload, bad, random.Random(0))[1] == [bad.tasks[0], second]


@pytest.mark.timeout(60)
def test_a_hundred_thousand_tasks_take_seconds():
    workload = pipeline(64, 512, split=True)
    schedule = make_schedule("zero-bubble", workload)
    assert sum(map(len, schedule.tasks)) == 3 * 64 * 512
    dry_run(workload, schedule)
