"""Krizhevsky's split of AlexNet, Megatron-LM's of a transformer, and the collectives they are made of, on real steps.

Each test's name begins with the requirement it holds.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphpart as gp
from graphpart.cost import make_cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, Tile
from tests.helpers.placements import along, copies, equal, place, sent, spans

pytestmark = pytest.mark.sampled(4)


def collectives(parted: gp.PartitionedModule, values: bool = True) -> tuple[Counter[str], Counter[str]]:
    """What the workers took part in, forward and backward: of values that operators make, or of parameters."""
    report = parted.last_step
    assert report is not None and report.backward is not None
    parameters = parted.plan.graph.source
    mirrored = set(report.backward.collectives)
    took_part = [c for c in report.collectives if (c.value not in parameters) == values]
    return Counter(c.kind for c in took_part if c not in mirrored), Counter(c.kind for c in took_part if c in mirrored)


def step(model: nn.Module, devices: Any, strategy: Any, args: tuple[Tensor, ...]) -> gp.PartitionedModule:
    """One training step; the loss and every gradient have to be the plain model's."""
    plain = copy.deepcopy(model)
    parted = gp.partition(model, devices, strategy=strategy)
    found, expected = parted(*args), plain(*args)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    found.sum().backward()
    expected.sum().backward()
    for (name, parameter), gradient in zip(plain.named_parameters(), parted.grad_dict().values(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-10, msg=name)
    return parted


# --- K1: convolutions by samples, classifier by features ------------------------------------------------------------


class AlexNet(nn.Module):
    """Krizhevsky's network of 2014, smaller: five convolutions of few weights, three dense layers of many."""

    def __init__(self, width: int = 8, hidden: int = 256) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, width, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(width, 2 * width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(2 * width, 3 * width, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(3 * width, 2 * width, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU()),
        )
        self.classifier = nn.Sequential(
            *(nn.Linear(2 * width * 7 * 7, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()),
            nn.Linear(hidden, 100),
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(self.features(images).flatten(1)), labels)


def cuts(parted: gp.PartitionedModule, target: str) -> list[str]:
    """Per operator whose target contains a text, the axes that it is cut along."""
    tiles = parted.plan.placement.tiles
    names = [op.name for op in parted.plan.graph.operators if target in op.target]
    return ["".join(dict.fromkeys(axis for tile in tiles[name] for axis in tile.axes)) for name in names]


@pytest.mark.parametrize("num_devices", [2, 3])
def test_K1_hybrid_cuts_convolutions_by_samples_and_the_classifier_by_features(num_devices: int) -> None:
    """By cost: one pass of activations between the two is cheaper than the classifier's weights or all activations."""
    torch.manual_seed(0)
    model = AlexNet().double()
    args = (torch.randn(16, 3, 64, 64, dtype=torch.float64), torch.randint(0, 100, (16,)))
    cluster = gp.Cluster(make_cluster(num_devices).devices, gp.Link(1e-6, 1e9))
    size_bytes = {}
    for strategy in ("hybrid", "batch", "feature"):
        parted = step(copy.deepcopy(model), cluster, strategy, args)
        size_bytes[strategy] = sent(parted)[1]
        if strategy == "hybrid":
            assert cuts(parted, "conv2d") == ["n"] * 5 and cuts(parted, "max_pool2d") == ["b0"] * 2
            assert set(cuts(parted, "linear")) == {"n", "k"}  # features, made or read: not a sample axis
    assert size_bytes["hybrid"] < size_bytes["feature"] < size_bytes["batch"]
    # Data parallelism sends all weights and their gradients; the hybrid split leaves the classifier's where they are.
    classifier = sum(p.numel() for p in model.classifier.parameters()) * 8
    saved = 2 * (num_devices - 1) * classifier
    assert size_bytes["batch"] - size_bytes["hybrid"] > saved / 2 > 0


def test_K1_where_messages_are_slow_to_start_the_same_model_is_cut_by_samples_alone() -> None:
    """The choice is the costs', not the layer's name: the classifier's features would take more rounds of messages."""
    cluster = gp.Cluster(make_cluster(2).devices, gp.Link(1e-2, 1e12))
    args = (torch.randn(16, 3, 64, 64, dtype=torch.float64), torch.randint(0, 100, (16,)))
    torch.manual_seed(0)
    parted = gp.partition(AlexNet().double(), cluster, strategy="hybrid")
    parted.prepare(*args)
    assert not {"k", "o", "c"} & set(cuts(parted, "linear") + cuts(parted, "conv2d"))


# --- M1: Megatron-LM --------------------------------------------------------------------------------------------------

WIDTH, HEADS, BATCH, LENGTH = 12, 6, 4, 5


class Block(nn.Module):
    """linear -> GELU -> linear on a residual, after self-attention if asked for."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.attends = attends
        if attends:
            self.before = nn.LayerNorm(WIDTH)
            self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.attends:
            y = self.before(x)
            q, k, v = (w(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in (self.query, self.key, self.value))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class LanguageModel(nn.Module):
    """Tied embedding and head, blocks between, and the loss."""

    def __init__(self, num_blocks: int, attends: bool, vocabulary: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.blocks = nn.ModuleList(Block(attends) for _ in range(num_blocks))
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def language_step(num_blocks: int, attends: bool, num_devices: int, vocabulary: int = 48) -> gp.PartitionedModule:
    torch.manual_seed(0)
    model = LanguageModel(num_blocks, attends, vocabulary).double()
    ids = torch.randint(0, vocabulary, (BATCH, LENGTH))
    return step(model, num_devices, "feature", (ids, ids.roll(-1, 1)))


@pytest.mark.parametrize("num_devices", [2, 3])
@pytest.mark.parametrize("attends", [False, True])
def test_M1_one_all_reduce_forward_and_one_backward_a_block_and_two_a_transformer_layer(
    num_devices: int, attends: bool
) -> None:
    """Column, then row; heads, then row. What a block adds is found by comparing one, two and three of them."""
    found = [collectives(language_step(n, attends, num_devices)) for n in (1, 2, 3)]
    a_block = Counter({"all-reduce": 1 + attends})
    for fewer, more in itertools.pairwise(found):
        assert more[0] - fewer[0] == more[1] - fewer[1] == a_block
        assert not fewer[0] - more[0] and not fewer[1] - more[1]


@pytest.mark.parametrize("num_devices", [2, 3])
def test_M1_a_pair_alone_is_cut_by_columns_then_rows_and_keeps_its_parts_of_the_weights(num_devices: int) -> None:
    parted = language_step(2, False, num_devices)
    assert cuts(parted, "linear")[:-1] == ["n", "k"] * 2
    weights = {name for name in parted.plan.placement.shards if "up" in name or "down.weight" in name}
    assert len(weights) == 2 * 3  # the bias of the rows is added once, so it is whole
    wires = [w for w in parted.plan.program.wires if w.value in weights]
    tags = {b.wire for b in parted.plan.program.bridges}
    assert wires and not tags & {w.name for w in wires}


@pytest.mark.parametrize("num_devices", [2, 3])
def test_M1_embedding_and_cross_entropy_by_vocabulary_never_gather_the_logits(num_devices: int) -> None:
    vocabulary = 3000
    parted = language_step(1, False, num_devices, vocabulary)
    assert cuts(parted, "aten.embedding.") == ["v"] and cuts(parted, "cross_entropy") == ["c"]
    assert cuts(parted, "linear")[-1] == "n"
    logits_bytes = BATCH * LENGTH * vocabulary * 8
    size_bytes = sent(parted)[1]
    assert 0 < size_bytes < logits_bytes / 5
    assert size_bytes == sent(language_step(1, False, num_devices, 2 * vocabulary))[1]  # nor anything of their size


# --- B1: what each split does at its ends --------------------------------------------------------------------------


class Ends(nn.Module):
    """A layer between two others, so that its operand and its result have a place of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH, bias=False)
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.before(x)))


