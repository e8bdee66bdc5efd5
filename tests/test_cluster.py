"""Clusters from counts, names, presets, dictionaries and TOML files."""

import ast
import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from graphpart import errors
from graphpart.cost import cluster_from_dict, cluster_to_dict, dump_toml, load_toml, make_cluster, preset
from graphpart.cost.devices.datasheets import (
    CPU_CLOCK_HZ,
    CPU_FLOP_PER_CYCLE,
    DATA_SHEETS,
    INFINIBAND_NDR,
    PCIE3,
    PCIE4,
    PCIE5,
    find_sheet,
)
from graphpart.cost.devices.host import host_cores, host_memory_bytes
from graphpart.errors import ClusterError, GraphpartError
from graphpart.ir.cluster import Cluster, Device, Link, SharedLink

TWO = """
name = "pair"
[[device]]
name = "cuda:0"
kind = "H100"
[[device]]
name = "cpu:0"
kind = "EPYC"
flops_per_s = { float32 = 1e12 }
memory_bytes = 64e9
memory_bandwidth_bytes_per_s = 100e9
efficiency = 0.5
[link]
latency_s = 1e-5
bandwidth_bytes_per_s = 1e10
[[links]]
source = "cuda:0"
destination = "cpu:0"
latency_s = 2e-5
bandwidth_bytes_per_s = 2e10
"""


def names(cluster):
    return [device.name for device in cluster.devices]


def test_a_cluster_is_returned_as_it_is():
    cluster = preset("2xT4")
    assert make_cluster(cluster) is cluster


def test_count_takes_cuda_devices_where_there_are_enough():
    assert names(make_cluster(2, num_cuda_devices=2)) == ["cuda:0", "cuda:1"]
    assert names(make_cluster(3, num_cuda_devices=2)) == ["cpu:0", "cpu:1", "cpu:2"]


def test_cpu_workers_share_the_host():
    one, three = make_cluster(1), make_cluster(3)
    assert three.devices[0].memory_bytes == host_memory_bytes() // 3
    assert sum(d.memory_bytes for d in three.devices) <= one.devices[0].memory_bytes == host_memory_bytes()
    assert one.devices[0].flops_per_s["float32"] == host_cores() * CPU_CLOCK_HZ * CPU_FLOP_PER_CYCLE
    assert three.link(0, 1).latency_s == 20e-6


def test_names_may_be_short_mixed_and_in_any_order():
    cluster = make_cluster(["cpu:1", "cuda", "cpu"])
    assert names(cluster) == ["cpu:1", "cuda:0", "cpu:0"]
    assert cluster.devices[1].memory_bytes == make_cluster("cuda:0").devices[0].memory_bytes
    assert cluster.link(0, 1) == cluster.link(1, 0) == PCIE3
    assert cluster.link(0, 2).latency_s == 20e-6


def test_workers_on_one_card_share_it():
    facts = {"cuda:0": ("NVIDIA H100 80GB HBM3", 80_000_000_000), "cuda:1": ("NVIDIA H100 80GB HBM3", 80_000_000_000)}
    cluster = make_cluster(["cuda:0#0", "cuda:0#1", "cuda:1", "cpu"], facts=facts)
    assert names(cluster) == ["cuda:0#0", "cuda:0#1", "cuda:1", "cpu:0"]
    assert [device.place for device in cluster.devices] == ["cuda:0", "cuda:0", "cuda:1", "cpu:0"]
    first, second, whole, _ = cluster.devices
    assert first.rate("bfloat16") == second.rate("bfloat16") == whole.rate("bfloat16") / 2
    assert first.memory_bytes == whole.memory_bytes // 2
    assert cluster.link(0, 1).bandwidth_bytes_per_s == whole.memory_bandwidth_bytes_per_s
    assert cluster.link(0, 2) == cluster.link(2, 1) == find_sheet("H100").peer
    assert make_cluster(["cuda", "cuda:0#1"], facts=facts).devices[0].memory_bytes == first.memory_bytes


