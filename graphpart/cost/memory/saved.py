"""What operators keep for backward on each device, storage by storage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import NamedTuple

from graphpart.cost.storage import storage_roots
from graphpart.cost.time.roofline import sample_values
from graphpart.cost.touched import touched_bytes
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement


class Storage(NamedTuple):
    """What is kept in one place.

    Attributes:
        name: of the value that it holds, or of the operator that keeps it.
        parted: whether a microbatch has only its part of it.
        extra: whether it is what an operator keeps besides values.
    """

    name: str
    parted: bool
    extra: bool = False


@dataclass(frozen=True)
class Savings:
    """Looks up what operators keep.

    Attributes:
        graph: the traced model.
        placement: where its operators run.
        num_devices: devices of the cluster, used or not.
    """

    graph: Graph
    placement: Placement
    num_devices: int

    @cached_property
    def samples(self) -> frozenset[str]:
        """Values that carry samples."""
        return sample_values(self.graph)

    @cached_property
    def roots(self) -> Mapping[str, str]:
        """Per value, the value whose storage it shares."""
        return storage_roots(self.graph)

    def of(self, operators: Iterable[Operator]) -> list[dict[Storage, int]]:
        """Per device, the storages that operators save, in bytes for the whole batch; parameters and buffers aside.

        Args:
            operators: of the graph, or with other ``saved`` than there.
        """
        found: list[dict[Storage, int]] = [{} for _ in range(self.num_devices)]
        for op in operators:
            for tile in self.placement.tiles[op.name] if op.saved_extra_bytes else ():
                extra = Storage(op.name, any(operand in self.samples for operand in op.operands), extra=True)
                size_bytes = ceil(op.saved_extra_bytes * tile.share(op))
                found[tile.device][extra] = found[tile.device].get(extra, 0) + size_bytes
            for value in dict.fromkeys(op.saved):
                root = self.roots.get(value)
                if root is None or (root in self.graph.source and self.graph.source[root].kind != "input"):
                    continue
                storage = Storage(root, root in self.samples)
                sizes = touched_bytes(op, value, self.graph, self.placement, self.roots)
                for device, size_bytes in sizes.items():
                    found[device][storage] = max(found[device].get(storage, 0), size_bytes)
        return found


def total_bytes(storages: Mapping[Storage, int], part: float) -> int:
    """Bytes of storages when a part of the batch is there."""
    return sum(ceil(size_bytes * (part if storage.parted else 1.0)) for storage, size_bytes in storages.items())
