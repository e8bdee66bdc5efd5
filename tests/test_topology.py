"""Trees of switches: ways, shares of links, collectives on them, and files that say them."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from graphpart.cost import cluster_from_dict, cluster_to_dict, dump_toml, load_toml, make_cluster, preset
from graphpart.cost.time.collectives import CollectiveTimes
from graphpart.cost.time.traffic import Traffic
from graphpart.draw.words.links import links
from graphpart.errors import ClusterError
from graphpart.ir.cluster import Cluster, Device, Link
from graphpart.ir.program import Bridge, Collective
from graphpart.ir.timeline import Event, Timeline
from graphpart.ir.topology import Switch
from graphpart.strategies.stages.among_groups import _between

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "broadcast", "scatter")


def devices(count: int) -> tuple[Device, ...]:
    return tuple(Device(f"cuda:{i}", "toy", {"float32": 1.0}, 1, 1.0) for i in range(count))


def nodes(number: int, size: int, ports: int, oversubscription: float = 1.0, racks: int = 1) -> Cluster:
    """Nodes with 100 B/s within, and ports of 10 B/s to their rack; racks with as many ports as all their nodes."""
    switches = [Switch(f"node {i}", tuple(range(i * size, (i + 1) * size)), 1.0, 100.0) for i in range(number)]
    per_rack = number // racks
    leaves = [
        Switch(f"rack {r}", tuple(s.name for s in switches[r * per_rack : (r + 1) * per_rack]), 2.0, 10.0, ports)
        for r in range(racks)
    ]
    if racks > 1:
        names = tuple(leaf.name for leaf in leaves)
        leaves.append(Switch("spine", names, 3.0, 10.0, ports * per_rack, oversubscription))
    return Cluster(devices(number * size), Link(9.0, 1.0), switches=(*switches, *leaves))


def lane_bytes(traffic: Traffic) -> dict[str, float]:
    return {link.name: link.size_bytes for link in traffic.links()}


def test_sixteen_gigabytes_over_sixty_four_gpus_take_thirty_five_milliseconds() -> None:
    times = CollectiveTimes(preset("8x8xH100"), range(64))
    pattern = times.pattern("all-gather", 16e9)
    # 7/8 of it enter a node by eight cards of 50 GB/s, and 63/64 of it each GPU at 450 GB/s: 35 ms each; then 7 steps
    # of 10 µs and 7 of 5 µs.
    assert pattern.time_s(16e9) == pytest.approx(0.035 + 7 * 10e-6 + 7 * 5e-6)
    assert pattern.name == "by levels"
    (ring,) = (p for p in times._all("all-gather") if p.name == "ring")
    assert ring.time_s(16e9) == pytest.approx(63 / 64 * 16e9 / 400e9 + 63 * 10e-6)
    assert times.time_s("all-reduce", 16e9) == pytest.approx(2 * pattern.time_s(16e9))


def test_collectives_without_switches_are_the_formulas() -> None:
    n, alpha, beta, size = 6, 2.0, 10.0, 300.0
    times = CollectiveTimes(Cluster(devices(n), Link(alpha, beta)), range(n))
    moved = (n - 1) / n * size / beta
    assert times.time_s("all-gather", size) == times.time_s("reduce-scatter", size) == pytest.approx(3 * alpha + moved)
    assert times.time_s("all-reduce", size) == pytest.approx(2 * (3 * alpha + moved))
    assert times.time_s("all-to-all", size) == pytest.approx((n - 1) * alpha + moved / n)
    assert times.time_s("broadcast", 1.0) == pytest.approx(min(3 * (alpha + 1 / beta), 2 * (3 * alpha + moved / size)))
    assert times.time_s("scatter", size) == pytest.approx(3 * alpha + moved)
    assert CollectiveTimes(Cluster(devices(1), Link(1.0, 1.0)), [0]).time_s("all-reduce", 9.0) == 0


def test_one_network_card_carries_what_all_devices_of_its_node_get() -> None:
    times = CollectiveTimes(nodes(4, 4, 1), range(16))
    pattern = times.pattern("all-gather", 1e6)
    assert pattern.byte_s == pytest.approx(3 / 4 / 10)
    assert pattern.limit is not None
    # Groups of one device a node have a card each, or share the one: what they do at once takes so many times as long.
    columns = [range(i, 16, 4) for i in range(4)]
    for ports, factor in ((4, 1), (2, 2), (1, 4)):
        cluster = nodes(4, 4, ports)
        alone, first = (CollectiveTimes(cluster, columns[0], beside=beside) for beside in ((), columns[1:]))
        assert first.pattern("all-gather", 1e6).byte_s == pytest.approx(
            factor * alone.pattern("all-gather", 1e6).byte_s
        )
        between = _between(cluster, range(4), range(4, 8))
        assert between.bandwidth_bytes_per_s == pytest.approx(10 * ports)


@pytest.mark.parametrize("kind", KINDS)
def test_more_rails_and_less_oversubscription_are_never_slower(kind: str) -> None:
    for size in (0.0, 10.0, 1e6):
        rails = [CollectiveTimes(nodes(4, 4, p), range(16)).time_s(kind, size) for p in (1, 2, 4, 8)]
        spine = [CollectiveTimes(nodes(4, 4, 4, o, 2), range(16)).time_s(kind, size) for o in (16.0, 4.0, 1.0)]
        assert rails == sorted(rails, reverse=True) and spine == sorted(spine, reverse=True)


def test_an_oversubscribed_spine_limits_what_crosses_it() -> None:
    cluster = nodes(4, 4, 4, 8.0, 2)
    # Each rack gets half of it through 8 · 10 / 8 B/s.
    pattern = CollectiveTimes(cluster, range(16)).pattern("all-gather", 1e6)
    assert pattern.byte_s == pytest.approx(0.5 / 10)
    assert pattern.limit is not None and "rack 0 to spine" in cluster.topology.lanes[pattern.limit].name
    traffic = Traffic(cluster)
    ends = [sum(traffic.send(Bridge("a", i, 8 + i, 40, i), 0.0)) for i in range(8)]
    assert max(ends) == pytest.approx(8 * 40 / 10) and min(ends) == pytest.approx(3 + 40 / 10)


def test_without_peer_access_messages_pass_the_host() -> None:
    def box(peer: bool) -> Cluster:
        pcie = [Switch(f"pcie {i}", tuple(range(4 * i, 4 * i + 4)), 1.0, 10.0, peer_access=peer) for i in (0, 1)]
        return Cluster(devices(8), Link(1.0, 1.0), switches=(*pcie, Switch("host", ("pcie 0", "pcie 1"), 2.0, 10.0)))

    with_peers, without = box(True), box(False)
    assert (with_peers.link(0, 1), without.link(0, 1)) == (Link(1.0, 10.0), Link(2.0, 10.0))
    crossed = [without.topology.lanes[lane].name for lane in without.topology.way(0, 1).lanes]  # type: ignore[union-attr]
    assert crossed == ["cuda:0 to pcie 0, out", "pcie 0 to host, out", "pcie 0 to host, in", "cuda:1 to pcie 0, in"]
    # Four devices each get 7/8 of a value through one port, or the switch half of it, once.
    seconds = [CollectiveTimes(c, range(8)).pattern("all-gather", 1e6).byte_s for c in (with_peers, without)]
    assert seconds == pytest.approx([7 / 8 / 10, 4 * 7 / 8 / 10])


def test_lanes_carry_no_more_than_their_bandwidth_and_all_that_is_sent() -> None:
    cluster = nodes(2, 4, 2)
    traffic, sent = Traffic(cluster), 0
    ends = []
    for number, (source, destination) in enumerate(permutations(range(8), 2)):
        size = 10 + 7 * number % 30
        sent += size * (source < 4 <= destination)
        ends.append(sum(traffic.send(Bridge("a", source, destination, size, number), 0.0)))
    found = lane_bytes(traffic)
    assert sum(size for name, size in found.items() if "node 0 to rack 0" in name and name.endswith("out")) == sent
    assert all(link.busy_s <= max(ends) for link in traffic.links())
    # A collective's algorithm sends what its pattern says.
    traffic = Traffic(cluster)
    bridges = [Bridge("a", s, d, 80, i) for i, (s, d) in enumerate(permutations(range(8), 2))]
    gather = Collective("all-gather", "a", 0, tuple(range(8)), tuple(range(56)), 56 * 80)
    traffic.exchange(gather, bridges, 0.0)
    into = [size for name, size in lane_bytes(traffic).items() if name.startswith("cuda:") and name.endswith("in")]
    assert into == pytest.approx([7 * 80] * 8)


def test_more_rails_never_hold_messages_up() -> None:
    def end_s(ports: int) -> float:
        traffic = Traffic(nodes(2, 4, ports))
        pairs = enumerate((s, d) for s, d in permutations(range(8), 2) if (s < 4) != (d < 4))
        return max(sum(traffic.send(Bridge("a", s, d, 30, number), 0.0)) for number, (s, d) in pairs)

    found = [end_s(ports) for ports in (1, 2, 4)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(16 * 30 / 10)  # one port, one message after another


def test_messages_take_turns_at_ports_that_they_share() -> None:
    traffic = Traffic(nodes(2, 4, 2))
    first, second, third = (traffic.send(Bridge("a", s, s + 4, 40, s), 0.0) for s in (0, 1, 2))
    assert first == third == (0.0, 6.0)  # cuda:0 and cuda:2 have a rail each
    assert second == (2.0, 6.0)  # cuda:1 shares the first one, with its latency meanwhile: 80 B end at 2 s + 80 / 10
    assert traffic.send(Bridge("a", 0, 1, 1000, 9), 0.0) == (0.0, 11.0)  # 40 B of the port's 100 B/s leave it room
    assert traffic.send(Bridge("a", 0, 2, 1000, 9), 0.0)[0] == pytest.approx(0.4 + 10 + 10 - 11)


FILE = """
[[device]]
name = "cuda:0"
kind = "H100"
count = 16
[[tier]]
name = "node"
size = 4
latency_s = 5e-6
bandwidth_bytes_per_s = 450e9
[[tier]]
name = "rack"
size = 2
latency_s = 10e-6
bandwidth_bytes_per_s = 50e9
ports = 4
[[tier]]
name = "spine"
latency_s = 15e-6
bandwidth_bytes_per_s = 50e9
ports = 8
oversubscription = 2.0
"""


def test_tiers_in_files_are_switches(tmp_path: Path) -> None:
    path = tmp_path / "racks.toml"
    path.write_text(FILE)
    cluster = load_toml(path)
    assert [s.name for s in cluster.switches] == [*(f"node {i}" for i in range(4)), "rack 0", "rack 1", "spine"]
    assert [cluster.link(0, other).latency_s for other in (3, 4, 8)] == [5e-6, 10e-6, 15e-6]
    path.write_text(dump_toml(cluster))
    assert load_toml(path) == cluster == cluster_from_dict(cluster_to_dict(cluster))
    old = {key: value for key, value in cluster_to_dict(make_cluster(3)).items() if key != "switch"}
    assert cluster_from_dict(old) == make_cluster(3)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("ports = 4", "ports = 0", r"\[\[tier\]\] 2.*ports 0"),
        ("ports = 4", "ports = 1e3", "'ports' has to be a whole number"),
        ("ports = 4", "ports = 999999999999", "ports 999999999999 is no whole number from 1"),
        ("size = 4", "size = 0", "'size' is 0"),
        ("size = 4", "sizes = 4", "did you mean 'size'"),
        ("count = 16", "count = 1000000", "4096 are the most"),
        ("count = 16", "count = -1", "'count' is -1"),
        ("oversubscription = 2.0", "oversubscription = 0.5", "oversubscription 0.5"),
        ("latency_s = 15e-6", "latency_s = -1", "latency_s -1"),
        ("bandwidth_bytes_per_s = 450e9", "bandwidth_bytes_per_s = 0", "no rate"),
        ('name = "rack"\nsize = 2', 'name = "rack"\nsize = 1', "racks"),
        ("oversubscription = 2.0", "peer_access = false", "'spine' does not connect"),
        ("[[tier]]\nname = \"spine\"", "[[switch]]\nname = \"spine\"", "beside it"),
    ],
)  # fmt: skip
def test_wrong_tiers_are_named(old: str, new: str, words: str, tmp_path: Path) -> None:
    assert old in FILE
    path = tmp_path / "wrong.toml"
    path.write_text(FILE.replace(old, new))
    if words == "racks":  # one node a rack is odd, but none the worse
        assert len(load_toml(path).switches) == 9
        return
    with pytest.raises(ClusterError, match=words) as error:
        load_toml(path)
    assert str(path) in str(error.value) or "are the most" in str(error.value)


def table(name: str, *members: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "members": list(members), "latency_s": 1.0, "bandwidth_bytes_per_s": 1.0, **more}


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ([table("a", "cuda:0", "cuda:9")], "'cuda:9' is neither"),
        ([table("a", "cuda:0", "cuda:1"), table("b", "cuda:1", "cuda:2")], "hangs on switch 'a' already"),
        ([table("a", "b"), table("b", "a")], "a member of itself"),
        ([table("a", "cuda:0"), table("a", "cuda:1")], "called 'a'"),
        ([table("cuda:0", "cuda:1")], "called 'cuda:0'"),
        ([table("a", "cuda:0", "cuda:1")], "no switch joins 'cuda:0' and 'cuda:2'"),
        ([table("a")], "at least one member"),
        ([table("a", "cuda:0", "cuda:1", "cuda:2", peer_access=False)], "neither it nor one above has peer access"),
        (
            [table("s0", "cuda:0"), *(table(f"s{i + 1}", f"s{i}") for i in range(40))],
            "more than they can need|above it",
        ),
    ],
)
def test_wrong_switches_are_named(switches: list[dict[str, Any]], words: str) -> None:
    rows = [{"name": "cuda:0", "kind": "H100", "count": 3}]
    with pytest.raises(ClusterError, match=words):
        cluster_from_dict({"device": rows, "switch": switches})


def test_the_pages_examples_load(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "clusters.md").read_text(encoding="utf-8")
    found = []
    for number, text in enumerate(page.split("```toml")[1:]):
        path = tmp_path / f"{number}.toml"
        path.write_text(text.partition("```")[0])
        found.append(load_toml(path))
    racks, box = found
    assert (len(racks), len(box)) == (64, 8)
    # Racks of 16 send each other three quarters of a value through 16 ports, which carry half of it together.
    assert CollectiveTimes(racks, range(64)).pattern("all-gather", 16e9).byte_s == pytest.approx(0.75 / (16 * 25e9))
    assert box.link(0, 1).latency_s == 15e-6


def test_neighbours_are_those_of_one_node() -> None:
    switches = (Switch("a", (0, 2), 1.0, 9.0), Switch("b", (3, 1), 1.0, 9.0), Switch("top", ("b", "a"), 1.0, 9.0))
    assert Cluster(devices(5), Link(1.0, 1.0), switches=switches).topology.neighbours_first() == (0, 2, 1, 3, 4)
    assert preset("9xH100+4xV100").topology.neighbours_first() == tuple(range(13))


def test_presets_say_nodes_and_their_size() -> None:
    assert preset("8x8xH100").switches == preset("64xH100").switches
    four = preset("2x4xA100")
    assert [len(s.members) for s in four.switches] == [4, 4, 2] and four.switches[-1].ports == 4
    mesh = CollectiveTimes(preset("8xMI300X"), range(8))
    assert mesh.pattern("all-gather", 1e9).byte_s == pytest.approx(7 / 8 / (7 * 64e9))
    with pytest.raises(ClusterError, match="0x8xH100"):
        preset("0x8xH100")
    with pytest.raises(ClusterError, match="are the most"):
        preset("999999999x999999999xH100")


def test_the_words_name_the_link_that_limits() -> None:
    traffic = Traffic(nodes(2, 4, 2))
    for s in (0, 1, 2):
        traffic.send(Bridge("a", s, s + 4, 40, s), 0.0)
    events = (Event(0, "F", "s", 0.0, 1.0), Event(0, "send", "a", 0.0, 10.0, None, 4, 40))
    text = links(Timeline(8, events, links=traffic.links()))
    assert text.startswith("Links: node 0 to rack 0, rail 0, out limits")
    assert "80 B" in text and "80 %" in text
    assert "none limits, a device works 99 s" in links(
        Timeline(1, (Event(0, "F", "s", 0.0, 99.0),), links=traffic.links())
    )
    assert links(Timeline(1, events[:1])) == ""
