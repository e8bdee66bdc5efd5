"""Layer splits against brute force and laws; single, auto, by_pattern and reuse."""

import random
from dataclasses import replace
from itertools import combinations, pairwise, permutations
from math import inf

import pytest

from graphpart.cost import forecast_memory, operator_works, preset, step_time
from graphpart.errors import ArgumentError, OutOfMemoryError, PlacementError
from graphpart.ir.axes import AxisRule
from graphpart.ir.cluster import Cluster, Device, Link
from graphpart.ir.graph import Graph, Operator, Ref, Source, Value
from graphpart.ir.placement import Placement, Shard, Tile, default_homes
from graphpart.ir.region import Intervals, Region
from graphpart.planning.reuse import reused_placement
from graphpart.strategies import STRATEGIES, Candidate, Terms, auto, by_pattern, layer, plan_layers, single
from graphpart.strategies.layer import MAX_STATES, device_groups
from graphpart.strategies.stages.blocks import into_blocks, operator_order

SEEDS = range(12)
HUGE = 10**15


def random_graph(seed, n=8, *, chain=False, scale=1, prefix="o"):
    """Operators that read the one before, and in a DAG now and then an earlier value or a tied parameter."""
    draw = random.Random(seed)
    sources = [Source(Value("x", (8, 4), "float32"), "input", ("args[0]",))]
    operators = []
    for i in range(n):
        reads = [f"{prefix}{i - 1}" if i else "x"]
        if not chain and i > 1:
            reads = [f"{prefix}{draw.randrange(i)}" for _ in range(draw.randint(1, 3))]
        if draw.random() < 0.7:
            sources.append(Source(Value(f"w{i}", (draw.randint(1, 9), 8), "float32"), "parameter", (f"w{i}",), True))
            reads.append(f"w{i}")
        earlier = [s.value.name for s in sources[1:]]
        if not chain and earlier and draw.random() < 0.3:
            reads.append(draw.choice(earlier))
        value = Value(f"{prefix}{i}", (8, draw.randint(1, 30) * scale), "float32", draw.random() < 0.8)
        flops = draw.randint(0, 10**4) * scale
        operators.append(
            Operator(
                value.name,
                "aten.toy.default",
                tuple(Ref(name) for name in reads),
                results=(value,),
                flops_forward=flops,
                flops_backward=2 * flops,
                saved=tuple(name for name in (*reads, value.name) if draw.random() < 0.5),
                saved_extra_bytes=draw.randint(0, 200),
            )
        )
    return Graph("Random", tuple(sources), tuple(operators), (Ref(operators[-1].name),), sample_dims={"x": 0})


def device(index, speed=1.0, memory_bytes=HUGE, kind="toy"):
    return Device(f"cuda:{index}", f"{kind}-{speed}", {"float32": 1e9 * speed}, memory_bytes, 1e9 * speed)


def random_cluster(seed, num_devices, *, memory_bytes=HUGE):
    draw = random.Random(seed)
    devices = tuple(device(i, draw.choice([1.0, 2.0, 3.5]), memory_bytes) for i in range(num_devices))
    return Cluster(devices, Link(1e-6 * draw.random(), draw.choice([1e8, 1e9, 1e10])))


def equal_cluster(num_devices, memory_bytes=HUGE, link=None):
    return Cluster(tuple(device(i, 1.0, memory_bytes) for i in range(num_devices)), link or Link(1e-6, 1e9))


def naive_loads(graph, cluster, device_of, num_microbatches):
    """Load of every device, straight from the definition: max-load, with link costs, over one whole step.

    Every value takes the link between the devices that make and read it; out of a device it counts once.
    """
    works = operator_works(graph)
    homes = default_homes(graph, device_of)
    load = [0.0] * len(cluster)
    for name, at in device_of.items():
        load[at] += step_time(works[name], cluster.devices[at], num_microbatches).total_s
    for name, value in graph.values.items():
        source = graph.source.get(name)
        if source is not None and source.kind == "input":
            continue
        home = homes[name] if source is not None else device_of[graph.producer[name].name]
        remote = sorted({device_of[op.name] for op in graph.consumers[name]} - {home})
        messages = num_microbatches if source is None else 1
        has_gradient = value.requires_grad if source is None else source.trainable
        for position, other in enumerate(remote):
            there, back = cluster.link(home, other), cluster.link(other, home)
            time_s = messages * there.latency_s + value.size_bytes / there.bandwidth_bytes_per_s
            if has_gradient:
                time_s += messages * back.latency_s + value.size_bytes / back.bandwidth_bytes_per_s
            load[other] += time_s
            if position == 0:
                load[home] += time_s
    return load


