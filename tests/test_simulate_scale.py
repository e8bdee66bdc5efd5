"""The simulator's work grows with the number of tasks; what it gives follows the formulas of pipelines."""

import sys
from collections import Counter
from dataclasses import replace

import pytest

import graphpart as gp
from graphpart import simulator
from graphpart.cost.time.task_times import task_times
from graphpart.errors import ClusterError, ScheduleError
from graphpart.ir.cluster import Cluster, Device, Link, SharedLink
from graphpart.ir.graph import Graph, Operator, Ref, Source, Value
from graphpart.ir.program import Bridge, Program, Segment, Step, Wire
from graphpart.ir.region import Region
from graphpart.ir.schedule import Schedule, Task, update_of
from graphpart.ir.workload import Workload
from graphpart.order import gpipe
from graphpart.order.registry import SCHEDULES
from graphpart.simulator import simulate_workload
from tests.helpers.pipelines import pipeline

UNIT_S = {"F": 1.0, "B": 2.0, "W": 1.0, "U": 0.5}
EMPTY = Graph("Empty", (), (), ())


def cluster(num_devices, link=None, **options):
    device = Device("", "toy", {"float32": 1.0}, 10**9, 1.0, efficiency=1.0, overhead_s=0.0)
    devices = tuple(replace(device, name=f"toy:{i}") for i in range(num_devices))
    return Cluster(devices, link or Link(0.0, 1e30), **options)


def forecast(workload, schedule, machine=None, times=None):
    times = times or {task: UNIT_S[task.kind] for task in workload.waits_for}
    machine = machine or cluster(workload.program.num_devices)
    return simulate_workload(workload, schedule, machine, times=times)


def lines_run(num_devices, num_microbatches):
    """How often a line of the simulator runs for each task and message, counted by a tracer."""
    workload = pipeline(num_devices, num_microbatches)
    schedule = gpipe(workload)
    machine = cluster(num_devices)
    times = {task: UNIT_S[task.kind] for task in workload.waits_for}
    count = Counter()

    def trace(frame, event, argument):
        if frame.f_code.co_filename != simulator.__file__:
            return None
        count[event] += 1
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        timeline = simulate_workload(workload, schedule, machine, times=times)
    finally:
        sys.settrace(old)
    return count["line"] / len(timeline.events)


@pytest.mark.parametrize(("num_devices", "num_microbatches"), [(4, 64), (64, 4), (16, 16)])
def test_work_grows_with_the_tasks_whatever_the_number_of_devices(num_devices, num_microbatches):
    small = lines_run(num_devices, num_microbatches)
    assert lines_run(2 * num_devices, num_microbatches) <= 1.05 * small
    assert lines_run(num_devices, 2 * num_microbatches) <= 1.05 * small


@pytest.mark.parametrize(("num_devices", "num_microbatches"), [(2, 4), (8, 3), (16, 32)])
def test_the_bubble_of_gpipe_is_the_formulas(num_devices, num_microbatches):
    workload = pipeline(num_devices, num_microbatches)
    timeline = forecast(workload, gpipe(workload))
    expected = (num_devices - 1) / (num_microbatches + num_devices - 1)
    assert timeline.bubble == pytest.approx(expected)
    assert len(timeline.events) == 2 * num_devices * num_microbatches + timeline.num_messages


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_keeps_every_dependency(name):
    workload = pipeline(4, 8, split=SCHEDULES[name].split, updates=True)
    timeline = forecast(workload, SCHEDULES[name].make(workload, None))
    at = {Task(e.kind, e.name): e for e in timeline.events if e.is_work}
    assert at.keys() == workload.waits_for.keys()
    for task, before in workload.waits_for.items():
        assert all(at[task].start_s >= at[other].end_s for other in before)
    assert at[update_of(0)].microbatch is None


def test_gradients_of_weights_fill_bubbles():
    whole, split = pipeline(4, 8), pipeline(4, 8, split=True)
    one_by_one = forecast(whole, SCHEDULES["1f1b"].make(whole, None))
    times = {t: {"F": 1.0, "B": 1.0, "W": 1.0}[t.kind] for t in split.waits_for}
    in_two = forecast(split, SCHEDULES["zero-bubble"].make(split, None), times=times)
    assert in_two.busy_s == one_by_one.busy_s and in_two.makespan_s < one_by_one.makespan_s


def test_a_task_in_the_schedule_twice_is_refused():
    workload = pipeline(1, 1, train=False)
    with pytest.raises(ScheduleError, match=r"has task F:s0\.m0 twice"):
        forecast(workload, Schedule("odd", ((Task("F", "s0.m0"),) * 2,)))


