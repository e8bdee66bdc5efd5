"""Layers of torch_geometric, two of each in a model with a fixed list of edges."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sweep_parts.harness import Architecture, Sample

NODES, EDGES, WIDTH = 24, 60, 16

CONVOLUTIONS: Mapping[str, Mapping[str, Any]] = {
    "GCNConv": {}, "SAGEConv": {}, "GATConv": {"heads": 2, "concat": False},
    "GATv2Conv": {"heads": 2, "concat": False}, "GraphConv": {}, "TransformerConv": {"heads": 2, "concat": False},
    "TAGConv": {}, "SGConv": {}, "ChebConv": {"K": 2}, "LEConv": {}, "ClusterGCNConv": {}, "ARMAConv": {},
    "FeaStConv": {}, "MFConv": {}, "ResGatedGraphConv": {}, "SuperGATConv": {"concat": False}, "GENConv": {},
    "GeneralConv": {},
}  # fmt: skip


def architectures(_: str) -> Mapping[str, Architecture]:
    """The kinds listed here."""
    return {name: functools.partial(_build, name) for name in CONVOLUTIONS}


class _Stack(nn.Module):
    def __init__(self, kind: Any, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.first, self.second = kind(WIDTH, WIDTH, **options), kind(WIDTH, WIDTH, **options)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.first(x, edge_index).relu()
        return self.head(self.second(x, edge_index).relu())


def _build(name: str) -> Sample:
    import torch_geometric.nn

    model = _Stack(getattr(torch_geometric.nn, name), CONVOLUTIONS[name])
    return Sample(model, (_inputs(0), _inputs(1)))


def _inputs(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    edges = torch.randint(NODES, (2, EDGES), generator=draw)
    edges[1] = torch.where(edges[0] == edges[1], (edges[1] + 1) % NODES, edges[1])  # no loops: as many in each call
    return {"x": torch.randn(NODES, WIDTH, generator=draw), "edge_index": edges}