def brute_force(graph, cluster, num_microbatches=1, sizes=None):
    """Least bottleneck over all cuts and all orders of the devices."""
    names = [op.name for op in graph.operators]
    best = inf
    for num_stages in sizes or [min(len(cluster), len(names))]:
        for cuts in combinations(range(1, len(names)), num_stages - 1):
            bounds = list(pairwise((0, *cuts, len(names))))
            for order in permutations(range(len(cluster)), num_stages):
                device_of = {n: d for d, (i, j) in zip(order, bounds, strict=True) for n in names[i:j]}
                memory = forecast_memory(graph, Placement.whole(graph, device_of), len(cluster)).devices
                if all(m.total_bytes <= d.memory_bytes for m, d in zip(memory, cluster.devices, strict=True)):
                    best = min(best, max(naive_loads(graph, cluster, device_of, num_microbatches)))
    return best


def bottleneck_of(graph, cluster, placement, num_microbatches=1):
    device_of = {op.name: placement.device(op.name) for op in graph.operators}
    return max(naive_loads(graph, cluster, device_of, num_microbatches))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("chain", [True, False])
def test_bottleneck_equals_brute_force(seed, chain):
    graph = random_graph(seed, n=random.Random(seed).randint(2, 9), chain=chain)
    cluster = random_cluster(seed, 3)
    for num_microbatches in (1, 4):
        plan = plan_layers(graph, cluster, Terms(num_microbatches=num_microbatches))
        assert plan.bottleneck_s == pytest.approx(brute_force(graph, cluster, num_microbatches))
        assert bottleneck_of(graph, cluster, plan.placement, num_microbatches) == pytest.approx(plan.bottleneck_s)


@pytest.mark.parametrize("seed", SEEDS)
def test_bottleneck_equals_brute_force_when_devices_may_stay_empty(seed):
    graph = random_graph(seed, n=6)
    cluster = replace(random_cluster(seed, 3), default_link=Link(1e-5, 1e8))
    plan = plan_layers(graph, cluster, use_all_devices=False)
    assert plan.bottleneck_s == pytest.approx(brute_force(graph, cluster, sizes=[1, 2, 3]))


