"""Time of an operator by the roofline, and memory of a placement."""

import pytest

from graphpart.cost import DeviceMemory, forecast_memory, operator_time, operator_works, step_time
from graphpart.cost.storage import storage_roots
from graphpart.cost.time.roofline import sample_values
from graphpart.errors import ArgumentError, OutOfMemoryError
from graphpart.ir.axes import AxisRule, Window
from graphpart.ir.cluster import Cluster, Device, Link
from graphpart.ir.graph import Graph, Operator, Ref, Source, Value
from graphpart.ir.placement import Placement, Shard, Tile
from graphpart.ir.quantities import format_bytes
from graphpart.ir.region import Intervals, Region

DEVICE = Device("cuda:0", "toy", {"float32": 1e12, "bfloat16": 4e12}, 10**6, 1e9, efficiency=0.5, overhead_s=1e-6)


def source(name, shape, kind="parameter", trainable=True, names=None):
    return Source(Value(name, shape, "float32"), kind, names or (name,), trainable and kind == "parameter")


def operator(name, reads, shape, target="aten.linear.default", dtype="float32", grad=True, **fields):
    args = tuple(Ref(r) for r in reads)
    return Operator(name, target, args, results=(Value(name, shape, dtype, grad),), **fields)


def two_layers():
    """Input [4, 8] through two layers of 8 x 8 with a view between; the first keeps its input, the second the view."""
    return Graph(
        "Two",
        (source("x", (4, 8), "input"), source("w1", (8, 8)), source("w2", (8, 8)), source("b", (8,), "buffer")),
        (
            operator("a", ["x", "w1"], (4, 8), flops_forward=512, flops_backward=1024, saved=("x", "w1")),
            operator("v", ["a"], (4, 8), "aten.view.default"),
            operator("c", ["v", "w2", "b"], (4, 8), saved=("v", "w2", "b"), saved_extra_bytes=10),
            operator("d", ["a", "c"], (), saved=("a", "c")),
        ),
        (Ref("d"),),
        sample_dims={"x": 0},
    )


def test_time_is_the_longer_of_arithmetic_and_traffic_plus_overhead():
    graph = Graph(
        "G",
        (source("x", (4, 8), "input"), source("w", (8, 8))),
        (operator("a", ["x", "w"], (4, 8), flops_forward=5e6, flops_backward=2e3, saved=("x", "w")),),
        (Ref("a"),),
    )
    work = operator_works(graph)["a"]
    assert work.bytes_forward == (32 + 64 + 32) * 4
    time = operator_time(work, DEVICE)
    assert time.forward_s == pytest.approx(5e6 / 0.5e12 + 1e-6)  # bound by arithmetic
    # Bound by traffic: saved operands, the gradient of the result; neither source has requires_grad here.
    assert time.backward_s == pytest.approx((32 + 64 + 32) * 4 / 1e9 + 1e-6)
    assert time.total_s == time.forward_s + time.backward_s


def test_rate_follows_the_dtype_and_falls_back_to_float32():
    def forward_s(dtype):
        op = operator("a", ["x"], (1,), dtype=dtype, flops_forward=1e12)
        work = operator_works(Graph("G", (source("x", (1,), "input"),), (op,), ()))["a"]
        return operator_time(work, DEVICE).forward_s - DEVICE.overhead_s

    assert forward_s("bfloat16") == pytest.approx(forward_s("float32") / 4)
    assert forward_s("float16") == pytest.approx(forward_s("float32"))


def test_views_cost_only_their_overhead():
    work = operator_works(two_layers())["v"]
    assert operator_time(work, DEVICE).forward_s == operator_time(work, DEVICE).backward_s == DEVICE.overhead_s


def test_no_gradient_no_backward():
    op = operator("a", ["x"], (4,), grad=False, flops_forward=5, flops_backward=7)
    work = operator_works(Graph("G", (source("x", (4,), "input"),), (op,), ()))["a"]
    assert operator_time(work, DEVICE).backward_s == 0