def test_facts_name_the_kind_and_the_memory_of_cuda_devices():
    facts = {"cuda:0": ("NVIDIA A100-SXM4-80GB", 84_987_740_160), "cuda:1": ("Strange Card", 5_000_000_000)}
    cluster = make_cluster(["cuda:0", "cuda:1", "cuda:2"], facts=facts)
    assert [(d.kind, d.memory_bytes) for d in cluster.devices[:2]] == [
        ("A100-SXM-80GB", 84_987_740_160),
        ("CUDA", 5_000_000_000),
    ]


@pytest.mark.parametrize(
    ("reported", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200-SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIe-40GB"),
        ("Tesla V100-SXM2-32GB", "V100-SXM2-32GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", "A10"),
        ("AMD Instinct MI300X OAM", "MI300X"),
    ],
)
def test_kinds_as_the_driver_reports_them(reported, kind):
    sheet = find_sheet(reported)
    assert sheet is not None and sheet.kind == kind


@pytest.mark.parametrize("sheet", DATA_SHEETS, ids=lambda sheet: sheet.kind)
def test_data_sheets_are_found_by_their_kind_and_are_plausible(sheet):
    assert find_sheet(sheet.kind) is sheet
    assert sheet.source
    assert sheet.flops_per_s["float16"] > sheet.flops_per_s["float32"] > 1e12
    assert sheet.memory_bandwidth_bytes_per_s > sheet.host.bandwidth_bytes_per_s
    assert sheet.peer is None or sheet.peer.bandwidth_bytes_per_s > sheet.host.bandwidth_bytes_per_s


@pytest.mark.parametrize("wrong", ["H1000", "L400", "A1000", "H10", "A"])
def test_a_name_that_only_resembles_a_kind_is_not_taken_for_it(wrong):
    assert find_sheet(wrong) is None


def test_preset_within_one_node():
    cluster = preset("8xH100")
    assert names(cluster) == [f"cuda:{i}" for i in range(8)]
    assert {cluster.link(a, b).bandwidth_bytes_per_s for a, b in permutations(range(8), 2)} == {450e9}
    assert cluster.name == "8xH100"


def test_preset_over_nodes_joins_them_by_infiniband():
    cluster = preset("64xH100")
    assert len(cluster) == 64
    assert cluster.link(0, 7).bandwidth_bytes_per_s == 450e9
    assert cluster.link(7, 8) == cluster.link(63, 0) == INFINIBAND_NDR


def test_preset_of_unlike_devices():
    cluster = preset("4xA100-80GB+4xV100")
    assert [d.kind for d in cluster.devices] == ["A100-SXM-80GB"] * 4 + ["V100-SXM2-16GB"] * 4
    assert (cluster.link(0, 3).bandwidth_bytes_per_s, cluster.link(4, 7).bandwidth_bytes_per_s) == (300e9, 150e9)
    assert cluster.link(3, 4) == INFINIBAND_NDR


@pytest.mark.parametrize(("text", "link"), [("2xRTX4090", PCIE4), ("4xT4", PCIE3), ("1xT4+1xL4", PCIE3)])
def test_preset_over_pcie(text, link):
    cluster = preset(text)
    assert {cluster.link(a, b) for a, b in permutations(range(len(cluster)), 2)} == {link}


def test_preset_with_host():
    cluster = preset("8xH100 + 2xCPU")
    assert names(cluster)[-2:] == ["cpu:0", "cpu:1"]
    assert cluster.link(0, 8) == PCIE5


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (0, ["0 devices"]),
        (-2, ["-2"]),
        (True, ["True"]),
        (1.5, ["1.5"]),
        ([], ["empty"]),
        (["cpu:0", "cpu"], ["'cpu:0'"]),
        (["cuda:0", "cuda"], ["'cuda:0'", "share one card", "'cuda:0#1'"]),
        (["cpu:0#0", "cpu:0#1"], ["'cpu:0#0'"]),
        (["gpu:0"], ["'gpu:0'", "cuda:0"]),
        ([0, 1], ["0", "cpu:0"]),
        ("8xH1000", ["'H1000'", "H100-SXM"]),
        ("0xH100", ["'0xH100'"]),
        ("H100", ["'H100'", "8xH100"]),
        ("4xA100+", ["''"]),
        ("missing.toml", ["missing.toml", "No such file"]),
    ],
)
def test_errors_name_what_is_wrong(spec, words):
    with pytest.raises(ClusterError) as error:
        make_cluster(spec)
    assert isinstance(error.value, GraphpartError)
    assert all(word in str(error.value) for word in words)