def crossing(pairs, **options):
    """A message between each pair of devices, all ready at once; spans by pair, 2 s each alone."""
    part = Region.full((1,))
    made = [Wire(f"a{i}", "a", part, (1,), "float32", 4, "segment", s, 0, f"S{i}") for i, (s, _) in enumerate(pairs)]
    segments = [Segment(f"S{i}", s, 0, 0, (), (), (f"a{i}",)) for i, (s, _) in enumerate(pairs)]
    segments += [Segment(f"R{i}", d, 0, 1, (), (f"a{i}",), ()) for i, (_, d) in enumerate(pairs)]
    bridges = tuple(Bridge(f"a{i}", s, d, 4, i) for i, (s, d) in enumerate(pairs))
    workload = Workload(Program(EMPTY, 4, 1, (1,), tuple(made), tuple(segments), bridges, (), ()))
    times = dict.fromkeys(workload.waits_for, 0.0)
    timeline = forecast(workload, gpipe(workload), cluster(4, Link(1.0, 4.0), **options), times)
    return {(e.device, e.peer): (e.start_s, e.end_s) for e in timeline.events if e.kind == "send"}


def test_messages_queue_where_their_ways_meet():
    pairs = [(0, 2), (1, 3), (2, 0)]
    assert set(crossing(pairs).values()) == {(0.0, 2.0)}
    card = SharedLink("card", frozenset((0, 1)), frozenset((2, 3)))
    assert crossing(pairs, shared=(card,)) == {(0, 2): (0.0, 2.0), (1, 3): (2.0, 4.0), (2, 0): (0.0, 2.0)}
    switch = SharedLink("switch", frozenset(range(4)), frozenset(range(4)))
    assert crossing(pairs, shared=(card, switch)) == {(0, 2): (0.0, 2.0), (1, 3): (2.0, 4.0), (2, 0): (4.0, 6.0)}


def test_shared_links_name_devices():
    with pytest.raises(ClusterError, match=r"'card' names device 4, outside 0\.\.3"):
        cluster(4, shared=(SharedLink("card", frozenset((0, 4)), frozenset((1,))),))
    with pytest.raises(ClusterError, match="'card' needs at least one source"):
        cluster(4, shared=(SharedLink("card", frozenset(), frozenset((1,))),))


def test_bytes_are_told_apart_by_link():
    workload = pipeline(3, 2)
    timeline = forecast(workload, gpipe(workload))
    assert timeline.link_bytes == {(0, 1): 8, (1, 2): 8, (2, 1): 8, (1, 0): 8}
    assert sum(timeline.link_bytes.values()) == timeline.message_bytes


def weighted(first_wants_gradient):
    """``y = linear(x, w)``, split: its workload; 8 FLOPs forward, 8 a gradient."""
    value = Value("y", (4,), "float32", True)
    flops = 8.0 * (1 + first_wants_gradient)
    op = Operator("y", "aten.linear.default", (Ref("x"), Ref("w")), results=(value,), flops_forward=8.0,
                  flops_backward=flops)  # fmt: skip
    sources = (Source(Value("x", (4,), "float32", first_wants_gradient), "input", ("args[0]",)),
               Source(Value("w", (3,), "float32", True), "parameter", ("w",), True))  # fmt: skip
    base = pipeline(1, 1, split=True, updates=True)
    step = Step("y", "aten.linear.default", (Ref("a-1.m0"), Ref("w0")), {}, ("a0.m0",))
    program = base.program
    wires = tuple(replace(w, differentiable=first_wants_gradient) if w.origin == "input" else w for w in program.wires)
    graph = Graph("Linear", sources, (op,), (Ref("y"),))
    program = replace(program, graph=graph, wires=wires, segments=(replace(program.segments[0], steps=(step,)),))
    return replace(base, program=program)


@pytest.mark.parametrize(("first_wants_gradient", "b_s", "w_s"), [(True, 8.0, 8.0), (False, 0.0, 8.0)])
def test_the_gradient_of_a_weight_takes_its_part_of_the_backward(first_wants_gradient, b_s, w_s):
    workload = weighted(first_wants_gradient)
    device = replace(cluster(1).devices[0], memory_bandwidth_bytes_per_s=1e30)
    times = task_times(workload, replace(cluster(1), devices=(device,)))
    assert times[Task("F", "s0.m0")] == 8.0
    assert (times[Task("B", "s0.m0")], times[Task("W", "s0.m0")]) == (b_s, w_s)


def test_an_update_is_traffic_of_memory():
    workload = weighted(True)
    adamw, sgd = (task_times(workload, cluster(1), optimizer_bytes_per_element=size)[update_of(0)] for size in (8, 0))
    # One element: parameter and gradient read, parameter written, 4 bytes each; two moments read and written.
    assert (adamw, sgd) == (12 + 16, 12)


def test_the_face_has_shared_links():
    assert gp.SharedLink is SharedLink
