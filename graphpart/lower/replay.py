"""What the bridge rule did for one value, to be done again for others in the same position."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from graphpart.ir.graph import Ref
from graphpart.lower.collectives import Transfer, Transfers
from graphpart.lower.parts import Node, Part

_AT_DEVICE = re.compile(r"@(\d+)")


@dataclass(frozen=True, slots=True)
class _Made:
    """A part: the number of its name, all that does not depend on the value, and which new node makes it."""

    name: int
    part: Part
    node: int | None


@dataclass(frozen=True, slots=True)
class _Step:
    """A node: the numbers of what it reads and makes, and all that does not depend on the value."""

    node: Node
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    reads_one: bool
    rest: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Exchange:
    """Messages: the numbers of their wires, and all that does not depend on the value."""

    transfers: Transfers
    wires: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Bridging:
    """The bridges of one value, as they can be built for any that is held and wanted alike.

    Attributes:
        first_device: of the value; others' devices are as far from theirs.
        names: of its parts, without the value's.
        made: parts that bridges make.
        steps: nodes that make them.
        exchanges: messages.
        met: per consumer, the numbers of the parts that meet its wants.
    """

    first_device: int
    names: tuple[str, ...]
    made: tuple[_Made, ...]
    steps: tuple[_Step, ...]
    exchanges: tuple[_Exchange, ...]
    met: tuple[tuple[int, ...], ...]
    _moved: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def build(
        self,
        value: str,
        first_device: int,
        parts: dict[str, Part],
        nodes: list[Node],
        exchanges: list[Transfers],
    ) -> list[list[str]]:
        """Build the bridges of another value.

        Args:
            value: its name.
            first_device: of those that hold it.
            parts: every part by name; grows.
            nodes: in topological order; grows.
            exchanges: messages; grows.

        Returns:
            Per consumer, the names of the parts that meet its wants.
        """
        away, first_node = first_device - self.first_device, len(nodes)
        names = [value + end for end in self._ends(away)]
        for step in self.steps:
            node = step.node
            reads = tuple([names[i] for i in step.reads])
            refs = tuple(map(Ref, reads))
            nodes.append(
                Node(
                    value,
                    node.target,
                    (refs[0] if step.reads_one else refs, *step.rest),
                    node.kwargs,
                    reads,
                    tuple([names[i] for i in step.makes]),
                    node.device + away,
                    node.microbatch,
                )
            )
        for made in self.made:
            part, name = made.part, names[made.name]
            parts[name] = Part(
                name,
                value,
                part.region,
                part.dtype,
                part.device + away,
                part.microbatch,
                None if made.node is None else first_node + made.node,
                part.origin,
                part.term,
                part.requires_grad,
            )
        for exchange in self.exchanges:
            found = [
                Transfer(names[i], t.source + away, t.destination + away, t.is_summed, t.is_whole)
                for i, t in zip(exchange.wires, exchange.transfers.transfers, strict=True)
            ]
            exchanges.append(Transfers(value, exchange.transfers.microbatch, tuple(found)))
        return [[names[i] for i in consumer] for consumer in self.met]

    def _ends(self, away: int) -> tuple[str, ...]:
        """The ends of names on devices that are so far away."""
        if away not in self._moved:
            moved = [_AT_DEVICE.sub(lambda match: f"@{int(match[1]) + away}", name) for name in self.names]
            self._moved[away] = tuple(moved) if away else self.names
        return self._moved[away]


def bridging_of(
    value: str,
    first_device: int,
    holders: Sequence[Part],
    made: Sequence[Part],
    nodes: Sequence[Node],
    first_node: int,
    exchanges: Sequence[Transfers],
    met: Sequence[Sequence[str]],
) -> Bridging:
    """What was built for a value.

    Args:
        value: its name.
        first_device: of those that hold it.
        holders: the parts that were there.
        made: the parts that were made.
        nodes: the nodes that make them.
        first_node: the number of the first of those nodes.
        exchanges: the messages.
        met: per consumer, the names of the parts that meet its wants.
    """
    number = {part.name: i for i, part in enumerate((*holders, *made))}
    steps = []
    for node in nodes:
        first, *rest = node.args
        reads, makes = tuple(number[name] for name in node.operands), tuple(number[name] for name in node.results)
        steps.append(_Step(node, reads, makes, isinstance(first, Ref), tuple(rest)))
    return Bridging(
        first_device,
        tuple(name.removeprefix(value) for name in number),
        tuple(_Made(number[part.name], part, None if part.node is None else part.node - first_node) for part in made),
        tuple(steps),
        tuple(_Exchange(e, tuple(number[t.wire] for t in e.transfers)) for e in exchanges),
        tuple(tuple(number[name] for name in names) for names in met),
    )
