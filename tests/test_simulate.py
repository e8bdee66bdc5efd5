"""The simulator on programs small enough to follow by hand."""

from dataclasses import replace
from itertools import pairwise

import pytest

from graphpart.cost.time.task_times import task_times
from graphpart.errors import ScheduleError
from graphpart.ir.cluster import Cluster, Device, Link
from graphpart.ir.graph import Graph, Operator, Ref, Source, Value
from graphpart.ir.program import Backward, Bridge, Program, Segment, SegmentBackward, Step, Wire
from graphpart.ir.region import Region
from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.workload import Workload
from graphpart.simulator import simulate_workload
from tests.helpers.pipelines import unchecked

# One FLOP a second, memory that costs nothing, a link that takes 1 s and 0.25 s a byte: times can be read off.
DEVICES = tuple(
    Device(f"cuda:{i}", "toy", {"float32": 1.0}, 10**9, 1e30, efficiency=1.0, overhead_s=0.0) for i in (0, 1)
)
CLUSTER = Cluster(DEVICES, Link(1.0, 4.0))


def two_stage_graph(forward=(8.0, 12.0), backward=(16.0, 24.0)):
    """``a = f(x, w)``, ``b = g(a)``, for four samples."""
    return Graph(
        "Two",
        (
            Source(Value("x", (4,), "float32"), "input", ("args[0]",)),
            Source(Value("w", (1,), "float32"), "parameter", ("w",), True),
        ),
        tuple(
            Operator(
                name,
                "aten.toy.default",
                tuple(map(Ref, reads)),
                results=(Value(name, (4,), "float32", True),),
                flops_forward=forward[i],
                flops_backward=backward[i],
            )
            for i, (name, reads) in enumerate((("a", ["x", "w"]), ("b", ["a"])))
        ),
        (Ref("b"),),
        sample_dims={"x": 0},
    )


def wire(name, value, origin="segment", device=0, microbatch=None, segment="", size_bytes=4):
    return Wire(name, value, Region.full((1,)), (1,), "float32", size_bytes, origin, device, microbatch, segment, True)


def step(operator, reads, makes, target="aten.toy.default", share=1.0):
    return Step(operator, target, tuple(map(Ref, reads)), {}, (makes,), share=share)