def test_embedding_reads_only_the_rows_it_needs():
    graph = Graph(
        "G",
        (source("w", (1000, 8)), source("i", (4,), "input")),
        (operator("e", ["w", "i"], (4, 8), "aten.embedding.default"),),
        (),
    )
    assert operator_works(graph)["e"].bytes_forward == (32 + 4 + 32) * 4


def test_fraction_shrinks_the_work_but_not_the_overhead():
    work = operator_works(two_layers())["a"]
    whole, half = operator_time(work, DEVICE), operator_time(work, DEVICE, 0.5)
    assert half.forward_s - DEVICE.overhead_s == pytest.approx((whole.forward_s - DEVICE.overhead_s) / 2)
    assert step_time(work, DEVICE, 4).forward_s == pytest.approx(whole.forward_s + 3 * DEVICE.overhead_s)


def test_what_carries_no_samples_runs_once_and_whole():
    graph = Graph(
        "G",
        (source("x", (4,), "input"), source("w", (4,))),
        (operator("s", ["w"], (4,), "aten.exp.default"), operator("y", ["x", "s"], (4,)), operator("l", ["y"], ())),
        (Ref("l"),),
        sample_dims={"x": 0},
    )
    assert sample_values(graph) == {"x", "y"}
    works = operator_works(graph)
    assert [works[n].carries_samples for n in "syl"] == [False, True, True]
    assert step_time(works["s"], DEVICE, 4) == operator_time(works["s"], DEVICE)


def test_views_share_storage():
    assert storage_roots(two_layers())["v"] == "a"


def test_memory_on_one_device():
    graph = two_layers()
    memory = forecast_memory(graph, Placement.whole(graph, dict.fromkeys("avcd", 0)), 2)
    # Saved: x, a (once, though c keeps a view of it and d itself), c; 128 bytes each.
    assert memory.devices == (DeviceMemory(512, 512, 1024, 32, 3 * 128 + 10), DeviceMemory())
    assert memory.peak_bytes == memory.devices[0].total_bytes == 512 + 512 + 1024 + 32 + 394


def test_memory_of_a_split_keeps_on_each_device_what_its_operators_save():
    graph = two_layers()
    memory = forecast_memory(graph, Placement.whole(graph, {"a": 0, "v": 0, "c": 1, "d": 1}), 2)
    assert memory.devices == (DeviceMemory(256, 256, 512, 0, 128), DeviceMemory(256, 256, 512, 32, 2 * 128 + 10))


def test_memory_with_microbatches_in_flight():
    graph = two_layers()
    placement = Placement.whole(graph, {"a": 0, "v": 0, "c": 1, "d": 1})

    def saved(**options):
        found = forecast_memory(graph, placement, 2, num_microbatches=4, **options)
        return [d.saved_bytes for d in found.devices]

    assert saved() == saved(in_flight=4) == [128, 266]
    assert saved(in_flight=1) == [32, 2 * 32 + 3]
    assert saved(in_flight=[2, 1]) == [64, 2 * 32 + 3]


def test_memory_of_a_tied_parameter_counts_a_copy_where_it_is_used():
    ops = (operator("a", ["x", "w"], (4, 4)), operator("b", ["a", "w"], (4, 4)))
    graph = Graph("Tied", (source("x", (4, 4), "input"), source("w", (4, 4))), ops, (Ref("b"),))
    memory = forecast_memory(graph, Placement.whole(graph, {"a": 0, "b": 1}), 2)
    assert memory.devices == (DeviceMemory(64, 64, 128), DeviceMemory(64, 64, 0))


def test_memory_without_training():
    op = operator("a", ["x", "w"], (4, 4), grad=False)
    graph = Graph("G", (source("x", (4, 4), "input"), source("w", (4, 4))), (op,), (Ref("a"),))
    assert forecast_memory(graph, Placement.whole(graph, {"a": 0}), 1).devices == (DeviceMemory(64),)