@pytest.mark.parametrize("seed", SEEDS)
def test_bottleneck_equals_brute_force_within_memory(seed):
    graph = random_graph(seed, n=7)
    whole = forecast_memory(graph, Placement.whole(graph, {op.name: 0 for op in graph.operators}), 1).peak_bytes
    cluster = random_cluster(seed, 3, memory_bytes=int(whole * random.Random(seed).uniform(0.4, 0.8)))
    # As many devices as memory allows.
    expected = next((v for k in (3, 2, 1) if (v := brute_force(graph, cluster, sizes=[k])) < inf), inf)
    if expected == inf:
        with pytest.raises(OutOfMemoryError):
            plan_layers(graph, cluster)
        return
    assert plan_layers(graph, cluster).bottleneck_s == pytest.approx(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_bottleneck_equals_brute_force_on_chains_over_unlike_links(seed):
    draw = random.Random(seed)
    graph = random_graph(seed, n=7, chain=True)
    links = {pair: Link(draw.random() * 1e-6, draw.choice([1e7, 1e8, 1e9])) for pair in permutations(range(3), 2)}
    cluster = Cluster((device(0), device(1, 2.0), device(2, 3.0)), Link(0.0, 1e9), links)
    assert plan_layers(graph, cluster, Terms(num_microbatches=2)).bottleneck_s == pytest.approx(
        brute_force(graph, cluster, 2)
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_stages_are_forecast_as_the_definitions_say(seed):
    graph = random_graph(seed, n=9)
    cluster = random_cluster(seed, 3)
    plan = plan_layers(graph, cluster, Terms(num_microbatches=2, optimizer_bytes_per_element=12))
    device_of = {op.name: plan.placement.device(op.name) for op in graph.operators}
    loads = naive_loads(graph, cluster, device_of, 2)
    memory = forecast_memory(graph, plan.placement, 3, optimizer_bytes_per_element=12)
    assert {s.device: s.load_s for s in plan.stages} == pytest.approx(dict(enumerate(loads)))
    assert {s.device: s.memory_bytes for s in plan.stages} == {i: m.total_bytes for i, m in enumerate(memory.devices)}
    plan.placement.check(graph, 3)
    assert layer(graph, cluster, Terms(num_microbatches=2, optimizer_bytes_per_element=12)) == plan.placement


@pytest.mark.parametrize("seed", SEEDS)
def test_renaming_leaves_the_value_and_so_does_renumbering_devices(seed):
    cluster = random_cluster(seed, 3)
    value = plan_layers(random_graph(seed), cluster).bottleneck_s
    assert plan_layers(random_graph(seed, prefix="zz"), cluster).bottleneck_s == value
    turned = replace(cluster, devices=cluster.devices[::-1])
    assert plan_layers(random_graph(seed), turned).bottleneck_s == pytest.approx(value)


@pytest.mark.parametrize("seed", SEEDS)
def test_scaling_all_times_scales_the_value(seed):
    graph, cluster = random_graph(seed), random_cluster(seed, 3)
    link = Link(cluster.default_link.latency_s * 3, cluster.default_link.bandwidth_bytes_per_s / 3)
    slow = tuple(
        replace(
            d,
            flops_per_s={"float32": d.flops_per_s["float32"] / 3},
            memory_bandwidth_bytes_per_s=d.memory_bandwidth_bytes_per_s / 3,
            overhead_s=d.overhead_s * 3,
        )
        for d in cluster.devices
    )
    slower = plan_layers(graph, Cluster(slow, link))
    assert slower.bottleneck_s == pytest.approx(3 * plan_layers(graph, cluster).bottleneck_s)


@pytest.mark.parametrize("seed", SEEDS)
def test_another_device_or_more_memory_never_worsens_the_value(seed):
    graph = random_graph(seed, n=14)
    whole = forecast_memory(graph, Placement.whole(graph, {op.name: 0 for op in graph.operators}), 1).peak_bytes

    def value(num_devices, part):
        cluster = random_cluster(0, 5, memory_bytes=int(whole * part))
        try:
            kept = replace(cluster, devices=cluster.devices[:num_devices])
            return plan_layers(graph, kept, use_all_devices=False).bottleneck_s
        except OutOfMemoryError:
            return inf

    grid = [[value(k, part) for k in (1, 2, 3, 5)] for part in (0.4, 0.7, 1.0)]
    assert grid[2][0] < inf
    for row in grid:
        assert all(a >= b * (1 - 1e-9) for a, b in pairwise(row))
    for column in zip(*grid, strict=True):
        assert all(a >= b * (1 - 1e-9) for a, b in pairwise(column))


def test_equal_work_is_split_evenly_and_in_device_order():
    graph = random_graph(0, n=40, chain=True)
    even = replace(graph, operators=tuple(replace(op, flops_forward=1e9, flops_backward=2e9) for op in graph.operators))
    placement = layer(even, equal_cluster(4))
    devices = [placement.device(op.name) for op in even.operators]
    assert devices == [i // 10 for i in range(40)]


def test_needless_stages_stay_empty_only_if_that_is_allowed():
    graph, far = random_graph(0, n=8), Link(1.0, 1.0)
    assert layer(graph, equal_cluster(3, link=far)).devices == (0, 1, 2)
    assert layer(graph, equal_cluster(3, link=far), use_all_devices=False).devices == (0,)


def test_more_devices_than_operators():
    graph = random_graph(0, n=2)
    assert layer(graph, equal_cluster(5)).devices == (0, 1)


def test_a_device_without_room_stays_empty():
    graph = random_graph(1, n=8)
    cluster = Cluster((device(0, 9.0, 1), device(1), device(2)), Link(1e-6, 1e9))
    assert layer(graph, cluster).devices == (1, 2)


def test_memory_that_nothing_fits_names_device_bytes_and_largest_contents():
    graph = random_graph(2, n=8)
    with pytest.raises(OutOfMemoryError) as error:
        layer(graph, equal_cluster(2, memory_bytes=1000))
    text = str(error.value)
    for words in ("'cuda:", "would need", "has 1 kB", "Largest there: ", "What would fit"):
        assert words in text


def test_memory_reserve_and_optimizer_count():
    graph = random_graph(3, n=8)
    peak = max(s.memory_bytes for s in plan_layers(graph, equal_cluster(1)).stages)
    layer(graph, equal_cluster(1, memory_bytes=peak))
    with pytest.raises(OutOfMemoryError):
        layer(graph, equal_cluster(1, memory_bytes=peak), Terms(memory_reserve=0.01))
    with pytest.raises(OutOfMemoryError):
        layer(graph, equal_cluster(1, memory_bytes=peak), Terms(optimizer_bytes_per_element=9))


def masked_graph():
    """A mask made from nothing is read by two layers; drawn noise may not be repeated."""
    ops = [Operator("arange", "aten.arange.default", (4,), results=(Value("arange", (4,), "int64"),))]
    ops.append(Operator("mask", "aten.le.Tensor", (Ref("arange"),), results=(Value("mask", (10**6,), "bool"),)))
    ops.append(Operator("noise", "aten.rand.default", results=(Value("noise", (8,), "float32"),), random=True))
    for i, reads in enumerate((["x", "noise"], ["l0", "mask"], ["l1", "mask"])):
        value = Value(f"l{i}", (8,), "float32", True)
        ops.append(Operator(f"l{i}", "aten.toy.default", tuple(map(Ref, reads)), results=(value,), flops_forward=1e6))
    sources = (Source(Value("x", (8,), "float32"), "input", ("args[0]",)),)
    return Graph("Masked", sources, tuple(ops), (Ref("l2"),), sample_dims={"x": 0})


def test_operators_made_from_nothing_go_with_their_first_reader_and_cross_for_free():
    graph = masked_graph()
    order = operator_order(graph)
    assert order.free == {"arange", "mask"}
    assert order.block_of == {"noise": 0, "l0": 1, "l1": 2, "arange": 2, "mask": 2, "l2": 3}
    plan = plan_layers(graph, equal_cluster(3, link=Link(0.0, 1e6)))
    assert [plan.placement.device(n) for n in ("noise", "l0", "l1", "l2")] == [0, 0, 1, 2]
    assert plan.placement.device("mask") == plan.placement.device("arange") == 1
    assert plan.bottleneck_s < 0.1  # the mask alone would take a second


def test_a_buffer_lives_with_its_writer_and_what_nothing_reads_with_the_first_stage():
    graph = random_graph(4, n=6, chain=True)
    buffer = Source(Value("count", (), "int64"), "buffer", ("count",))
    unread = Source(Value("unread", (64,), "float32"), "parameter", ("unread",), True)
    last = replace(graph.operators[-1], args=(*graph.operators[-1].args, Ref("count")))
    graph = Graph(
        "G", (*graph.sources, buffer, unread), (*graph.operators[:-1], last), graph.outputs, (("count", last.name),)
    )
    cluster = Cluster((device(0, 1.0), device(1, 50.0)), Link(0.0, 1e12))
    plan = plan_layers(graph, cluster)
    assert plan.placement.homes["count"] == plan.placement.device(last.name)
    assert plan.placement.homes["unread"] == plan.stages[0].device
    memory = forecast_memory(graph, plan.placement, 2).devices
    assert [memory[s.device].total_bytes for s in plan.stages] == [s.memory_bytes for s in plan.stages]


def test_an_empty_graph_has_an_empty_plan():
    graph = Graph("Empty", (), (), ())
    assert layer(graph, equal_cluster(2)) == Placement({}, {})


def test_cuts_are_thinned_to_cheap_ones_and_spread_over_the_work():
    graph = random_graph(5, n=300)
    order = into_blocks(graph, operator_order(graph), device(0), max_cuts=40)
    assert order.num_blocks == 41
    blocks = [order.block_of[op.name] for op in graph.operators]
    assert blocks == sorted(blocks) and set(blocks) == set(range(41))
    longest = max(blocks.count(block) for block in set(blocks))
    assert longest < 60  # no stretch without a cut
    assert into_blocks(graph, order, device(0), max_cuts=40) is order


def test_many_unlike_devices_are_taken_in_index_order():
    cluster = Cluster(tuple(device(i, 1.0 + i / 8) for i in range(16)), Link(1e-6, 1e9))
    assert MAX_STATES < 2**16
    assert device_groups(cluster) == (tuple(range(16)),)
    plan = plan_layers(random_graph(6, n=48), cluster)
    assert [s.device for s in plan.stages] == list(range(16))


def test_a_preset_of_unlike_nodes_is_planned():
    plan = plan_layers(random_graph(7, n=40), preset("4xA100+4xV100"))
    assert sorted(s.device for s in plan.stages) == list(range(8))


def test_single_takes_the_fastest_device_that_fits():
    graph = random_graph(8)
    cluster = Cluster((device(0, 1.0), device(1, 9.0, 100), device(2, 3.0)), Link(0.0, 1e9))
    placement = single(graph, cluster)
    assert placement.devices == (2,)
    placement.check(graph, 3)
    with pytest.raises(OutOfMemoryError, match="cuda:1"):
        single(graph, Cluster((device(0, 1.0, 99), device(1, 9.0, 100)), Link(0.0, 1e9)))


def test_auto_takes_the_least_forecast_and_keeps_the_table():
    graph, cluster = random_graph(9), equal_cluster(2)
    name, placement, table = auto(graph, cluster, lambda p: float(len(p.devices)))
    assert (name, placement) == ("single", single(graph, cluster))
    assert table[:2] == (Candidate("layer", 2.0), Candidate("single", 1.0))
    assert [candidate.strategy for candidate in table] == list(STRATEGIES)
    name, placement, _ = auto(graph, cluster, lambda p: -float(len(p.devices)), Terms(num_microbatches=2))
    assert (name, placement) == ("layer", layer(graph, cluster, Terms(num_microbatches=2)))
    assert {"layer", "single", "batch", "feature", "spatial", "hybrid"} <= set(STRATEGIES)


def test_auto_goes_on_where_a_strategy_fails_and_says_why_if_all_do():
    graph = random_graph(10)
    whole = forecast_memory(graph, single(graph, equal_cluster(1)), 1).peak_bytes
    name, _, table = auto(graph, equal_cluster(2, memory_bytes=whole - 1), lambda p: 1.0)
    assert name == "layer"
    assert table[1].step_s is None and "does not fit" in table[1].reason
    with pytest.raises(OutOfMemoryError, match=r"(?s)layer: .* single: "):
        auto(graph, equal_cluster(2, memory_bytes=1), lambda p: 1.0)

    def refuse(graph, cluster, terms):
        raise PlacementError("not today")

    with pytest.raises(PlacementError, match="not today"):
        auto(graph, equal_cluster(2), lambda p: 1.0, strategies={"refuse": refuse})


def block_graph(batch=8, prefix="", *, dropout=True, extra=False):
    """Blocks ``net.0`` and ``net.1`` of linear, add (by the block itself), dropout; a head tied to ``net.0``."""
    rule = AxisRule({"b": batch, "n": 4, "k": 4}, ((("b",), ("k",)), (("n",), ("k",))), ((("b",), ("n",)),))
    sources = [Source(Value("x", (batch, 4), "float32"), "input", ("args[0]",))]
    sources += [
        Source(Value(f"{prefix}w{i}", (4, 4), "float32"), "parameter", (f"net.{i}.fc.weight",), True) for i in (0, 1)
    ]
    ops = []

    def add(name, target, reads, path, **fields):
        results = (Value(prefix + name, (batch, 4), "float32", True),)
        ops.append(Operator(prefix + name, target, tuple(map(Ref, reads)), results=results, module_path=path, **fields))
        return prefix + name

    last = "x"
    for i in (0, 1):
        made = add(f"linear{i}", "aten.linear.default", [last, f"{prefix}w{i}"], f"net.{i}.fc", rule=rule)
        made = add(f"add{i}", "aten.add.Tensor", [last, made], f"net.{i}")
        if extra:
            made = add(f"extra{i}", "aten.relu.default", [made], f"net.{i}.new")
        last = add(f"drop{i}", "aten.dropout.default", [made], f"net.{i}") if dropout else made
    add("head", "aten.linear.default", [last, f"{prefix}w0"], "head", rule=rule)
    return Graph("Blocks", tuple(sources), tuple(ops), (Ref(f"{prefix}head"),), sample_dims={"x": 0})


def devices_of(graph, placement):
    return {op.name: placement.device(op.name) for op in graph.operators}


def test_patterns_take_modules_and_what_modules_compute_themselves():
    graph = block_graph()
    placement = by_pattern(graph, {"net.0.*": 0, "*": 1})
    assert devices_of(graph, placement) == {
        "linear0": 0, "add0": 0, "drop0": 0, "linear1": 1, "add1": 1, "drop1": 1, "head": 1,
    }  # fmt: skip
    assert placement.homes == {"w0": 0, "w1": 1}


def test_patterns_match_operator_names_and_the_first_match_wins():
    graph = block_graph()
    placement = by_pattern(graph, {"add1": 2, "net.*": 1, "h*d": 0})
    assert placement.device("add1") == 2
    assert placement.device("drop1") == placement.device("linear0") == 1
    assert placement.device("head") == 0


def test_unmatched_operators_follow_what_they_read():
    graph = block_graph()
    placement = by_pattern(graph, {"net.0.fc": 1, "net.1.fc": 2})
    assert devices_of(graph, placement) == {
        "linear0": 1, "add0": 1, "drop0": 1, "linear1": 2, "add1": 1, "drop1": 1, "head": 1,
    }  # fmt: skip
    # Only the parameter of the head is placed; what comes before has no place but its reader's.
    assert set(devices_of(graph, by_pattern(graph, {"head": 3})).values()) == {3}
    masked = by_pattern(masked_graph(), {"l0": 0, "l1": 1})
    assert [masked.device(n) for n in ("noise", "arange", "mask", "l2")] == [0, 1, 1, 1]


def test_patterns_that_match_nothing_name_the_nearest_modules():
    with pytest.raises(PlacementError, match=r"'net\.2\.fc'.*'net\.\d\.fc'"):
        by_pattern(block_graph(), {"net.2.fc": 0, "*": 1})
    for wrong in (-1, "0", True):
        with pytest.raises((ArgumentError, PlacementError), match="device index"):
            by_pattern(block_graph(), {"*": wrong})


def test_carry_to_the_same_graph_is_the_same_placement():
    graph = block_graph()
    placement = by_pattern(graph, {"net.0.*": 1, "head": 2, "*": 0})
    assert reused_placement(placement, graph, graph) == placement


def test_carry_keeps_homes_by_name_and_devices_by_module():
    old, new = block_graph(), block_graph(batch=3, prefix="z_", dropout=False, extra=True)
    placement = Placement(by_pattern(old, {"net.0.*": 1, "head": 2, "*": 0}).tiles, {"w0": 2, "w1": 1})
    carried = reused_placement(placement, old, new)
    carried.check(new, 3)
    assert carried.homes == {"z_w0": 2, "z_w1": 1}
    assert devices_of(new, carried) == {
        "z_linear0": 1, "z_add0": 1, "z_extra0": 1, "z_linear1": 0, "z_add1": 0, "z_extra1": 0, "z_head": 2,
    }  # fmt: skip


def test_carry_gives_homes_to_what_is_new():
    old = block_graph()
    new = block_graph()
    constant = Source(Value("c", (4,), "float32"), "constant", ("lifted",))
    op = Operator("late", "aten.mul.Tensor", (Ref("head"), Ref("c")), results=(Value("late", (8, 4), "float32"),))
    new = Graph("Blocks", (*new.sources, constant), (*new.operators, op), (Ref("late"),))
    carried = reused_placement(by_pattern(old, {"head": 2, "*": 0}), old, new)
    assert carried.device("late") == carried.homes["c"] == 2


def test_carry_scales_tiles_with_their_axes():
    old, new = block_graph(batch=8), block_graph(batch=6, prefix="z_")
    placement = by_pattern(old, {"*": 0})
    cut = {
        "linear0": (Tile(0, {"b": Intervals.span(0, 4)}), Tile(1, {"b": Intervals.span(4, 8)})),
        "linear1": (Tile(0, {"n": Intervals.span(0, 1)}), Tile(1, {"n": Intervals.span(1, 4)})),
    }
    carried = reused_placement(Placement({**placement.tiles, **cut}, placement.homes), old, new)
    assert carried.tiles["z_linear0"] == (Tile(0, {"b": Intervals.span(0, 3)}), Tile(1, {"b": Intervals.span(3, 6)}))
    assert carried.tiles["z_linear1"] == cut["linear1"]
    # A batch of one can't be cut in two: the operator runs whole.
    one = reused_placement(Placement({**placement.tiles, **cut}, placement.homes), old, block_graph(batch=1))
    assert one.tiles["linear0"] == (Tile(0),)


def test_carry_keeps_cut_homes():
    old, new = block_graph(), block_graph(batch=3, prefix="z_", extra=True)
    parts = tuple(Shard(i, Region((Intervals.span(i, 1 + 3 * i), Intervals.full(4)))) for i in range(2))
    placement = by_pattern(old, {"*": 0})
    homes = {name: home for name, home in placement.homes.items() if name != "w0"}
    carried = reused_placement(Placement(placement.tiles, homes, {"w0": parts}), old, new)
    carried.check(new, 2)
    assert carried.shards == {"z_w0": parts} and "z_w0" not in carried.homes


def test_carry_refuses_a_placement_of_another_graph():
    with pytest.raises(PlacementError, match="no device for operator linear0"):
        reused_placement(Placement({}), block_graph(), block_graph())