def between(axis: str, after: Callable[[int], tuple[Tile, ...]]) -> Any:
    """The first layer on device 0, the second cut along an axis over all, and then ``after``."""

    def strategy(graph: Graph, cluster: gp.Cluster, **_: Any) -> Placement:
        before, layer, tanh = graph.operators
        workers = range(len(cluster))
        assert layer.rule is not None
        cut = along(axis, spans(equal(layer.rule.extents[axis], len(workers))), workers)
        return place(graph, {before.name: copies([0]), layer.name: cut, tanh.name: after(len(workers))})

    return strategy


@pytest.mark.parametrize(
    ("axis", "into", "out_of"),
    [("n", "broadcast", "all-gather"), ("k", "scatter", "all-reduce")],
)
@pytest.mark.parametrize("num_devices", [3, 4])
def test_B1_column_and_row(axis: str, into: str, out_of: str, num_devices: int) -> None:
    """Column: broadcast in, all-gather out. Row: scatter in, all-reduce out. Gradients take the adjoints."""
    torch.manual_seed(0)
    x = torch.randn(8, WIDTH, dtype=torch.float64)
    parted = step(Ends().double(), num_devices, between(axis, lambda n: copies(range(n))), (x,))
    forward, backward = collectives(parted)
    assert forward == Counter([into, out_of])
    adjoint = {"broadcast": "reduce", "scatter": "gather"}[into]
    assert backward[adjoint] == 1
    value_bytes, others = 8 * WIDTH * 8, num_devices - 1
    report = parted.last_step
    assert report is not None
    size_bytes = {c.kind: c.size_bytes for c in report.program.collectives}
    if axis == "n":
        assert size_bytes == {"broadcast": others * value_bytes, "all-gather": others * value_bytes}
    else:
        assert size_bytes == {
            "scatter": others * value_bytes // num_devices, "all-reduce": num_devices * others * value_bytes
        }  # fmt: skip


