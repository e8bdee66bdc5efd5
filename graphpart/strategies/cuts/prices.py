"""What cuts cost: the work of their tiles, and what has to move between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

from graphpart.cost.time.collectives import CollectiveTimes
from graphpart.cost.time.roofline import OperatorWork, operator_works, roofline_s, sample_values
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import DTYPE_BYTES, Graph, Operator
from graphpart.ir.placement import Tile
from graphpart.ir.region import Region
from graphpart.strategies.cuts.inverse_rules import Cut
from graphpart.strategies.cuts.layouts import Geometry, Layout


class Prices:
    """Times on one group of devices, in seconds a step, forward and backward.

    Attributes:
        devices: indices of the group's devices.
        samples: names of the values that carry samples.
    """

    def __init__(
        self,
        geometry: Geometry,
        cluster: Cluster,
        devices: Sequence[int],
        num_microbatches: int = 1,
        *,
        count_latency: bool = True,
        beside: Iterable[Sequence[int]] = (),
    ) -> None:
        """Look at a group.

        Args:
            geometry: the graph.
            cluster: the devices.
            devices: indices of the group's devices.
            num_microbatches: parts of the batch.
            count_latency: whether the number of messages counts. Otherwise bytes decide, and of choices with equal
                bytes of activations the number of transfers, then bytes of parameters that several devices read.
            beside: other groups that do the same at the same time, and may share links with this one.
        """
        self.geometry = geometry
        self.graph: Graph = geometry.graph
        self.devices = tuple(devices)
        self.cluster = cluster
        self.num_microbatches = num_microbatches
        self.collectives = CollectiveTimes(cluster, devices, count_latency=count_latency, beside=beside)
        self.link = self.collectives.link
        self._received_byte_s = self.collectives.received_byte_s
        self.works = operator_works(self.graph)
        self.samples = sample_values(self.graph)
        self._minor = 1.0 if count_latency else 1e-3
        self.start_s = max(cluster.devices[d].overhead_s for d in devices) * self._minor
        self._example: dict[int | str, Operator] = {}
        self._move = cache(self._move_once)
        self._compute = cache(self._compute_once)

    def compute_s(self, op: Operator, cut: Cut) -> float:
        """Time of the slowest device for its tile of an operator."""
        rule = self.geometry.rule(op)
        key = op.name if rule < 0 else rule
        self._example.setdefault(key, op)
        return self._compute(key, self.works[op.name], cut)

    def _compute_once(self, key: int | str, work: OperatorWork, cut: Cut) -> float:
        found = self._example[key]  # of all operators with this rule
        whole = self._touched(found, ((),) * len(cut))[0]
        slowest = 0.0
        calls = self.num_microbatches if work.carries_samples else 1
        for index, axes, touched in zip(self.devices, cut, self._touched(found, cut), strict=True):
            if axes is None:
                continue
            device = self.cluster.devices[index]
            share = Tile(index, dict(axes)).share(found)
            moved = touched / whole if whole else 1.0
            time_s = roofline_s(share * work.flops_forward, moved * work.bytes_forward, work.dtype, device)
            time_s += roofline_s(share * work.flops_backward, moved * work.bytes_backward, work.dtype, device)
            slowest = max(slowest, time_s + calls * device.overhead_s * (1 + work.has_backward))
        return slowest

    def _touched(self, op: Operator, cut: Cut) -> list[int]:
        """Elements that each device reads and makes."""
        sums = [0] * len(cut)
        layouts = [self.geometry.needed(op, i, cut) for i in range(len(op.operands))]
        layouts += [self.geometry.made(op, k, cut) for k in range(len(op.results))]
        for layout in layouts:
            for i, region in enumerate(layout):
                sums[i] += region.num_elements if region is not None else 0
        return sums

    def move_s(self, name: str, held: Layout, partial: bool, need: Layout) -> float:
        """Time to bring every device what it needs of a value, and its gradient back.

        Args:
            name: the value.
            held: what each device has of it.
            partial: whether that has to be summed over the devices first.
            need: what each device needs.
        """
        value = self.graph.values[name]
        source = self.graph.source.get(name)
        gradient = value.requires_grad if source is None else source.trainable
        calls = self.num_microbatches if name in self.samples else 1
        return self._move(held, partial, need, DTYPE_BYTES[value.dtype], calls) * (1 + gradient)

    def _move_once(self, held: Layout, partial: bool, need: Layout, item_bytes: int, calls: int) -> float:
        if partial:
            return calls * self._reduce_s(need, item_bytes / calls)
        holders = [region for region in held if region is not None]
        received, sources = [], []
        for i, wanted in enumerate(need):
            mine = held[i]
            lack = 0 if wanted is None else wanted.num_elements - _common(wanted, mine)
            received.append(lack)
            if lack and wanted is not None:
                others = [r for r in dict.fromkeys(holders) if r != mine and _common(r, wanted)]
                sources.append(len(others))
        if not sources:
            return 0.0
        size = max(received) * item_bytes / calls
        if len(holders) == 1:  # the one that has it sends to all
            sent = sum(received) * item_bytes / calls
            time_s = (len(sources) * self.link.latency_s) + sent / self.link.bandwidth_bytes_per_s
            if len({wanted for wanted in need if wanted is not None}) == 1:
                time_s = min(time_s, self.collectives.time_s("broadcast", size))
            return calls * (time_s + self.start_s)
        return calls * (max(sources) * self.link.latency_s + size * self._received_byte_s + self.start_s)

    def _reduce_s(self, need: Layout, item_bytes: float) -> float:
        """Sum partial values: each device gets its part of the sum from all others, or all by an all-reduce."""
        num_others = len(self.devices) - 1
        largest = max(map(_elements, need))
        direct = num_others * (self.link.latency_s + largest * item_bytes * self._received_byte_s)
        united = [region for region in need if region is not None]
        if all(region == united[0] for region in united):
            direct = min(direct, self.collectives.time_s("all-reduce", largest * item_bytes))
        elif len(set(united)) == len(self.devices):
            direct = min(direct, self.collectives.time_s("reduce-scatter", len(united) * largest * item_bytes))
        return direct + self.start_s

    def spread_s(self, name: str, need: Layout) -> float:
        """Time to send a parameter or buffer from its home, and its gradient back, once a step.

        Homes are spread over the devices, so each sends and receives its share; all parameters go together, so that
        messages don't count. What one device alone needs is at home there.
        """
        regions = [region for region in need if region is not None]
        if _disjoint(regions):
            return 0.0
        value, source = self.graph.values[name], self.graph.source[name]
        size = max(region.num_elements for region in regions) * DTYPE_BYTES[value.dtype]
        once_s = size * self.collectives.pattern("all-gather", size).byte_s
        return self._minor * once_s * (2 if source.trainable else 1)


def _elements(region: Region | None) -> int:
    return 0 if region is None else region.num_elements


def _common(one: Region, other: Region | None) -> int:
    return 0 if other is None else (one & other).num_elements


def _disjoint(regions: Sequence[Region]) -> bool:
    return not any(one & other for i, one in enumerate(regions) for other in regions[:i])