def test_frozen_parameters_have_no_gradient_or_state():
    graph = two_layers()
    frozen = Graph(
        "G", (graph.sources[0], source("w1", (8, 8), trainable=False), *graph.sources[2:]), graph.operators, ()
    )
    (memory,) = forecast_memory(frozen, Placement.whole(frozen, dict.fromkeys("avcd", 0)), 1).devices
    assert (memory.parameters_bytes, memory.gradients_bytes, memory.optimizer_bytes) == (512, 256, 512)


def test_memory_of_tiles_is_that_of_their_regions():
    rule = AxisRule({"b": 4, "n": 8, "k": 8}, ((("b",), ("k",)), (("n",), ("k",))), ((("b",), ("n",)),), frozenset("k"))
    op = operator("a", ["x", "w"], (4, 8), saved=("x", "a"), saved_extra_bytes=40, rule=rule)
    graph = Graph("G", (source("x", (4, 8), "input"), source("w", (8, 8))), (op,), (Ref("a"),))
    tiles = (Tile(0, {"n": Intervals.span(0, 6)}), Tile(1, {"n": Intervals.span(6, 8)}))
    memory = forecast_memory(graph, Placement({"a": tiles}, {"w": 0}), 2)
    assert memory.devices == (
        DeviceMemory(256, 256, 512, 0, 128 + 4 * 6 * 4 + 30),
        DeviceMemory(64, 64, 0, 0, 128 + 4 * 2 * 4 + 10),
    )


def linear_graph(saved=(), **fields):
    rule = AxisRule({"b": 4, "n": 8, "k": 8}, ((("b",), ("k",)), (("n",), ("k",))), ((("b",), ("n",)),), frozenset("k"))
    op = operator("a", ["x", "w"], (4, 8), saved=saved, rule=rule, **fields)
    return Graph("G", (source("x", (4, 8), "input"), source("w", (8, 8))), (op,), (Ref("a"),))


def halves(axis):
    return tuple(Tile(i, {axis: Intervals.span(4 * i, 4 * i + 4)}) for i in range(2))


ROWS = tuple(Shard(i, Region((Intervals.span(5 * i, 5 + 3 * i), Intervals.full(8)))) for i in range(2))


def test_memory_of_a_cut_home_is_that_of_its_parts():
    graph = linear_graph()
    own = tuple(Tile(s.device, {"n": s.region.dims[0]}) for s in ROWS)
    memory = forecast_memory(graph, Placement({"a": own}, {}, {"w": ROWS}), 3)
    assert memory.devices == (DeviceMemory(160, 160, 320), DeviceMemory(96, 96, 192), DeviceMemory())


def test_memory_of_what_tiles_read_beyond_their_own_part_is_a_copy_with_its_gradient():
    graph = linear_graph()
    # Rows 0 to 3 lie in device 0's part of 5; rows 4 to 7 are put together on device 1, which keeps 5 to 7.
    memory = forecast_memory(graph, Placement({"a": halves("n")}, {}, {"w": ROWS}), 2)
    assert memory.devices == (DeviceMemory(160, 160, 320), DeviceMemory(96 + 128, 96 + 128, 192))
    # Every replica reads all of it, whoever keeps the parts.
    replicas = tuple(Tile(i) for i in range(3))
    memory = forecast_memory(graph, Placement({"a": replicas}, {}, {"w": ROWS}), 3)
    assert memory.devices == (
        DeviceMemory(160 + 256, 160 + 256, 320), DeviceMemory(96 + 256, 96 + 256, 192), DeviceMemory(256, 256),
    )  # fmt: skip