@pytest.mark.parametrize("num_devices", [3, 4])
def test_B1_data_parallel_scatters_samples(num_devices: int) -> None:
    """Scatter in, a local step, gather out; the gradients of the samples come back likewise."""

    def local(num_workers: int) -> tuple[Tile, ...]:
        return along("d0", spans(equal(8, num_workers)), range(num_workers))

    torch.manual_seed(0)
    x = torch.randn(8, WIDTH, dtype=torch.float64)
    parted = step(Ends().double(), num_devices, between("b0", local), (x,))
    assert collectives(parted) == (Counter(["scatter", "gather"]), Counter(["scatter", "gather"]))


@pytest.mark.parametrize("shard_parameters", [False, True])
@pytest.mark.parametrize("num_devices", [3, 4])
def test_B1_data_parallel_all_reduces_gradients(num_devices: int, shard_parameters: bool) -> None:
    """In its two halves, round the optimizer's step: reduced to where a weight lives, and from there to all again.

    With parameters in parts (ZeRO), each half is done by all at once: reduce-scatter, then all-gather.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False)).double()
    x = torch.randn(8, WIDTH, dtype=torch.float64)
    options = {"shard_parameters": True} if shard_parameters else None
    parted = gp.partition(copy.deepcopy(model), num_devices, strategy="batch", strategy_options=options)
    for _ in range(2):
        optimizer = torch.optim.SGD(parted.parameters(), lr=0.1)
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        for module, one in ((parted, optimizer), (model, plain)):
            one.zero_grad()
            module(x).square().sum().backward()
            one.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parted.state_dict()[name], parameter.detach(), rtol=1e-10, atol=1e-12)
    forward, backward = collectives(parted, values=False)
    assert (forward, backward) == (
        (Counter({"all-gather": 2}), Counter({"reduce-scatter": 2}))
        if shard_parameters
        else (Counter({"broadcast": 2}), Counter({"reduce": 2}))
    )
    weights = 2 * WIDTH * WIDTH * 8
    report = parted.last_step
    assert report is not None and report.backward is not None
    parameters = parted.plan.graph.source
    for half in (report.program.collectives, report.backward.collectives):
        assert sum(c.size_bytes for c in half if c.value in parameters) == (num_devices - 1) * weights
