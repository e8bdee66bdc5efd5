"""Named strategies on models that people train: what is cut, and that the cut model computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphpart as gp
from graphpart.cost import make_cluster
from graphpart.errors import ArgumentError, PlacementError
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.planning.choices import Choices
from graphpart.planning.make import make_plan
from graphpart.strategies import STRATEGIES, Terms
from graphpart.strategies.cuts.inverse_rules import shares_of
from graphpart.trace import trace
from tests.helpers import zoo

pytestmark = pytest.mark.sampled(12)

torch.set_num_threads(1)


def traced(name: str, batch: int = 4) -> Graph:
    sample = zoo.MODELS[name](batch)
    return trace(sample.model, sample.args, sample.kwargs).graph


def axes(placement: Placement, graph: Graph, part: str) -> list[str]:
    """Per operator whose target contains a text, the axes that it is cut along."""
    names = [op.name for op in graph.operators if part in op.target]
    return ["".join(dict.fromkeys(axis for tile in placement.tiles[name] for axis in tile.axes)) for name in names]


def test_M1_gpt2_is_cut_as_megatron_does() -> None:
    graph = traced("gpt2")
    placement = STRATEGIES["feature"](graph, make_cluster(2))
    placement.check(graph, 2)
    assert axes(placement, graph, "addmm") == ["n", "k", "n", "k"] * 2
    assert axes(placement, graph, "scaled_dot_product") == ["b1", "b1"]
    assert axes(placement, graph, "linear") == ["n"] and axes(placement, graph, "cross_entropy") == ["c"]
    assert axes(placement, graph, "aten.embedding.")[0] == "v"
    first = next(op.name for op in graph.operators if "addmm" in op.target)
    assert [len(tile.axes["n"].runs) for tile in placement.tiles[first]] == [3, 3]
    assert set(axes(placement, graph, "layer_norm")) == {""}


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_M1_pairs_in_other_transformers(name: str) -> None:
    graph = traced(name)
    placement = STRATEGIES["feature"](graph, make_cluster(2))
    placement.check(graph, 2)
    found = {
        op.module_path: "".join(placement.tiles[op.name][0].axes) for op in graph.operators if "linear" in op.target
    }
    columns = ("query", "key", "value", "intermediate.dense", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    columns += ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "DenseReluDense.wi", "lm_head")
    rows = ("output.dense", "o_proj", "down_proj", "SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo")
    assert sum(path.endswith(rows) for path in found) >= 4
    for path, cut in found.items():
        if path.endswith(rows):
            assert cut == "k", path
        elif path.endswith(columns):
            assert cut == "n", path


@pytest.mark.parametrize("num_devices", [3, 4, 5])
def test_M1_a_vocabulary_and_heads_that_do_not_divide(num_devices: int) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = transformers.GPT2Config(n_layer=1, use_cache=False)  # 12 heads, 50257 words
        model = transformers.GPT2LMHeadModel(config)
        ids = torch.zeros(2, 16, dtype=torch.long)
    graph = trace(model, (ids,), {"labels": ids}).graph
    placement = STRATEGIES["feature"](graph, make_cluster(f"{num_devices}xA100"))
    placement.check(graph, num_devices)
    (attention,) = (op.name for op in graph.operators if "scaled_dot_product" in op.target)
    heads = [len(tile.axes["b1"]) for tile in placement.tiles[attention]]
    assert heads == [len(part) for part in shares_of(12, [1] * num_devices) or ()]
    (head,) = (op.name for op in graph.operators if op.module_path == "lm_head")
    words = [len(tile.axes["n"]) for tile in placement.tiles[head]]
    assert words == [len(part) for part in shares_of(50257, [1] * num_devices) or ()]
    assert placement.shards["transformer.wte.weight"][0].region.shape == (words[0], 768)


class AlexNet(nn.Module):
    """Krizhevsky's network of 2014 at its own sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        )
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()),
            nn.Linear(4096, 1000),
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.classifier(torch.flatten(self.features(x), 1)), y)


@pytest.mark.parametrize("devices", ["2xCPU", "2xA100", "4xV100"])
def test_K1_convolutions_by_samples_and_classifier_by_features(devices: str) -> None:
    with torch.device("meta"):
        graph = trace(AlexNet(), (torch.empty(128, 3, 224, 224), torch.empty(128, dtype=torch.long)), {}).graph
    placement = STRATEGIES["hybrid"](graph, make_cluster(devices))
    placement.check(graph, len(make_cluster(devices)))
    assert axes(placement, graph, "conv2d") == ["n"] * 5
    assert set(axes(placement, graph, "linear")) <= {"n", "k"} and axes(placement, graph, "linear")[0] == "n"