def test_toml_file(tmp_path):
    path = tmp_path / "pair.toml"
    path.write_text(TWO)
    cluster = make_cluster(path)
    assert make_cluster(str(path)) == load_toml(path) == cluster
    assert cluster.name == "pair"
    assert cluster.devices[0].flops_per_s["bfloat16"] == 989.4e12
    assert cluster.devices[1] == Device("cpu:0", "EPYC", {"float32": 1e12}, 64_000_000_000, 100e9, 0.5)
    assert cluster.link(0, 1) == Link(2e-5, 2e10)
    assert cluster.link(1, 0) == Link(1e-5, 1e10)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("memory_bytes", "memory", ["[[device]] 2", "'memory'", "did you mean 'memory_bytes'"]),
        ('name = "pair"', 'title = "pair"', ["unknown key 'title'"]),
        ("memory_bytes = 64e9", 'memory_bytes = "64 GB"', ["'cpu:0'", "'memory_bytes'", "number", "64 GB"]),
        ("memory_bytes = 64e9", "memory_bytes = true", ["'memory_bytes'", "number"]),
        ("memory_bytes = 64e9", "memory_bytes = inf", ["'memory_bytes'", "finite"]),
        ("memory_bytes = 64e9", "memory_bytes = -1", ["'cpu:0'", "positive memory_bytes"]),
        ("memory_bytes = 64e9\n", "", ["'memory_bytes' is missing", "'EPYC'; known kinds are CPU, ", "A100"]),
        ('kind = "EPYC"\n', "", ["[[device]] 2", "'kind' is missing"]),
        ('kind = "EPYC"', "kind = 7", ["'kind'", "text"]),
        ("{ float32 = 1e12 }", "1e12", ["'flops_per_s'", "table"]),
        ("{ float32 = 1e12 }", '{ float32 = "fast" }', ["'float32'", "number"]),
        ("{ float32 = 1e12 }", "{ float16 = 1e12 }", ["float32"]),
        ("efficiency = 0.5", "efficiency = 1.5", ["efficiency 1.5"]),
        ('name = "cpu:0"', 'name = "cuda:0"', ["[[device]] 2", "'name'", "'cuda:0'"]),
        ('destination = "cpu:0"', 'destination = "cpu:9"', ["[[links]] 1", "'destination'", "'cpu:9'"]),
        ('destination = "cpu:0"', 'destination = "cuda:0"', ["'source' and 'destination'"]),
        ("latency_s = 2e-5\n", "", ["[[links]] 1", "'latency_s' is missing"]),
        ("latency_s = 2e-5", "latency_s = -1", ["[[links]] 1", "latency_s"]),
        ("latency_s = 1e-5", "latency = 1e-5", ["[link]", "'latency_s'"]),
        ("[link]\nlatency_s = 1e-5\nbandwidth_bytes_per_s = 1e10\n", "", ["'link' is missing"]),
        ("[[device]]", "[device]", ["TOML"]),
        ("name = ", "name ", ["TOML"]),
    ],
)
def test_toml_errors_name_file_and_key(tmp_path, old, new, words):
    assert old in TWO
    path = tmp_path / "wrong.toml"
    path.write_text(TWO.replace(old, new, 1) if old != 'name = "cpu:0"' else TWO.replace(old, new))
    with pytest.raises(ClusterError) as error:
        load_toml(path)
    assert str(path) in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_toml_links_given_twice(tmp_path):
    path = tmp_path / "twice.toml"
    path.write_text(TWO + TWO[TWO.index("[[links]]") :])
    with pytest.raises(ClusterError, match=r"\[\[links\]\] 2.*given twice"):
        load_toml(path)


