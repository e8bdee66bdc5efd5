"""Candidate cuts of every operator: seeds, and what follows from them along the graph's edges.

An operator that is cut holds regions of its results. A reader's cut that needs just these regions costs nothing, so it
is a candidate too; and so is, the other way, the producer's cut that makes just what a cut reader needs. Followed to
the end, cutting the heads of an attention cuts the fused projection before it into three runs a device, and the
contracted axis of the projection behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from itertools import islice, product

from graphpart.ir.graph import Graph, Operator
from graphpart.ir.region import Region
from graphpart.strategies.cuts.inverse_rules import Cut
from graphpart.strategies.cuts.layouts import Geometry, Layout

MAX_CANDIDATES = 16
"""Candidate cuts an operator keeps: the first found, which are nearest to a seed."""

_MAX_UNIONS = 64  # ways to put together what several readers need of one value

Seed = tuple[str, Cut]
"""A cut of an operator, by its name."""

Start = tuple[str, tuple[Region, ...]]
"""Regions of a source, one a device, by the source's name."""


def propagate(
    geometry: Geometry, seeds: Iterable[Seed] = (), starts: Iterable[Start] = (), *, max_cuts: int = MAX_CANDIDATES
) -> Mapping[str, tuple[Cut, ...]]:
    """All cuts that follow from seeds, the nearest first.

    Args:
        geometry: the graph and the devices' shares; where a cut cannot be followed exactly (heads that a cut of the
            features would split), the axes of the same dimension are cut in proportion to the shares instead.
        seeds: cuts of operators.
        starts: cuts of inputs.
        max_cuts: cuts an operator keeps.

    Returns:
        Per operator name, its cuts; operators without any are absent.
    """
    found = _Propagation(geometry, max_cuts)
    for name, layout in starts:
        found.to_readers(name, layout)
    for name, cut in seeds:
        found.add(geometry.graph.operator[name], cut)
    return found.run()


class _Propagation:
    def __init__(self, geometry: Geometry, max_cuts: int) -> None:
        self.geometry = geometry
        self.graph: Graph = geometry.graph
        self.max_cuts = max_cuts
        self.found: dict[str, dict[Cut, None]] = {}
        self.queue: deque[tuple[Operator, Cut]] = deque()
        # What readers need of a value that none of them needs all of, by reader and operand.
        self.pieces: dict[str, dict[tuple[str, int], dict[Layout, None]]] = {}

    def run(self) -> Mapping[str, tuple[Cut, ...]]:
        while self.queue:
            op, cut = self.queue.popleft()
            for k, value in enumerate(op.results):
                self.to_readers(value.name, self.geometry.made(op, k, cut))
            for i, name in enumerate(op.operands):
                if name in self.graph.producer:
                    self._to_producer(name, (op.name, i), self.geometry.owned(op, i, cut))
        return {name: tuple(cuts) for name, cuts in self.found.items()}

    def add(self, op: Operator, cut: Cut) -> None:
        cuts = self.found.get(op.name, {})
        if cut not in cuts and len(cuts) < self.max_cuts and self.geometry.is_legal(op, cut):
            self.found.setdefault(op.name, {})[cut] = None
            self.queue.append((op, cut))

    def to_readers(self, name: str, layout: Layout) -> None:
        if not _differ(layout):
            return
        for reader in self.graph.consumers[name]:
            for i, operand in enumerate(reader.operands):
                if operand == name:
                    for cut in self.geometry.readers(reader, i, layout):
                        self.add(reader, cut)

    def _to_producer(self, name: str, edge: tuple[str, int], layout: Layout) -> None:
        if not _differ(layout):
            return
        producer = self.graph.producer[name]
        result = next(k for k, value in enumerate(producer.results) if value.name == name)
        for wanted in self._wholes(name, edge, layout):
            for cut in self.geometry.makers(producer, result, wanted):
                self.add(producer, cut)

    def _wholes(self, name: str, edge: tuple[str, int], layout: Layout) -> list[Layout]:
        """The layout itself if it covers the value, else its unions with what the other readers need."""
        size = self.graph.values[name].num_elements
        if _num_elements(layout) >= size:
            return [layout]
        pieces = self.pieces.setdefault(name, {})
        pieces.setdefault(edge, {})[layout] = None
        others = [list(layouts) for other, layouts in pieces.items() if other != edge]
        found = []
        for rest in islice(product(*others), _MAX_UNIONS):
            united = layout
            for other in rest:
                united = tuple(a | b if a and b else a or b for a, b in zip(united, other, strict=True))
            if _num_elements(united) == size:
                found.append(united)
        return found


def _differ(layout: Layout) -> bool:
    held = [region for region in layout if region is not None]
    return any(region != held[0] for region in held)


def _num_elements(layout: Layout) -> int:
    return sum(region.num_elements for region in layout if region is not None)