def test_hybrid_gives_groups_of_layers_to_groups_of_devices() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=4, use_cache=False))
        ids = torch.zeros(32, 1024, dtype=torch.long)
    graph = trace(model, (ids,), {"labels": ids}).graph
    cluster = make_cluster("4xH100")
    fast, slow = gp.Link(1e-6, 4e11), gp.Link(1e-5, 1e10)  # two hosts of two devices each
    links = {(a, b): fast if a // 2 == b // 2 else slow for a in range(4) for b in range(4) if a != b}
    cluster = gp.Cluster(cluster.devices, slow, links)
    placement = STRATEGIES["hybrid"](graph, cluster, Terms(num_microbatches=2))
    placement.check(graph, 4)
    groups = {tuple(t.device for t in tiles) for tiles in placement.tiles.values() if any(t.axes for t in tiles)}
    assert groups == {(0, 1), (2, 3)}


@pytest.mark.parametrize("strategy", ["batch", "feature", "hybrid", "free"])
@pytest.mark.parametrize("name", ["gpt2", "resnet", "vit"])
@pytest.mark.parametrize("num_devices", [2, 3])
def test_a_cut_model_computes_the_same(name: str, strategy: str, num_devices: int) -> None:
    sample = zoo.MODELS[name](7)
    parted = gp.partition(sample.model, num_devices, strategy=strategy)
    parted.verify(*sample.args, **sample.kwargs)


def test_spatial_split_computes_the_same() -> None:
    sample = zoo.MODELS["resnet"](2)
    parted = gp.partition(sample.model, 2, strategy="spatial")
    parted.verify(*sample.args, **sample.kwargs)
    cut = [op for op in parted.plan.graph.operators if "conv2d" in op.target]
    assert all(list(t.axes) in (["o0"], ["o1"]) for t in parted.plan.placement.tiles[cut[0].name])


def test_shard_parameters_computes_the_same() -> None:
    sample = zoo.MODELS["gpt2"](4)
    parted = gp.partition(sample.model, 2, strategy="batch", strategy_options={"shard_parameters": True})
    parted.verify(*sample.args, **sample.kwargs)
    assert "transformer.h.0.mlp.c_fc.weight" in parted.plan.placement.shards


def test_a_split_by_hand_computes_the_same() -> None:
    sample = zoo.MODELS["gpt2"](4)
    wishes = {"transformer.h.*.mlp.c_fc": gp.split("n", {0: [*range(7), 63], 1: range(7, 63)})}
    parted = gp.partition(sample.model, 2, strategy=wishes)
    parted.verify(*sample.args, **sample.kwargs)


def test_auto_lists_every_strategy() -> None:
    plan = make_plan(traced("gpt2"), make_cluster(2), Choices(strategy="auto"))
    assert [candidate.strategy for candidate in plan.candidates] == list(STRATEGIES)
    assert all(candidate.step_s is not None or candidate.reason for candidate in plan.candidates)


def test_a_cut_is_carried_over_to_smaller_batches_and_evaluation() -> None:
    sample = zoo.MODELS["gpt2"](7)
    parted = gp.partition(sample.model, 3, strategy="batch")
    for size in (7, 5, 2, 1):
        other = zoo.MODELS["gpt2"](size)
        parted.verify(*other.args, **other.kwargs)
    parted.eval()
    parted.verify(*sample.args, **sample.kwargs)


class Normalised(nn.Module):
    """A convolution under an InstanceNorm that keeps running statistics, which its schema does not say."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)  # under a norm, a bias has no gradient but rounding
        self.norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm(self.conv(x))).square()


@pytest.mark.parametrize("strategy", ["batch", "feature", "spatial", "hybrid", "free"])
def test_what_keeps_a_state_runs_once(strategy: str) -> None:
    torch.manual_seed(0)
    gp.partition(Normalised(), 3, strategy=strategy).verify(torch.randn(4, 3, 6, 6)).check(1e-5)


def test_replicas_of_what_keeps_a_state_are_refused() -> None:
    def everywhere(graph: Graph, cluster: gp.Cluster, **_: object) -> Placement:
        return Placement({op.name: (gp.Tile(0), gp.Tile(1)) for op in graph.operators})

    with pytest.raises(PlacementError, match=r"instance_norm .* is placed on 2 devices, but it keeps a state"):
        gp.partition(Normalised(), 2, strategy=everywhere)(torch.randn(4, 3, 6, 6))


@pytest.mark.parametrize("strategy", ["batch", "spatial"])
def test_batch_norm_over_cut_samples_keeps_the_dtype_of_autocast(strategy: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        parted = gp.partition(model, 2, strategy=strategy)
        assert parted(x).dtype == model(x).dtype == torch.bfloat16
        parted.verify(x).check(5e-2)


def test_options_that_a_strategy_does_not_have_are_refused() -> None:
    model, args = nn.Linear(4, 4), (torch.randn(2, 4),)
    with pytest.raises(ArgumentError, match=r"'batch' has no option 'foo'; it has shard_parameters"):
        gp.plan(model, 2, args, strategy="batch", strategy_options={"foo": 1})
    with pytest.raises(ArgumentError, match="give a mapping"):
        gp.plan(model, 2, args, strategy="batch", strategy_options="shard_parameters")  # type: ignore[arg-type]
    with pytest.raises(PlacementError, match="gave a NoneType"):
        gp.plan(model, 2, args, strategy=lambda graph, cluster, **options: None)
