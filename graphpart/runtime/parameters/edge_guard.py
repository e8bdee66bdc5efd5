"""Masks that make weights sparse: read for planning, and watched where a plan relies on their zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from graphpart.errors import ParameterError
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement

MOST_EDGES = 0.75
"""A mask that keeps more of its weights than this is not worth grouping neurons for."""


def masks_of(graph: Graph, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Per buffer that masks a matrix, where it is not zero; those that mask little, or have no values, are left out.

    Args:
        graph: the traced model.
        tensors: the model's tensors by name.
    """
    found = {}
    for op in graph.operators:
        if op.target != "aten.mul.Tensor" or len(op.results[0].shape) != 2:
            continue
        for name in op.operands:
            source = graph.source.get(name)
            tensor = tensors.get(name)
            if source is None or source.kind != "buffer" or tensor is None or tensor.is_meta:
                continue
            pattern = _pattern(tensor)
            if tuple(tensor.shape) == op.results[0].shape and pattern.mean() <= MOST_EDGES:
                found[name] = pattern
    return found


@dataclass
class EdgeGuard:
    """The edges that a plan's tiles read; every other entry of a mask has to stay zero.

    Attributes:
        edges: per mask, by value name, the entries that may be other than zero.
        tensors: the model's, with the masks, by name.
    """

    edges: Mapping[str, np.ndarray]
    tensors: Mapping[str, Tensor]
    _looked_at: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, placement: Placement, tensors: Mapping[str, Tensor]) -> EdgeGuard:
        """What a placement relies on; nothing where no tile leaves anything out."""
        edges: dict[str, np.ndarray] = {}
        for name, tiles in placement.tiles.items():
            if not any(tile.reads for tile in tiles):
                continue
            op = graph.operator[name]
            mask = _mask(graph, op)
            if mask not in tensors or op.rule is None:
                raise ParameterError(
                    f"operator {op} has tiles that read only some of its inputs, which takes a weight that is a "
                    "parameter times a mask (a buffer, as torch.nn.utils.prune makes it)"
                )
            allowed = edges.setdefault(mask, np.zeros(tensors[mask].shape, dtype=bool))
            for tile in tiles:
                region = op.rule.region(op.rule.operands[1], {**tile.axes, **tile.reads})
                allowed[np.ix_(*(list(dim) for dim in region.dims))] = True
        return cls(edges, tensors)

    def check(self) -> None:
        """Look at masks that have changed since the last time.

        Raises:
            ParameterError: naming the mask and an entry that is no longer zero.
        """
        for name, edges in self.edges.items():
            tensor = self.tensors[name]
            if self._looked_at.get(name) == (id(tensor), tensor._version):
                continue
            extra = np.argwhere(_pattern(tensor) & ~edges)
            if len(extra):
                raise ParameterError(
                    f"the plan leaves out weights that {name!r} masks, but its entry {extra[0].tolist()} is not zero "
                    f"now ({len(extra)} such entries); partition the model again"
                )
            self._looked_at[name] = (id(tensor), tensor._version)


def _mask(graph: Graph, op: Operator) -> str:
    weight = graph.producer.get(op.operands[1])
    operands = weight.operands if weight is not None else ()
    return next((n for n in operands if n in graph.source and graph.source[n].kind == "buffer"), "")


def _pattern(tensor: Tensor) -> np.ndarray:
    return torch.ne(tensor.detach(), 0).cpu().numpy()
