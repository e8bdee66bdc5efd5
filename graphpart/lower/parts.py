"""Nouns of the lowering: parts of values, and the nodes that make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphpart.ir.region import Intervals, Region
from graphpart.lower.collectives import Transfers

Term = tuple[tuple[str, Intervals], ...]
"""Index sets on contracted axes, which tell one partial result from another."""


@dataclass(frozen=True, slots=True)
class Part:
    """A region of a value as some node, or some source, has it.

    Attributes:
        name: unique; becomes a local of a segment, or a wire between segments.
        value: the graph's name for the value.
        region: which part of it.
        dtype: name without the ``torch.`` prefix.
        device: index of the device that makes it.
        microbatch: which microbatch it belongs to, or None.
        node: index of the node that makes it; None for a source.
        origin: ``segment`` or the kind of source.
        term: where the value is a sum of partial results, which of its terms this is: the tile's index sets on the
            contracted axes. Empty for a part of the value itself.
        requires_grad: whether a gradient may flow back through it.
    """

    name: str
    value: str
    region: Region
    dtype: str
    device: int
    microbatch: int | None
    node: int | None
    origin: str = "segment"
    term: Term = ()
    requires_grad: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """One call on one device: a tile of an operator, or a part of a bridge (slice, concat, sum).

    Attributes:
        operator: name of the graph operator it belongs to.
        target: what to call.
        args: positional arguments; a ``Ref`` names a part.
        kwargs: keyword arguments, likewise.
        operands: names of the parts it reads.
        results: names of the parts it makes.
        device: index of its device.
        microbatch: which microbatch it belongs to, or None.
        key: for a random operator, what seeds its generator.
        share: the part of the operator's work that it does.
    """

    operator: str
    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[str, ...]
    results: tuple[str, ...]
    device: int
    microbatch: int | None
    key: int | None = None
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Need:
    """What a consumer wants: a region of a value on a device.

    Attributes:
        value: the graph's name for the value.
        region: which part.
        device: index of the device that reads it.
        part: name of the one partial result wanted as it is, by consumers that are linear in it.
    """

    value: str
    region: Region
    device: int
    part: str = ""


@dataclass(frozen=True)
class Parts:
    """A graph cut into parts and nodes, in topological order, with every bridge's slice, concat and sum in place.

    Attributes:
        parts: every part by name.
        nodes: in topological order.
        outputs: per output of the graph, the part that holds it whole; None where it is no tensor.
        mutations: pairs (source value, part).
        exchanges: the messages of each value, as they will be.
    """

    parts: Mapping[str, Part]
    nodes: tuple[Node, ...]
    outputs: tuple[str | None, ...]
    mutations: tuple[tuple[str, str], ...]
    exchanges: tuple[Transfers, ...] = ()
