"""Plans as files: what is read equals what was saved, files of other versions and broken ones, and no torch needed."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphpart as gp
from graphpart.errors import GraphError, PlanError
from graphpart.ir.axes import AxisRule
from graphpart.ir.graph import Graph, Operator, Ref, Source, SourceLine, Symbol, Value
from graphpart.ir.placement import Placement, Tile
from graphpart.ir.region import Intervals
from graphpart.planning.choices import Choices
from graphpart.planning.codec import (
    decode,
    encode,
    graph_from_dict,
    graph_to_dict,
    placement_from_dict,
    placement_to_dict,
)
from graphpart.planning.plan import Plan
from graphpart.strategies import Candidate

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.xdist_group("plan_file")  # its tests share plans

IDS = torch.arange(4 * 12).reshape(4, 12) % 60
TEXT = {"input_ids": IDS, "labels": IDS, "use_cache": False}


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=60, n_positions=12, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    return transformers.ResNetForImageClassification(config)


IMAGE = {
    "pixel_values": torch.linspace(-1, 1, 4 * 3 * 32 * 32).reshape(4, 3, 32, 32),
    "labels": torch.tensor([0, 1, 1, 0]),
}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {
        "GPT-2": gp.plan(gpt2(), 2, kwargs=TEXT, strategy="layer", num_microbatches=2),
        "ResNet": gp.plan(resnet(), 2, kwargs=IMAGE, num_microbatches=2, batch_norm="microbatch"),
    }


@pytest.mark.parametrize("name", ["GPT-2", "ResNet"])
def test_a_plan_comes_back_as_it_was(plans: dict[str, Plan], name: str, tmp_path: Path) -> None:
    plan = plans[name]
    path = plan.save(tmp_path / "deep" / "plan.json")
    found = gp.Plan.load(str(path))
    assert len(plan.graph.operators) == len(found.graph.operators)
    for ours, theirs in zip(plan.graph.operators, found.graph.operators, strict=True):
        for field in fields(Operator):
            assert getattr(ours, field.name) == getattr(theirs, field.name), (ours, field.name)
    for field in fields(Plan):
        assert getattr(plan, field.name) == getattr(found, field.name), field.name
    assert found.explain() == plan.explain()
    assert found.dot() == plan.dot()
    # Saved again, it is the same file: plans can be compared and kept in version control.
    assert found.save(tmp_path / "again.json").read_text() == path.read_text()
    assert sorted(p.name for p in path.parent.iterdir()) == ["plan.json"]


def test_a_saved_plan_runs_the_model(plans: dict[str, Plan], tmp_path: Path) -> None:
    path = plans["GPT-2"].save(tmp_path / "plan.json")
    plain = gpt2()
    expected = plain(**TEXT).loss
    expected.backward()
    parted = gp.partition(gpt2(), plan=str(path))
    loss = parted(**TEXT).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    gradients = parted.grad_dict()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    assert parted.plan.placement.devices == (0, 1)


@pytest.mark.slow
def test_planning_from_a_file_needs_no_torch(plans: dict[str, Plan], tmp_path: Path) -> None:
    plan = plans["GPT-2"]
    plan.save(tmp_path / "plan.json")
    program = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, NoTorch())
import graphpart as gp
from graphpart.planning.make import make_plan

plan = gp.Plan.load(sys.argv[1])
other = make_plan(plan.graph, gp.preset("2xH100"), gp.Choices(strategy="layer", num_microbatches=2))
other.save(sys.argv[1] + ".other")
other.draw(sys.argv[1] + ".dot")
assert not any(name.partition(".")[0] == "torch" for name in sys.modules)
sys.stdout.reconfigure(encoding="utf-8")
print(plan.explain())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "plan.json")], capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == plan.explain()
    assert (tmp_path / "plan.json.dot").read_text().startswith("digraph")


def test_repeated_blocks_take_little_room(plans: dict[str, Plan], tmp_path: Path) -> None:
    plan = plans["GPT-2"]
    data = json.loads(plan.save(tmp_path / "plan.json").read_text())
    assert len(data["graph"]["rules"]) <= len(plan.graph.operators) / 2
    assert (tmp_path / "plan.json").stat().st_size < 600 * len(plan.graph.operators)


@pytest.mark.parametrize(
    "argument",
    [
        None, True, 0, 1, -1.5, 1e300, "text", "", (), (1, (2, "x")), [1, [2]], (1.0, 1, False), Ref("x"),
        Symbol("dtype", "bool"), Symbol("device", ""), slice(None, Ref("n"), 2), inf, -inf, 1 + 2j, complex(0, inf),
        ..., {"a": (1, 2), 3: Ref("x"), (1, 2): None}, (None, Ref("x"), [Ref("y"), slice(0, -1)]),
    ],
    ids=repr,
)  # fmt: skip
def test_arguments_come_back_as_they_were(argument: Any) -> None:
    text = json.dumps(encode(argument), allow_nan=False)
    found = decode(json.loads(text))
    assert found == argument
    assert repr(found) == repr(argument)


def test_nan_comes_back_as_nan() -> None:
    assert repr(decode(json.loads(json.dumps(encode((nan, 1j * nan)), allow_nan=False)))) == repr((nan, 1j * nan))


def toy() -> Graph:
    """One operator that uses every field."""
    rule = AxisRule(
        {"a b": 2, "h": 4, "d": 8, "k": 3},
        ((("a b",), ("h", "d"), ()), (("k",),), ()),
        ((("a b",), ("h", "d"), ()), ()),
        frozenset({"k"}),
        frozenset({"h"}),
        ((0, 1), (2,)),
        0,
    )
    x, w, s = Value("x", (2, 32, 1), "float32"), Value("w", (3,), "bfloat16", True), Value("s", (), "int64")
    operator = Operator(
        "op", "own.op.default", (Ref("x"), Ref("w"), -inf), {"scale": Ref("s"), "tail": (slice(0, 1), None)},
        (Value("op.0", (2, 32, 1), "float32", True), Value("op.1", (), "int64")), rule, 1.5, 3.0, ("x", "op.0"),
        7, "a.b", SourceLine("model.py", 3, "y = op(x)  # «π»"), True, "why",
        "a@1.b@1", "checkpoint 0",
    )  # fmt: skip
    return Graph(
        "Toy",
        (Source(x, "input", ("args[0]",)), Source(w, "parameter", ("w", "tied.w"), True), Source(s, "buffer", ("n",))),
        (operator, Operator("bare", "own.bare.default")),
        (Ref("op.0"), None, 3, "text"),
        (("s", "op.1"),),
        {"x": 0},
    )


def test_every_field_of_a_graph_is_kept() -> None:
    graph = toy()
    found = graph_from_dict(json.loads(json.dumps(graph_to_dict(graph), allow_nan=False)))
    assert found == graph
    assert repr(found) == repr(graph)
    assert list(found.operators[0].rule.extents) == ["a b", "h", "d", "k"]  # type: ignore[union-attr]


def test_tiles_keep_their_axes() -> None:
    uneven = Intervals.of([(0, 64), (128, 129), (130, 200)])
    placement = Placement(
        {"whole": (Tile(1),), "cut": (Tile(0, {"n": uneven, "b": Intervals.span(0, 2)}), Tile(2, {"n": Intervals()}))},
        {"weight": 2},
    )
    data = json.loads(json.dumps(placement_to_dict(placement)))
    assert data["tiles"]["cut"][0]["axes"]["n"] == "0:64,128,130:200"
    assert placement_from_dict(data) == placement


def test_an_argument_that_json_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    graph = replace(toy(), operators=(replace(toy().operators[0], args=(Ref("x"), object())),), mutations=())
    with pytest.raises(GraphError, match=r"operator op \(own.op.default.*of type object"):
        graph_to_dict(graph)
    plan = Plan(graph, gp.make_cluster(1), Placement.whole(graph, {"op": 0}), "by hand")
    with pytest.raises(PlanError, match="of type object"):
        plan.save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_cluster_candidates_and_notes_are_kept(tmp_path: Path) -> None:
    graph = toy()
    cluster = gp.make_cluster(["cpu:0", "cpu:1"])
    cluster = replace(cluster, links={(1, 0): gp.Link(1e-3, 1e6)}, name="uneven")
    candidates = (Candidate("layer", 0.25), Candidate("single", None, "out of memory: «cpu:0»"), Candidate("own", inf))
    choices = Choices(num_microbatches=3, batch_norm="microbatch", deadline_s=7.5)
    plan = Plan(graph, cluster, Placement.whole(graph, {"op": 1, "bare": 0}), "own", choices, candidates, ("n",))
    assert gp.Plan.load(plan.save(tmp_path / "plan.json")) == plan


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    graph = toy()
    plan = Plan(graph, gp.make_cluster(2), Placement.whole(graph, {"op": 1, "bare": 0}), "by hand")
    path = plan.save(tmp_path / "plan.json")
    return path, json.loads(path.read_text())


def test_unknown_keys_are_ignored_at_every_level(saved: tuple[Path, dict[str, Any]]) -> None:
    path, data = saved
    expected = gp.Plan.load(path)

    def sprinkle(node: Any) -> None:
        if isinstance(node, dict):
            for item in list(node.values()):
                sprinkle(item)
            node["from_the_future"] = {"any": ["thing"]}
        elif isinstance(node, list):
            for item in node:
                sprinkle(item)

    graph = data["graph"]
    by_name = [
        (graph, "sample_dims"),
        (data["placement"], "tiles"),
        (data["placement"], "homes"),
        (graph["rules"][0], "extents"),
    ]
    by_name += [(device, "flops_per_s") for device in data["cluster"]["device"]]
    by_name += [(op, "kwargs") for op in graph["operators"] if "kwargs" in op]
    plain = [copy.deepcopy(owner[key]) for owner, key in by_name]
    sprinkle(data)
    for (owner, key), value in zip(by_name, plain, strict=True):
        owner[key] = value
    path.write_text(json.dumps(data))
    assert gp.Plan.load(path) == expected


def test_missing_optional_keys_take_their_defaults(saved: tuple[Path, dict[str, Any]]) -> None:
    path, data = saved
    expected = gp.Plan.load(path)
    for key in ("strategy", "candidates", "notes"):
        del data[key]
    data["choices"] = {}
    del data["cluster"]["links"]
    path.write_text(json.dumps(data))
    choices = Choices(strategy=expected.placement)
    assert gp.Plan.load(path) == replace(expected, strategy="", choices=choices)


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *keys, last, value = path

    def change(data: dict[str, Any]) -> None:
        node: Any = data
        for key in keys:
            node = node[key]
        if value is KeyError:
            del node[last]
        else:
            node[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("version", 3), "version 3, from a later graphpart.*Upgrade"),
        (_set("version", "new"), "its version is 'new'"),
        (_set("version", KeyError), "its version is None"),
        (_set("format", "onnx"), '"format": "graphpart-plan"'),
        (_set("graph", KeyError), "'graph' is missing"),
        (_set("graph", 3), "'graph' holds 3, not an object"),
        (_set("graph", "operators", 0, "target", KeyError), r"graph: operators\[0\]: key 'target' is missing"),
        (_set("graph", "operators", 0, "rule", 9), r"operators\[0\].*row .* is named"),
        (_set("graph", "operators", 0, "args", [{"tensor": 1}]), "none of the tags"),
        (_set("graph", "operators", 0, "args", [{"slice": [1, 2, 3, 4]}]), "cannot be read"),
        (_set("graph", "operators", 0, "args", [{"ref": "nowhere"}]), "reads 'nowhere', which nothing before it makes"),
        (
            _set("graph", "operators", 0, "saved_extra_bytes", True),
            "'saved_extra_bytes' holds true, not a whole number",
        ),
        (_set("graph", "sources", 1, "value", "shape", ["a"]), r"sources\[1\].*not a whole number"),
        (_set("graph", "lines", 0, "model.py"), r"lines\[0\]"),
        (_set("graph", "outputs", {}), "'outputs' holds {}, not a list"),
        (_set("placement", "tiles", "op", 2), "on device 2; there are 2 devices"),
        (_set("placement", "tiles", "op", "gpu"), "tiles of 'op'"),
        (_set("placement", "tiles", "op", [{"device": 0, "axes": {"d": "a:b"}}]), "tiles of 'op'"),
        (_set("placement", "tiles", "op", [{"device": 0, "axes": {"h": "0:2"}}]), "cannot be cut along 'h'"),
        (_set("placement", "tiles", "bare", KeyError), "bare.*has no device"),
        (_set("placement", "homes", "w", None), "'w' holds null, not a whole number"),
        (_set("cluster", "device", []), "at least one device"),
        (_set("cluster", "device", 0, "memory_bytes", "much"), "'memory_bytes' has to be a number"),
        (_set("choices", "num_microbatches", 0), "num_microbatches=0; it has to be"),
        (_set("choices", "batch_norm", "sometimes"), "batch_norm='sometimes'; give"),
        (_set("choices", "deadline_s", "soon"), "deadline_s='soon'; give"),
        (_set("choices", 3), "'choices' holds 3, not an object"),
        (_set("candidates", [3]), "plan.json: the plan is damaged"),
    ],
)
def test_a_wrong_file_is_refused_and_says_what_is_wrong(
    saved: tuple[Path, dict[str, Any]], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path, data = saved
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message) as caught:
        gp.Plan.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04\xff", b"[1, 2]", b'"plan"', b'{"format": "graphpart-plan"', b"[" * 100_000]
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"x\.json.*not a plan"):
        gp.Plan.load(path)


def test_a_missing_file_and_an_unwritable_place_are_named(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.json.*No such file"):
        gp.partition(gpt2(), plan=tmp_path / "nowhere.json")
    plan = gp.Plan.load(saved[0])
    with pytest.raises(PlanError, match=r"cannot write.*plan\.json"):
        plan.save(saved[0] / "below.json")


def test_a_plan_of_another_model_is_refused(plans: dict[str, Plan], tmp_path: Path) -> None:
    path = plans["ResNet"].save(tmp_path / "plan.json")
    with pytest.raises(gp.GraphpartError, match="plan"):
        gp.partition(gpt2(), plan=path)(**TEXT)


def test_plan_of_a_model_of_other_sizes_is_used_with_a_warning() -> None:
    plan = gp.plan(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), 2, (torch.randn(3, 4),), strategy="layer")
    parted = gp.partition(nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 2)), plan=plan)
    with pytest.warns(UserWarning, match=r"'0\.weight' of \[8, 4\], but it is \[16, 4\]"):
        parted.verify(torch.randn(3, 4))
    with pytest.raises(gp.GraphpartError, match="strategy cannot be combined with plan="):
        gp.partition(nn.Linear(4, 4), 2, strategy="layer", plan=plan)