def test_memory_of_replicas_counts_on_each_device():
    graph = linear_graph(("x", "a"), saved_extra_bytes=40)
    memory = forecast_memory(graph, Placement({"a": (Tile(0), Tile(1))}, {"w": 0}), 2)
    assert [d.saved_bytes for d in memory.devices] == [128 + 128 + 40] * 2


def test_memory_of_tiles_of_the_contracted_axis_keeps_whole_partial_results():
    graph = linear_graph(("x", "a"))
    memory = forecast_memory(graph, Placement({"a": halves("k")}, {"w": 0}), 2)
    assert [d.saved_bytes for d in memory.devices] == [64 + 128] * 2


def test_memory_of_windows_counts_the_halo_and_not_what_lies_outside():
    rule = AxisRule({"h": 8}, ((Window("h", 8, start=-1, size=3),),), ((("h",),),))
    op = operator("y", ["x"], (8,), saved=("x", "y"), rule=rule)
    graph = Graph("G", (source("x", (8,), "input"),), (op,), (Ref("y"),))
    memory = forecast_memory(graph, Placement({"y": halves("h")}), 2)
    assert [d.saved_bytes for d in memory.devices] == [4 * (5 + 4)] * 2
    # One half of a concatenation reads nothing of the other operand.
    dims = (Window("h", 4), Window("h", 4, start=-4))
    rule = AxisRule({"h": 8}, tuple((dim,) for dim in dims), ((("h",),),))
    op = operator("y", ["u", "w"], (8,), saved=("u",), rule=rule)
    graph = Graph("G", (source("u", (4,), "input"), source("w", (4,))), (op,), (Ref("y"),))
    memory = forecast_memory(graph, Placement({"y": halves("h")}, {"w": 1}), 2)
    assert memory.devices == (DeviceMemory(saved_bytes=16), DeviceMemory(16, 16, 32))


def test_memory_of_an_axis_that_lowering_rewrites():
    rule = AxisRule({"b": 8}, ((("b",),),), ((),), whole=frozenset("b"), rewritten=frozenset("b"))
    op = operator("m", ["x"], (), saved=("x",), saved_extra_bytes=80, rule=rule)
    graph = Graph("G", (source("x", (8,), "input"),), (op,), (Ref("m"),))
    tiles = (Tile(0, {"b": Intervals.span(0, 6)}), Tile(1, {"b": Intervals.span(6, 8)}))
    assert [d.saved_bytes for d in forecast_memory(graph, Placement({"m": tiles}), 2).devices] == [24 + 60, 8 + 20]


def test_too_little_memory_is_said_with_device_bytes_and_largest_contents():
    graph = two_layers()
    placement = Placement.whole(graph, dict.fromkeys("avcd", 0))
    memory = forecast_memory(graph, placement, 1)
    needed = memory.peak_bytes

    def cluster(memory_bytes):
        return Cluster((Device("cuda:0", "toy", {"float32": 1.0}, memory_bytes, 1.0),), Link(0, 1))

    memory.check(graph, placement, cluster(needed))
    memory.check(graph, placement, cluster(2 * needed), memory_reserve=0.5)
    with pytest.raises(OutOfMemoryError) as error:
        memory.check(graph, placement, cluster(needed - 1))
    text = str(error.value)
    for words in (
        "'cuda:0'",
        format_bytes(needed),
        "1 B too few",
        "operator d",
        "parameter w1 takes 1.02 kB",
        "smaller batch",
    ):
        assert words in text
    with pytest.raises(OutOfMemoryError):
        memory.check(graph, placement, cluster(2 * needed - 2), memory_reserve=0.5)
    with pytest.raises(ArgumentError, match="memory_reserve"):
        memory.check(graph, placement, cluster(needed), memory_reserve=1.0)


def test_bytes_for_people():
    assert [format_bytes(n) for n in (0, 999, 1024, 3e6, 80e9, 2e12)] == [
        "0 B", "999 B", "1.02 kB", "3 MB", "80 GB", "2 TB",
    ]  # fmt: skip