def pipeline(num_microbatches, home=0):
    """Operator a on device 0, b on device 1, and the backward pass from b."""
    wires = [wire("w", "w", "parameter", home)]
    segments, bridges = [], []
    if home != 0:
        bridges.append(Bridge("w", home, 0, 4, 0))
    for m in range(num_microbatches):
        wires += [
            wire(f"x{m}", "x", "input", microbatch=m),
            wire(f"a{m}", "a", device=0, microbatch=m, segment=f"S{m}"),
            wire(f"b{m}", "b", device=1, microbatch=m, segment=f"T{m}"),
        ]
        part = 1 / num_microbatches
        steps = (step("a", [f"x{m}", "w"], f"a{m}", share=part),), (step("b", [f"a{m}"], f"b{m}", share=part),)
        segments.append(Segment(f"S{m}", 0, m, 0, steps[0], (f"x{m}", "w"), (f"a{m}",), fraction=part))
        segments.append(Segment(f"T{m}", 1, m, 1, steps[1], (f"a{m}",), (f"b{m}",), fraction=part))
        bridges.append(Bridge(f"a{m}", 0, 1, 4, len(bridges)))
    sizes = (4 // num_microbatches,) * num_microbatches
    program = Program(
        two_stage_graph(), 2, num_microbatches, sizes, tuple(wires), tuple(segments), tuple(bridges), ("b0",), ()
    )
    parts = range(num_microbatches)
    back = [Bridge(f"a{m}", 1, 0, 4, m) for m in parts] + ([Bridge("w", 0, home, 4, 99)] if home else [])
    backward = Backward(
        live=tuple(f"b{m}" for m in parts),
        segments={f"S{m}": SegmentBackward((f"a{m}",), ("w",)) for m in parts}
        | {f"T{m}": SegmentBackward((f"b{m}",), (f"a{m}",)) for m in parts},
        contributors={f"a{m}": (f"T{m}",) for m in parts} | {"w": tuple(f"S{m}" for m in parts)},
        gradient_devices={f"a{m}": (1,) for m in parts} | {"w": (0,)},
        bridges=tuple(back),
        sources=("w",),
    )
    return program, backward


def schedule(num_microbatches, name="gpipe"):
    forward = tuple(tuple(Task("F", f"{s}{m}") for m in range(num_microbatches)) for s in "ST")
    backward = tuple(tuple(Task("B", f"{s}{m}") for m in reversed(range(num_microbatches))) for s in "ST")
    return Schedule(name, tuple(f + b for f, b in zip(forward, backward, strict=True)))


def forward_only(num_microbatches, name="gpipe"):
    return Schedule(name, schedule(num_microbatches).forward)


def spans(timeline):
    return {f"{e.kind}:{e.name}": (e.start_s, e.end_s) for e in timeline.events}


def test_one_device_is_the_sum_of_its_operators():
    wires = (wire("x", "x", "input"), wire("w", "w", "parameter"), wire("b", "b", segment="S"))
    steps = (step("a", ["x", "w"], "a"), step("b", ["a"], "b"))
    segments = (Segment("S", 0, None, 0, steps, ("x", "w"), ("b",)),)
    program = Program(two_stage_graph(), 1, 1, (4,), wires, segments, (), ("b",), ())
    timeline = simulate_workload(Workload(program), Schedule("one", ((Task("F", "S"),),)), CLUSTER)
    assert spans(timeline) == {"F:S": (0.0, 20.0)}
    assert timeline.makespan_s == 20.0
    assert timeline.bubble == 0.0
    assert (timeline.num_messages, timeline.message_bytes) == (0, 0)


def test_a_message_takes_latency_and_bandwidth():
    program, _ = pipeline(1)
    timeline = simulate_workload(Workload(program), forward_only(1), CLUSTER)
    assert spans(timeline) == {"F:S0": (0.0, 8.0), "send:a0": (8.0, 10.0), "F:T0": (10.0, 22.0)}
    assert (timeline.num_messages, timeline.message_bytes) == (1, 4)
    send = next(e for e in timeline.events if e.kind == "send")
    assert (send.device, send.microbatch) == (0, 0)


def test_microbatches_overlap_with_messages_and_with_each_other():
    program, _ = pipeline(2)
    timeline = simulate_workload(Workload(program), forward_only(2), CLUSTER)
    assert spans(timeline) == {
        "F:S0": (0.0, 4.0),
        "F:S1": (4.0, 8.0),
        "send:a0": (4.0, 6.0),
        "send:a1": (8.0, 10.0),
        "F:T0": (6.0, 12.0),
        "F:T1": (12.0, 18.0),
    }
    assert timeline.busy_s == (8.0, 12.0)


def test_backward_mirrors_forward():
    program, backward = pipeline(2)
    timeline = simulate_workload(Workload(program, backward), schedule(2), CLUSTER)
    found = spans(timeline)
    assert found["B:T1"] == (18.0, 30.0)
    assert found["B:T0"] == (30.0, 42.0)
    assert found["B:S1"] == (32.0, 40.0)
    assert found["B:S0"] == (44.0, 52.0)
    gradients = [(e.name, e.device, e.start_s) for e in timeline.events if e.kind == "send"][2:]
    assert gradients == [("a1", 1, 30.0), ("a0", 1, 42.0)]
    assert timeline.makespan_s == 52.0
    assert timeline.num_messages == program.num_messages + backward.num_messages == 4
    assert timeline.message_bytes == program.message_bytes + backward.message_bytes == 16


def test_parameters_cross_first_and_their_gradient_last():
    program, backward = pipeline(2, home=1)
    timeline = simulate_workload(Workload(program, backward), schedule(2), CLUSTER)
    found = [e for e in timeline.events if e.name == "w"]
    assert [(e.device, e.start_s, e.end_s) for e in found] == [(1, 0.0, 2.0), (0, 54.0, 56.0)]


def test_a_link_carries_one_message_at_a_time():
    program, _ = pipeline(4)
    slow = replace(CLUSTER, default_link=Link(3.0, 4.0))
    timeline = simulate_workload(Workload(program), forward_only(4), slow)
    sends = [e for e in timeline.events if e.kind == "send"]
    # A stage makes a value every 2 s; a message takes 4 s.
    assert [(e.start_s, e.end_s) for e in sends] == [(2.0, 6.0), (6.0, 10.0), (10.0, 14.0), (14.0, 18.0)]


def test_links_in_opposite_directions_do_not_wait_for_each_other():
    program, backward = pipeline(2)
    asymmetric = replace(CLUSTER, links={(1, 0): Link(10.0, 4.0)})
    found = spans(simulate_workload(Workload(program, backward), schedule(2), asymmetric))
    assert found["F:T0"] == (6.0, 12.0)
    assert found["B:S1"][0] == 30.0 + 11.0


def test_unlike_devices_take_their_own_times():
    fast = replace(DEVICES[1], flops_per_s={"float32": 4.0})
    cluster = replace(CLUSTER, devices=(DEVICES[0], fast))
    timeline = simulate_workload(Workload(pipeline(1)[0]), forward_only(1), cluster)
    assert timeline.makespan_s == 8.0 + 2.0 + 3.0


def test_tiles_take_their_shares_of_the_work():
    program, _ = pipeline(1)
    shares = (0.75, 0.25)
    tiles = tuple(
        Segment(f"H{d}", d, 0, 0, (step("a", ["x0", "w"], f"h{d}", share=shares[d]),), ("x0", "w"), (f"h{d}",))
        for d in (0, 1)
    )
    wires = (*program.wires[:2], wire("h0", "a", segment="H0"), wire("h1", "a", device=1, segment="H1"))
    bridges = (Bridge("w", 0, 1, 4, 0),)
    cut = replace(program, wires=wires, segments=tiles, bridges=bridges, outputs=())
    times = task_times(Workload(cut), CLUSTER)
    assert [times[Task("F", n)] for n in ("H0", "H1")] == [6.0, 2.0]


def test_parts_of_bridges_cost_traffic_and_views_their_start():
    program, _ = pipeline(1)
    device = replace(DEVICES[0], memory_bandwidth_bytes_per_s=2.0, overhead_s=0.5)
    steps = (step("a", ["a0"], "part", "graphpart.slice"), step("seen", ["part"], "seen", "aten.view.default"))
    graph = two_stage_graph()
    seen = Operator("seen", "aten.view.default", (Ref("a"),), results=(Value("seen", (4,), "float32", True),))
    graph = replace(graph, operators=(*graph.operators, seen))
    program = replace(program, graph=graph, segments=(replace(program.segments[0], steps=steps), program.segments[1]))
    times = task_times(Workload(program), replace(CLUSTER, devices=(device, DEVICES[1])))
    assert times[Task("F", "S0")] == 4 / 2.0 + 0.5 + 0.5


def test_every_dependency_is_kept_and_devices_do_one_thing_at_a_time():
    program, backward = pipeline(4, home=1)
    timeline = simulate_workload(Workload(program, backward), schedule(4), CLUSTER)
    at = {Task(e.kind, e.name): e for e in timeline.events if e.kind != "send"}
    for task, before in Workload(program, backward).waits_for.items():
        assert all(at[task].start_s >= at[other].end_s for other in before)
    for d in (0, 1):
        mine = [e for e in timeline.events if e.kind != "send" and e.device == d]
        assert all(a.end_s <= b.start_s for a, b in pairwise(mine))


def test_an_order_that_waits_for_ever_is_refused():
    program, _ = pipeline(2)
    crossed = replace(program, wires=(*program.wires, wire("back", "b", device=1, microbatch=1, segment="T1")))
    first = replace(crossed.segments[0], inputs=("x0", "w", "back"))
    crossed = unchecked(
        crossed, segments=(first, *crossed.segments[1:]), bridges=(*crossed.bridges, Bridge("back", 1, 0, 4, 9))
    )
    with pytest.raises(ScheduleError, match=r"'gpipe'.*device 0 .*F:S0 for F:T1, message 'back' from device 1"):
        simulate_workload(Workload(crossed), forward_only(2), CLUSTER)


def test_wrong_schedules_and_small_clusters_are_refused():
    program, _ = pipeline(1)
    with pytest.raises(ScheduleError, match="task F:Q"):
        simulate_workload(Workload(program), Schedule("odd", ((Task("F", "Q"),), ())), CLUSTER)
    with pytest.raises(ScheduleError, match="needs 2 devices"):
        simulate_workload(Workload(program), forward_only(1), replace(CLUSTER, devices=DEVICES[:1]))
