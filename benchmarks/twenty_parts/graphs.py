"""Networks on graphs: messages passed by hand, and by torch_geometric."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from twenty_parts.training import Maker, Training, adamw, sgd

NODES, EDGES, WIDTH, CLASSES = 24, 60, 16, 3


class GraphConvolution(nn.Module):
    """Kipf and Welling's: the mean of neighbours, scaled by the degrees of both."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Features of nodes."""
        degree = x.new_zeros(len(x)).index_add(0, target, x.new_ones(len(target))) + 1
        scale = (degree[source] * degree[target]).rsqrt()
        x = self.linear(x)
        return (x / degree[:, None]).index_add(0, target, x[source] * scale[:, None])


class GraphAttention(nn.Module):
    """Veličković et al.: neighbours weighed by a softmax over each node's edges."""

    def __init__(self, width: int, out: int, heads: int = 2) -> None:
        super().__init__()
        self.linear, self.heads = nn.Linear(width, out * heads), heads
        self.of_source = nn.Parameter(torch.randn(heads, out) / out**0.5)
        self.of_target = nn.Parameter(torch.randn(heads, out) / out**0.5)

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Features of nodes, the mean of heads."""
        h = self.linear(x).view(len(x), self.heads, -1)
        score = (h * self.of_source).sum(-1)[source] + (h * self.of_target).sum(-1)[target]
        score = functional.leaky_relu(score, 0.2)
        rows = target[:, None].expand_as(score)
        highest = torch.full((len(x), self.heads), -torch.inf).scatter_reduce(0, rows, score.detach(), "amax")
        weight = (score - highest[target]).exp()
        total = torch.zeros(len(x), self.heads).scatter_add(0, rows, weight)
        weight = weight / total[target].clamp(min=1e-12)
        return torch.zeros_like(h).index_add(0, target, h[source] * weight[..., None]).mean(1)


class TwoLayers(nn.Module):
    """Two layers of a kind, and the loss of nodes whose class is known."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.first, self.second = kind(WIDTH, WIDTH, **options), kind(WIDTH, WIDTH, **options)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, edges: Tensor, labels: Tensor, known: Tensor) -> Tensor:
        """The loss."""
        x = self.passed(self.first, x, edges).relu()
        x = self.passed(self.second, x, edges).relu()
        return functional.cross_entropy(self.head(x)[known], labels[known])

    def passed(self, layer: nn.Module, x: Tensor, edges: Tensor) -> Tensor:
        """By hand, a layer takes sources and targets."""
        return layer(x, edges[0], edges[1])


class TwoLayersOfGeometric(TwoLayers):
    """Those of torch_geometric take edges."""

    def passed(self, layer: nn.Module, x: Tensor, edges: Tensor) -> Tensor:
        """A layer's result."""
        return layer(x, edges)


def _batches() -> list[dict[str, Tensor]]:
    """Graphs of as many edges, with loops for some, and other nodes known in each."""
    found = []
    for i in range(4):
        draw = torch.Generator().manual_seed(i)
        edges = torch.randint(NODES, (2, EDGES), generator=draw)
        x, labels = torch.randn(NODES, WIDTH, generator=draw), torch.randint(CLASSES, (NODES,), generator=draw)
        found.append({"x": x, "edges": edges, "labels": labels, "known": torch.rand(NODES, generator=draw) < 0.5})
    return found


def _by_hand(kind: Any) -> Training:
    return Training(TwoLayers(kind), _batches(), lambda loss: loss, sgd)


def _of_geometric(name: str, **options: Any) -> Training:
    """Layers of torch_geometric."""
    from torch_geometric import nn as layers

    return Training(TwoLayersOfGeometric(getattr(layers, name), **options), _batches(), lambda loss: loss, adamw)


MAKERS: Mapping[str, Maker] = {
    "GCN by hand": functools.partial(_by_hand, GraphConvolution),
    "GAT by hand": functools.partial(_by_hand, GraphAttention),
    "GCN": functools.partial(_of_geometric, "GCNConv"),
    "GAT": functools.partial(_of_geometric, "GATConv", heads=2, concat=False),
}
