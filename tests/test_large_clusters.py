"""Plans for many devices: shown in groups, made in time that grows no faster than the microbatches."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graphpart.cost import make_cluster
from graphpart.draw.words.groups import MOST_DEVICES, group_devices
from graphpart.draw.words.text import display_width
from graphpart.errors import OutOfMemoryError
from graphpart.ir.axes import AxisRule
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph, Operator, Ref, Source, Value
from graphpart.ir.placement import Placement, Shard
from graphpart.ir.region import Intervals, Region
from graphpart.lower import lower
from graphpart.planning.choices import Choices
from graphpart.planning.make import make_plan
from graphpart.planning.plan import Plan

pytestmark = pytest.mark.xdist_group("large_clusters")  # its tests share plans

WIDTH, BATCH = 4096, 32


def chain(num_blocks: int = 80) -> Graph:
    """Blocks of two products each, all of which read a table that the first device makes."""
    rule = AxisRule(
        {"b": BATCH, "k": WIDTH, "n": WIDTH},
        ((("b",), ("k",)), (("n",), ("k",))),
        ((("b",), ("n",)),),
        frozenset({"k"}),
    )
    add = AxisRule({"b": BATCH, "n": WIDTH}, ((("b",), ("n",)), (("n",),)), ((("b",), ("n",)),))
    double = AxisRule({"n": WIDTH}, ((("n",),),), ((("n",),),))
    sources = [Source(Value("x", (BATCH, WIDTH), "float32"), "input", ("x",))]
    sources.append(Source(Value("scale", (WIDTH,), "float32", True), "parameter", ("scale",), trainable=True))
    table = Value("table", (WIDTH,), "float32", True)
    operators = [Operator("table", "aten.mul.Scalar", (Ref("scale"), 2.0), results=(table,), rule=double)]
    last = "x"
    for block in range(num_blocks):
        weight, name = f"layers.{block}.weight", f"linear_{block}"
        sources.append(Source(Value(weight, (WIDTH, WIDTH), "float32", True), "parameter", (weight,), trainable=True))
        results = (Value(name, (BATCH, WIDTH), "float32", True),)
        path, work = f"layers.{block}", 2.0 * BATCH * WIDTH * WIDTH
        args = (Ref(last), Ref(weight))
        operators.append(
            Operator(name, "aten.linear.default", args, {}, results, rule, work, 2 * work, (last, weight), 0, path)
        )
        last = f"add_{block}"
        results = (Value(last, (BATCH, WIDTH), "float32", True),)
        operators.append(
            Operator(last, "aten.add.Tensor", (Ref(name), Ref("table")), results=results, rule=add, module_path=path)
        )
    return Graph("Chain", tuple(sources), tuple(operators), (Ref(last),), sample_dims={"x": 0})


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(chain(), make_cluster("64xH100"), Choices(strategy="layer", num_microbatches=4))


def test_sixty_four_devices_are_explained_on_a_screen(plan: Plan) -> None:
    text = plan.explain()
    assert len(text.splitlines()) < 50 and max(map(display_width, text.splitlines())) <= 100
    for part in ("64 devices (64 × H100-SXM)", "cuda:56–63", "busiest", "within groups", "cuda:0–7 → cuda:8–15"):
        assert part in text, part


def test_sixty_four_devices_are_drawn_as_eight_groups(plan: Plan) -> None:
    source = plan.dot()
    assert "cuda:0–7" in source and "8 × H100-SXM" in source and "64 devices" in source
    assert source.count("<B>broadcast</B>") == 1  # the table goes out once
    assert source.count("->") < 120


def test_groups_keep_what_their_devices_have(plan: Plan) -> None:
    groups = group_devices(plan.placement, plan.cluster)
    assert groups is not None and [len(m) for m in groups.members] == [8] * 8
    assert groups.placement(plan.placement).devices == tuple(range(8))
    assert group_devices(Placement.whole(plan.graph, dict.fromkeys(plan.graph.operator, 3)), plan.cluster) is None


def test_unlike_devices_are_grouped_apart() -> None:
    cluster = make_cluster("12xH100+12xA100")
    graph = chain(40)
    placement = Placement.whole(graph, {op.name: i % 24 for i, op in enumerate(graph.operators)})
    groups = group_devices(placement, cluster)
    assert groups is not None and len(cluster) > MOST_DEVICES
    assert [d.kind for d in groups.cluster.devices] == [
        "8 × H100-SXM", "4 × H100-SXM", "8 × A100-SXM-40GB", "4 × A100-SXM-40GB",
    ]  # fmt: skip
    # Parts of a home follow their devices.
    rows = [Intervals.span(i, i + 1) if i < 23 else Intervals.span(23, WIDTH) for i in range(24)]
    parts = tuple(Shard(i, Region((row, Intervals.full(WIDTH)))) for i, row in enumerate(rows))
    grouped = groups.placement(replace(placement, shards={"layers.0.weight": parts})).shards["layers.0.weight"]
    assert [s.device for s in grouped] == [0] * 8 + [1] * 4 + [2] * 8 + [3] * 4
    assert [s.region for s in grouped] == [s.region for s in parts]


def test_nodes_grow_with_microbatches_and_no_faster() -> None:
    graph = chain()
    placement = Placement.whole(graph, {op.name: i * 8 // len(graph.operators) for i, op in enumerate(graph.operators)})
    steps = {m: sum(len(s.steps) for s in lower(graph, placement, 8, num_microbatches=m).segments) for m in (4, 16)}
    assert steps[16] <= 4 * steps[4]


def small(cluster: Cluster, part: float) -> Cluster:
    """The cluster with a part of each device's memory."""
    devices = tuple(replace(d, memory_bytes=int(d.memory_bytes * part)) for d in cluster.devices)
    return Cluster(devices, cluster.default_link, cluster.links, cluster.name)


def test_an_error_names_devices_that_would_do_and_those_do() -> None:
    graph, cluster = chain(16), small(make_cluster("2xH100"), 0.02)
    with pytest.raises(OutOfMemoryError) as error:
        make_plan(graph, cluster, Choices(strategy="layer"))
    text = str(error.value)
    assert "of optimizer state" in text and "devices (" in text
    enough = int(text.split("What would fit")[1].split(" devices (")[0].split()[-1])
    make_plan(graph, small(make_cluster(f"{enough}xH100"), 0.02), Choices(strategy="layer"))
    with pytest.raises(OutOfMemoryError):
        make_plan(graph, small(make_cluster(f"{enough - 1}xH100"), 0.02), Choices(strategy="layer"))


def test_an_error_names_a_lighter_optimizer_that_would_do_and_it_does() -> None:
    graph, cluster = chain(16), small(make_cluster("3xH100"), 0.02)
    with pytest.raises(OutOfMemoryError, match=r"SGD with momentum \(4 bytes\) instead of 8 bytes"):
        make_plan(graph, cluster, Choices(strategy="layer"))
    make_plan(graph, cluster, Choices(strategy="layer", optimizer_bytes_per_element=4))


def test_a_placement_by_hand_that_does_not_fit_is_noted() -> None:
    graph, cluster = chain(16), small(make_cluster("2xH100"), 0.02)
    made = make_plan(graph, cluster, Choices(strategy={"*": 0}))
    assert "does not fit: device 'cuda:0'" in made.notes[0]
    assert "Note: Chain does not fit" in made.explain()