def test_dict_errors():
    with pytest.raises(ClusterError, match="at least one device"):
        cluster_from_dict({})
    with pytest.raises(ClusterError, match="list of tables"):
        cluster_from_dict({"device": {"name": "cpu:0"}})
    with pytest.raises(ClusterError, match=r"plan\.json.*'link' has to be a table"):
        cluster_from_dict({"device": [{"name": "cuda:0", "kind": "T4"}], "link": 3}, "plan.json")


@pytest.mark.parametrize("spec", ["8xH100", "64xH100", "4xA100+4xV100+1xCPU", 3, ["cuda:1", "cpu:0"]])
def test_round_trips(tmp_path, spec):
    cluster = make_cluster(spec)
    path = tmp_path / "cluster.toml"
    path.write_text(dump_toml(cluster), encoding="utf-8")
    assert load_toml(path) == cluster
    assert cluster_from_dict(json.loads(json.dumps(cluster_to_dict(cluster)))) == cluster


def test_round_trip_of_odd_names(tmp_path):
    odd = 'a "b" \\ é\n\x7f'
    device = Device("cpu:0", odd, {"float32": 1e12, "odd.key": 1 / 3}, 1, 1e-300)
    cluster = Cluster((device,), Link(0.0, 7), {}, odd)
    path = tmp_path / "odd.toml"
    path.write_text(dump_toml(cluster), encoding="utf-8")
    assert load_toml(path) == cluster


def test_shared_links_in_files(tmp_path):
    shared = (
        SharedLink("card 0", frozenset((0, 1)), frozenset((2,))),
        SharedLink("", frozenset((2,)), frozenset((0,))),
    )
    cluster = replace(make_cluster(3), shared=shared)
    path = tmp_path / "shared.toml"
    path.write_text(dump_toml(cluster), encoding="utf-8")
    assert load_toml(path) == cluster
    assert cluster_from_dict(json.loads(json.dumps(cluster_to_dict(cluster)))) == cluster
    for old, new, words in (
        ('"cpu:2"]', '"cpu:9"]', r"\[\[shared\]\] 1.*'destinations' names 'cpu:9'"),
        ('sources = ["cpu:0", "cpu:1"]', "sources = []", "'sources' has to be a list"),
        ("sources =", "source =", "unknown key 'source'; did you mean 'sources'"),
    ):
        path.write_text(dump_toml(cluster).replace(old, new, 1), encoding="utf-8")
        with pytest.raises(ClusterError, match=words):
            load_toml(path)


@pytest.mark.parametrize(
    ("files", "allowed"),
    [
        ("cost/*.py", ("errors", "ir", "rules", "cost")),
        ("strategies/*.py", ("errors", "ir", "rules", "cost", "strategies")),
        ("simulator.py", ("errors", "ir", "cost")),
    ],
)
def test_planning_imports_no_torch_and_only_lower_layers(files, allowed):
    paths = list(Path(errors.__file__).parent.glob(files))
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                parts = module.split(".")
                assert parts[0] != "torch", path
                assert parts[0] != "graphpart" or parts[1] in allowed, (path, module)


@pytest.mark.parametrize("kind", ["CPU", "cpu", "Cpu"])
def test_a_file_may_leave_a_workers_share_of_this_host_out(kind: str, tmp_path: Path) -> None:
    link = "[link]\nlatency_s = 1e-5\nbandwidth_bytes_per_s = 1e10\n"
    rows = [f'[[device]]\nname = "cpu:{i}"\nkind = "{kind}"\n' for i in range(2)]
    (tmp_path / "two.toml").write_text(rows[0] + rows[1] + "memory_bytes = 1000\n" + link)
    first, second = load_toml(tmp_path / "two.toml").devices
    expected = preset("2xCPU").devices[0]
    assert first == replace(expected, name="cpu:0", kind=kind)
    assert second == replace(expected, name="cpu:1", kind=kind, memory_bytes=1000)
    (tmp_path / "mixed.toml").write_text(rows[0] + '[[device]]\nname = "cuda:0"\nkind = "h100"\n' + link)
    worker, gpu = load_toml(tmp_path / "mixed.toml").devices
    assert worker.flops_per_s == preset("1xCPU").devices[0].flops_per_s
    assert gpu.memory_bytes == preset("1xH100").devices[0].memory_bytes
